"""What the steering step knows of an answer, told: strongest concepts, and how far image and text are apart.

The same codes and the same mix as the step's. Pure tensors and slots: no engine, no labels.

Shapes: N positions, D hidden size, K concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from steering.explanation import ConceptActivity, Explanation, Mismatch, TokenExplanation
from steering.realignment import FORM_TERMS, MixedCodes
from steering.slot_tables import SlotTables, StepSettings, mix_of

TOP_CONCEPTS, TOP_OF_TOKEN = 10, 3
"""So many concepts are told of an answer's image and text, and of a token's text."""
ROWS_AT_ONCE = 64
"""Bounds the dense codes [N, K]."""


class ExplainedSettings(StepSettings, Protocol):
    @property
    def dial(self) -> float:
        """Strength; 0 where nothing is steered."""
        ...


@torch.no_grad()
def explain(
    tables: SlotTables, slot: int, means: Sequence[Tensor | None], settings: ExplainedSettings, *, tokens: bool
) -> Explanation:
    """From the text means [D] at the positions that the answer's tokens were chosen at; the last is its end.

    None stands for a position before which there is no text. `slot` has the image's code. Waits for the device.
    """
    image_NK, text_NK, steered_NK = [], [], []
    wanted = means if tokens else means[-1:]
    for start in range(0, len(wanted), ROWS_AT_ONCE):
        codes = _dense_codes(tables, slot, wanted[start : start + ROWS_AT_ONCE], settings)
        for parts, code in zip((image_NK, text_NK, steered_NK), codes, strict=True):
            parts.append(code)
    told = [_Told(*rows) for rows in zip(*(torch.cat(parts) for parts in (image_NK, text_NK, steered_NK)), strict=True)]
    end = told[-1]
    return Explanation(
        mismatch=end.mismatch(),
        image=end.strongest(end.image_K, TOP_CONCEPTS),
        text=end.strongest(end.text_K, TOP_CONCEPTS),
        tokens=tuple(
            TokenExplanation(mismatch=one.mismatch(), text=one.strongest(one.text_K, TOP_OF_TOKEN)) for one in told
        )
        if tokens
        else None,
    )


class _Told:
    """Dense codes [K] of one position."""

    def __init__(self, image_K: Tensor, text_K: Tensor, steered_K: Tensor) -> None:
        self.image_K, self.text_K, self.steered_K = image_K, text_K, steered_K

    def mismatch(self) -> Mismatch:
        return Mismatch(before=_mismatch(self.image_K, self.text_K), after=_mismatch(self.image_K, self.steered_K))

    def strongest(self, code_K: Tensor, number: int) -> tuple[ConceptActivity, ...]:
        """Of concepts that are equally strong, the lower ids."""
        values, order = code_K.sort(descending=True, stable=True)
        ids = order[:number][values[:number] > 0].tolist()
        columns = zip(ids, *(code[ids].tolist() for code in (self.image_K, self.text_K, self.steered_K)), strict=True)
        return tuple(
            ConceptActivity(id=at, image=image, text=text, steered=steered) for at, image, text, steered in columns
        )


def _dense_codes(
    tables: SlotTables, slot: int, means: Sequence[Tensor | None], settings: ExplainedSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """z_v, z_t and the code that the step aimed at, [N, K] on the host."""
    realignment, device = tables.realignment, tables.device
    nothing_D = torch.zeros(realignment.hidden_size, device=device)
    text_ND = torch.stack([nothing_D if mean is None else mean.to(device).float() for mean in means])
    has_text_N1 = torch.tensor([[mean is not None] for mean in means], device=device)
    text, row_N = realignment.encode_text(text_ND), torch.full((len(means),), slot, device=device)
    mix = mix_of(settings, len(means), device)
    code = realignment.mix(text, tables.code, row_N, mix._replace(dense=torch.zeros_like(mix.dense)))
    change = code if FORM_TERMS[settings.form].dense == 0 else realignment.mix(text, tables.code, row_N, mix)
    dial = {"reversed": -settings.dial, "random": 0.0}.get(settings.control, settings.dial)
    image_NK = _spread(code, code.image, realignment.num_concepts)
    text_NK = _spread(code, code.text, realignment.num_concepts) * has_text_N1
    moved_NK = dial * _spread(change, change.mixed - change.text, realignment.num_concepts) * has_text_N1
    for edit in settings.edits:
        moved_NK[:, edit.concept_id] += (edit.factor - 1) * text_NK[:, edit.concept_id] + edit.add
    return image_NK.cpu(), text_NK.cpu(), (text_NK + moved_NK).clamp(min=0).cpu()


def _spread(codes: MixedCodes, values_N2k: Tensor, concepts: int) -> Tensor:
    """[N, K]: a concept that stands twice has the same value there."""
    dense_NK = values_N2k.new_zeros(len(values_N2k), concepts)
    return dense_NK.scatter_(1, codes.concept_ids, values_N2k)


def _mismatch(one_K: Tensor, other_K: Tensor) -> float:
    larger = float(torch.maximum(one_K, other_K).sum())
    return 1 - float(torch.minimum(one_K, other_K).sum()) / larger if larger else 0.0
