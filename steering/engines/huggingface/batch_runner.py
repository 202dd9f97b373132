"""Runs a steered model over a batch: layers up to the hook once, the tail once or twice. Knows no text, no sampling.

Shapes: B batch rows, T tokens of this pass, J visible tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steering.engines.huggingface.image_features import ImageFeatures
from steering.engines.huggingface.kv_cache import SlotCache
from steering.engines.sampling import blend_branches
from steering.engines.sequence import Sequence
from steering.intervention import Intervention, Pass, SequenceSteering
from steering.lvlm.decoder_layers import Decoder, embed_with_features, place_prompt
from steering.lvlm.families import ImageInputs, find_family, join_image_inputs
from steering.tally import Tally


class Places(NamedTuple):
    """Where the tokens of a pass stand."""

    index_BT: Tensor
    """[B, T] in their sequences: where keys are stored, and what may be seen."""
    rotary_BT: Tensor
    """[B, T] or [3, B, T], as the rotary embedding is told; see `PromptPositions`."""

    def of_rows(self, rows: list[int]) -> Places:
        return Places(index_BT=self.index_BT[rows], rotary_BT=self.rotary_BT[..., rows, :])


class BatchRunner:
    """One model with its caches. Slot i of the caches belongs to sequence i of the caller's running list."""

    def __init__(self, model: Any, decoder: Decoder, intervention: Intervention | None, hook_layer: int) -> None:
        self.model, self.decoder, self.intervention = model, decoder, intervention
        self.device = next(model.parameters()).device
        self._front = range(hook_layer + 1)
        self._tail = range(hook_layer + 1, len(decoder.layers))
        self._images = ImageFeatures(model, self.device)
        self._cache = SlotCache()
        self._base_cache = SlotCache()
        """Tail layers of the base branch, for sequences of two branches."""

    def prefill(self, new: Rows[Sequence], first_slot: int) -> Tensor:
        """Run the prompts of new sequences into slots from `first_slot` on; next-token logits [B, V] float32."""
        lengths = [len(sequence.tokens) for sequence in new]
        tokens_BT = torch.zeros(len(new), max(lengths), dtype=torch.long)
        image_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
        texts = []
        for index, (sequence, length) in enumerate(zip(new, lengths, strict=True)):
            spans = sequence.request.spans
            tokens_BT[index, :length] = torch.tensor(sequence.tokens)
            image_BT[index, list(spans.image_positions)] = True
            texts.append(range(length if spans.text_start is None else spans.text_start, length))
            sequence.steering = SequenceSteering(settings=sequence.request.settings, prompt_text_tokens=len(texts[-1]))
        inputs = join_image_inputs([sequence.request.image_inputs for sequence in new])
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        tokens_BT, image_BT = tokens_BT.to(self.device), image_BT.to(self.device)
        places = self._place_prompts(new, tokens_BT, image_BT, inputs)
        embeds_BTD = embed_with_features(self.model, tokens_BT, image_BT, self._encode_images(new))
        rows = list(range(first_slot, first_slot + len(new)))
        hidden_BTD, base_BTD = self._run_front(new, rows, embeds_BTD, places, image_BT, texts)
        last_B = torch.tensor(lengths, device=self.device) - 1
        steered_BV = self._run_tail(self._cache, rows, hidden_BTD, places, last_B)
        return self._blend(new, rows, steered_BV, base_BTD, places, last_B)

    def decode(self, running: Rows[Sequence]) -> Tensor:
        """One step for all running sequences, each from its last token; next-token logits [B, V] float32."""
        rows = list(range(len(running)))
        tokens_B1 = torch.tensor([[sequence.tokens[-1]] for sequence in running], device=self.device)
        last_B1 = torch.tensor([[len(sequence.tokens) - 1] for sequence in running], device=self.device)
        places = self._place_text(running, last_B1)
        image_B1 = torch.zeros_like(tokens_B1, dtype=torch.bool)
        embeds_B1D = embed_with_features(self.model, tokens_B1, image_B1, None)
        texts = [range(1 if sequence.request.spans.has_image else 0) for sequence in running]
        hidden_B1D, base_B1D = self._run_front(running, rows, embeds_B1D, places, image_B1, texts)
        last_B = torch.zeros(len(running), dtype=torch.long, device=self.device)
        steered_BV = self._run_tail_by_mode(running, rows, hidden_B1D, places, last_B)
        return self._blend(running, rows, steered_BV, base_B1D, places, last_B)

    def tally(self, sequence: Sequence) -> Tally:
        """What was done to a sequence so far."""
        return self.intervention.tally(_state(sequence)) if self.intervention is not None else Tally()

    def move(self, source: int, target: int) -> None:
        """Move a sequence's cache to another slot."""
        self._cache.move(source, target)
        self._base_cache.move(source, target)

    def shrink(self, *, slots: int, tokens: int) -> None:
        """Give back what sequences 0..slots-1 with at most so many tokens do not need, and the latest pass's states."""
        if self.intervention is not None:
            self.intervention.base_BTD = None
        self._images.clear()
        self._cache.shrink(slots, tokens)
        self._base_cache.shrink(slots, tokens)

    def clear(self) -> None:
        """Give the caches' memory back; only when nothing runs."""
        self._images.clear()
        self._cache.clear()
        self._base_cache.clear()

    def _encode_images(self, new: Rows[Sequence]) -> Tensor | None:
        """Features [N, D] of all rows' images; those that several rows show are encoded once."""
        requests = dict.fromkeys(sequence.request for sequence in new if sequence.request.image_inputs)
        features = {request: self._images.of(request) for request in requests}
        rows = [features[sequence.request] for sequence in new if sequence.request in features]
        return torch.cat(rows) if rows else None

    def _place_prompts(self, new: Rows[Sequence], tokens_BT: Tensor, image_BT: Tensor, inputs: ImageInputs) -> Places:
        """Places of prompts padded on the right; each sequence keeps what the tokens behind its prompt will need."""
        rotary_BT, shift_B = place_prompt(self.model, tokens_BT, image_BT, inputs)
        for sequence, shift in zip(new, shift_B.tolist(), strict=True):
            sequence.position_shift = shift
        indices_T = torch.arange(tokens_BT.shape[1], device=self.device)
        return Places(index_BT=indices_T.expand(len(new), -1), rotary_BT=rotary_BT)

    def _place_text(self, sequences: Rows[Sequence], index_BT: Tensor) -> Places:
        """Places of tokens behind the last image of their prompts, or in prompts without any."""
        shifts_B = torch.tensor([sequence.position_shift for sequence in sequences], device=self.device)
        rotary_BT, axes = index_BT + shifts_B[:, None], find_family(self.decoder.family).rotary_axes
        return Places(index_BT=index_BT, rotary_BT=rotary_BT if axes == 1 else rotary_BT.expand(axes, -1, -1))

    def _run_front(
        self,
        sequences: Rows[Sequence],
        rows: list[int],
        embeds: Tensor,
        places: Places,
        image: Tensor,
        texts: list[range],
    ) -> tuple[Tensor, Tensor]:
        """States [B, T, D] after the hook layer: steered, and as they were (the same where no hook is attached)."""
        if self.intervention is not None:
            self.intervention.prepare(Pass(rows=[_state(one) for one in sequences], image_BT=image, text_B=texts))
        hidden_BTD = self._run(self._front, self._cache, rows, embeds, places)
        base_BTD = self.intervention.base_BTD if self.intervention is not None else None
        return hidden_BTD, hidden_BTD if base_BTD is None else base_BTD

    def _run_tail(self, cache: SlotCache, rows: list[int], hidden: Tensor, places: Places, last_B: Tensor) -> Tensor:
        """Logits [B, V] at each row's last token."""
        hidden_BTD = self._run(self._tail, cache, rows, hidden, places)
        return self.decoder.logits(hidden_BTD[torch.arange(len(rows), device=self.device), last_B])

    def _run_tail_by_mode(
        self, running: Rows[Sequence], rows: list[int], hidden: Tensor, places: Places, last_B: Tensor
    ) -> Tensor:
        """All rows run their new token; 'exact' rows then run their span of the text again, over what that gave.

        So the tail sees the same batch whatever its rows' modes are: a row's logits do not depend on its neighbours'.
        """
        logits_BV = self._run_tail(self._cache, rows, hidden, places, last_B)
        states = {row: _state(running[row]) for row in rows}
        spans = {row: state.exact_span() for row, state in states.items() if state.exact}
        spans = {row: span for row, span in spans.items() if span is not None}
        if spans:
            logits_BV[list(spans)] = self._run_spans(running, list(spans), list(spans.values()))
        return logits_BV

    def _run_spans(self, running: Rows[Sequence], exact: list[int], spans: list[Tensor]) -> Tensor:
        hidden_BTD = nn.utils.rnn.pad_sequence(spans, batch_first=True)
        starts = [len(running[row].tokens) - len(span) for row, span in zip(exact, spans, strict=True)]
        starts_B = torch.tensor(starts, device=self.device)
        indices_BT = starts_B[:, None] + torch.arange(hidden_BTD.shape[1], device=self.device)
        places = self._place_text([running[row] for row in exact], indices_BT)
        last_B = torch.tensor([len(span) - 1 for span in spans], device=self.device)
        return self._run_tail(self._cache, exact, hidden_BTD, places, last_B)

    def _blend(
        self, sequences: Rows[Sequence], rows: list[int], steered: Tensor, base: Tensor, places: Places, last: Tensor
    ) -> Tensor:
        """Second branch for the rows that have one; the others' logits are left alone."""
        settings = [sequence.request.settings for sequence in sequences]
        two = [index for index, chosen in enumerate(settings) if chosen.active and chosen.branches == 2]
        if not two:
            return steered
        slots = [rows[index] for index in two]
        base_BV = self._run_tail(self._base_cache, slots, base[two], places.of_rows(two), last[two])
        for index, base_V in zip(two, base_BV, strict=True):
            chosen = settings[index]
            steered[index] = blend_branches(base_V, steered[index], chosen.gamma, chosen.plausibility)
        return steered

    def _run(self, layers: range, cache: SlotCache, rows: list[int], hidden: Tensor, places: Places) -> Tensor:
        visible = int(places.index_BT.max()) + 1
        cache.select(rows, places.index_BT, visible)
        mask_B1TJ = (places.index_BT[..., None] >= torch.arange(visible, device=self.device))[:, None]
        return self.decoder.run(layers, hidden, places.rotary_BT, mask_B1TJ, cache)


def _state(sequence: Sequence) -> SequenceSteering:
    assert sequence.steering is not None, "a sequence is prefilled first"
    return sequence.steering
