"""What happens at the hook layer of a transformers model, for a batch of sequences: pool, then one steering step.

Knows hidden states and where text begins; knows nothing of how a model is run or tokens are sampled.

Shapes: B batch rows, T tokens of this pass, D hidden size, a active rows, R steered positions.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from steering.artifact import Artifact
from steering.explaining import explain
from steering.lvlm.token_spans import first_steered_position
from steering.realignment import Realignment
from steering.settings import ResolvedSteering
from steering.slot_tables import SlotTables, SteeredRows, share_within
from steering.tally import Tally

FIRST_SLOTS = 8
"""The tables begin with so many slots and double when they are full."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward pass: which sequence each batch row continues, and what its tokens are."""

    rows: list[SequenceSteering]
    """State of each batch row, [B]."""
    image_BT: Tensor
    """[B, T] bool: image tokens of the prompt."""
    text_B: list[range]
    """Per batch row, the places among these T tokens that hold text after the last image; padding is none of them."""


@dataclass(kw_only=True, eq=False)
class SequenceSteering:
    """Running state of one sequence at the hook layer. What was done to it, the `Intervention` tells."""

    settings: ResolvedSteering
    prompt_text_tokens: int
    """Of the text after the last image, those of the prompt: the answer begins behind them. No default, since with a
    wrong one an earlier turn's answer is steered, or this one's is not."""
    slot: int | None = None
    """Its place in the tables, where its image's code is; None while the image is unknown."""
    text_sum_D: Tensor | None = None
    text_count: int = 0
    span: list[Tensor] = field(default_factory=list)
    """'exact' only: unsteered states of the text that the delta goes to, up to the latest token, each [T, D]."""
    span_delta_D: Tensor | None = None
    """'exact' only: the delta of the latest step; None until there is one."""
    means: list[Tensor | None] = field(default_factory=list)
    """Text means [D] at the positions that tokens of the answer were chosen at, the latest alone unless each token is
    to be explained; None: before there was any text."""
    visited_text: bool = False
    """A delta was computed for at least one position, be it zero."""

    @property
    def exact(self) -> bool:
        return self.settings.active and self.settings.mode == "exact"

    def exact_span(self) -> Tensor | None:
        """'exact': steered states [T_span, D] up to the latest token; None while there is nothing to steer."""
        if self.span_delta_D is None:
            return None
        base_TD = torch.cat(self.span)
        return (base_TD.float() + self.span_delta_D * self.span_shares()[:, None]).to(base_TD.dtype)

    def span_shares(self) -> Tensor:
        """'exact': the share [T_span] of the delta that each position takes."""
        assert self.span_delta_D is not None
        shift_T = self.span_delta_D.norm() / torch.cat(self.span).float().norm(dim=-1)
        limit = self.settings.max_shift
        return torch.ones_like(shift_T) if limit is None else share_within(shift_T, limit)


class Intervention:
    """Steers the output of the hook layer. Announce each pass with `prepare`; call the object with its states."""

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        self._min_text_tokens = artifact.config.min_text_tokens
        realignment = Realignment(artifact.auxiliary, artifact.sae, device)
        self.tables = SlotTables(
            realignment, artifact.control_image_MD, slots=FIRST_SLOTS, tallies=FIRST_SLOTS, device=device
        )
        """A sequence's tally is at its slot."""
        self._free = list(range(FIRST_SLOTS - 1, 0, -1))
        self._pass: Pass | None = None
        self.base_BTD: Tensor | None = None
        """The latest pass's states before steering."""

    def prepare(self, forward_pass: Pass) -> None:
        """Announce the pass whose hidden states come next."""
        self._pass, self.base_BTD = forward_pass, None

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        """States after the hook layer to steered states; rows that are off come back untouched, bit for bit.

        In mode 'exact' a prefill is steered here; later steps leave the span to `SequenceSteering.exact_span`.
        """
        assert self._pass is not None, "prepare() announces every pass"
        current, self._pass = self._pass, None
        self.base_BTD = hidden_BTD
        active = [index for index, row in enumerate(current.rows) if row.settings.watched]
        if not active:
            return hidden_BTD
        hidden_aTD = hidden_BTD[active].float()
        self._encode_new_images(current, active, hidden_aTD)
        sums_aTD = self._running_sums(current, active, hidden_aTD)
        steered_BTD = hidden_BTD.clone()
        self._steer_causal(current, active, sums_aTD, steered_BTD)
        for place, index in enumerate(active):
            row, text = current.rows[index], current.text_B[index]
            row.text_sum_D, row.text_count = sums_aTD[place, -1], row.text_count + len(text)
            self._keep_mean(row)
            if row.exact:
                self._steer_span(row, hidden_BTD[index, text.start : text.stop])
                span_TD = row.exact_span()
                if span_TD is not None:
                    new = min(len(text), len(span_TD))
                    steered_BTD[index, text.stop - new : text.stop] = span_TD[len(span_TD) - new :]
        return steered_BTD

    def tally(self, row: SequenceSteering) -> Tally:
        """What was done to a sequence so far; waits for the device."""
        if row.slot is None:
            return Tally()
        tokens = row.settings.explain == "tokens"
        told = explain(self.tables, row.slot, row.means, row.settings, tokens=tokens) if row.means else None
        if row.exact:
            return replace(self._tally_span(row), explanation=told)
        positions, shift_sum, clamped = self.tables.tally_T3[row.slot].tolist()
        return Tally(
            positions=int(positions),
            relative_shift=shift_sum / positions if positions else 0.0,
            visited=True,
            visited_text=row.visited_text,
            clamped=int(clamped),
            explanation=told,
        )

    def _encode_new_images(self, current: Pass, active: list[int], hidden_aTD: Tensor) -> None:
        new = [place for place, index in enumerate(active) if current.rows[index].slot is None]
        if not new:
            return
        mask_nT1 = current.image_BT[[active[place] for place in new]][..., None]
        pooled_nD = (hidden_aTD[new] * mask_nT1).sum(1) / mask_nT1.sum(1)
        rows = [current.rows[active[place]] for place in new]
        slots = [self._take_slot(row) for row in rows]
        self.tables.set_images(slots, [row.settings for row in rows], pooled_nD, new_tallies=slots)

    def _take_slot(self, row: SequenceSteering) -> int:
        """A slot that is free again once nobody holds the row any more."""
        if not self._free:
            slots = self.tables.slots
            self.tables.enlarge(2 * slots, 2 * slots)
            self._free.extend(range(2 * slots - 1, slots - 1, -1))
        row.slot = self._free.pop()
        weakref.finalize(row, self._free.append, row.slot)
        return row.slot

    def _running_sums(self, current: Pass, active: list[int], hidden_aTD: Tensor) -> Tensor:
        """Sums [a, T, D] of the text up to and including each position, float32."""
        zero_D = hidden_aTD.new_zeros(hidden_aTD.shape[-1])
        sums = [current.rows[index].text_sum_D for index in active]
        earlier_aD = torch.stack([zero_D if one is None else one for one in sums])
        texts = [current.text_B[index] for index in active]
        bounds = [[text.start for text in texts], [text.stop for text in texts]]
        starts_a, stops_a = self.tables.send(bounds, torch.int64)
        position_T = torch.arange(hidden_aTD.shape[1], device=hidden_aTD.device)
        mask_aT = (position_T >= starts_a[:, None]) & (position_T < stops_a[:, None])
        return earlier_aD[:, None] + (hidden_aTD * mask_aT[..., None]).cumsum(1)

    def _steer_causal(self, current: Pass, active: list[int], sums_aTD: Tensor, steered_BTD: Tensor) -> None:
        """Steer each new position once, with the mean of the text up to it; `steered_BTD` is changed in place."""
        entries: list[tuple[int, int, int, int, int]] = []
        for place, index in enumerate(active):
            row, text = current.rows[index], current.text_B[index]
            skipped = max(0, self._first_steered(row) - row.text_count)
            if not row.settings.active or row.exact or skipped >= len(text):
                continue
            assert row.slot is not None
            row.visited_text = True
            counts = range(row.text_count + 1, row.text_count + len(text) + 1)
            entries += [
                (place, index, position, count, row.slot)
                for position, count in zip(text[skipped:], counts[skipped:], strict=True)
            ]
        if not entries:
            return
        place_R, batch_R, position_R, count_R, slot_R = self.tables.send(entries, torch.int64).T
        mean_RD = sums_aTD[place_R, position_R] / count_R[:, None]
        rows = SteeredRows(slot_R, slot_R, torch.ones_like(slot_R, dtype=torch.bool))
        moved_RD = self.tables.step(rows, steered_BTD[batch_R, position_R], mean_RD)
        steered_BTD[batch_R, position_R] = moved_RD

    def _steer_span(self, row: SequenceSteering, added_TD: Tensor) -> None:
        """'exact': one delta, from the mean over all text so far, for all of it, the added tokens included.

        Where a place in the answer says when it begins, what stands before that place is never steered.
        """
        first = self._first_steered(row)
        if row.settings.min_answer_tokens is not None:
            added_TD = added_TD[max(0, first - (row.text_count - len(added_TD))) :]
        row.span.append(added_TD)
        if row.text_sum_D is None or row.text_count <= first:
            return
        mean_1D = row.text_sum_D[None] / row.text_count
        row.span_delta_D = self.tables.delta(mean_1D, self.tables.send([row.slot], torch.int64))[0]
        row.visited_text = True

    @staticmethod
    def _keep_mean(row: SequenceSteering) -> None:
        """One more token of the answer is about to be chosen."""
        assert row.text_sum_D is not None
        mean_D = row.text_sum_D / row.text_count if row.text_count else None
        if row.settings.explain != "tokens":
            row.means.clear()
        row.means.append(mean_D)

    def _first_steered(self, row: SequenceSteering) -> int:
        """The place, among the tokens of a row's text, of the first that is steered."""
        return first_steered_position(
            text_start=0,
            prompt_length=row.prompt_text_tokens,
            min_text_tokens=self._min_text_tokens,
            min_answer_tokens=row.settings.min_answer_tokens,
        )

    @staticmethod
    def _tally_span(row: SequenceSteering) -> Tally:
        if row.span_delta_D is None:
            return Tally(visited=True)
        length, shares = row.span_delta_D.norm(), row.span_shares()
        shifts = shares * length / torch.cat(row.span).float().norm(dim=-1)
        return Tally(
            positions=len(shifts) if float(length) > 0 else 0,
            relative_shift=float(shifts.mean()),
            visited=True,
            visited_text=True,
            clamped=int((shares < 1).sum()),
        )
