"""Settings, image codes and tallies of all sequences, as tensors with one row ('slot') per sequence.

A step gathers from them, so its cost does not grow with the number of Python objects in the batch.

Shapes: M slots, R steered rows, D hidden size, K concepts, k active concepts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steering.engines.vllm.plugin.batch import SequenceState, Step
from steering.engines.vllm.plugin.wire import WireSteering
from steering.intervention import random_direction
from steering.realignment import ImageCode, MixParameters, Realignment
from steering.request import Form


class SlotTables:
    """Grows with the number of sequences; a slot is written anew by its next sequence."""

    _concept_ids: Tensor
    _cosines: Tensor
    _active: Tensor
    """Image codes: [M, k] int64, [M, K] float32, [M, K] bool."""
    _settings: Tensor
    """[M, 4] float32: beta_up, beta_down, scale, sign."""
    _positions: Tensor
    _shift: Tensor
    """Tallies: [M] int64, [M] float32."""

    def __init__(self, realignment: Realignment, control_image_MD: Tensor, device: torch.device) -> None:
        self.realignment, self._control_image_MD, self._device = realignment, control_image_MD, device
        self._slots = 0
        self._directions: dict[int, Tensor] = {}
        """By slot: unit direction of the control `random`."""
        self._grow(8)

    def _grow(self, slots: int) -> None:
        old, self._slots = self._slots, slots
        concepts, active = self.realignment.num_concepts, self.realignment.active_concepts
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "_concept_ids": ((slots, active), torch.int64),
            "_cosines": ((slots, concepts), torch.float32),
            "_active": ((slots, concepts), torch.bool),
            "_settings": ((slots, 4), torch.float32),
            "_positions": ((slots,), torch.int64),
            "_shift": ((slots,), torch.float32),
        }
        for name, (shape, dtype) in shapes.items():
            table = torch.zeros(shape, dtype=dtype, device=self._device)
            if old:
                table[:old] = getattr(self, name)
            setattr(self, name, table)

    def set_image(self, state: SequenceState, pooled_D: Tensor) -> None:
        """A sequence's image is known, [D] float32: encode it, once, and take over the sequence's settings."""
        slot, wire = state.slot, state.wire
        while slot >= self._slots:
            self._grow(2 * self._slots)
        self._directions.pop(slot, None)
        if wire.control == "other_image":
            pooled_D = self._control_image_MD[wire.control_seed % len(self._control_image_MD)]
        elif wire.control == "random":
            self._directions[slot] = random_direction(pooled_D, wire.control_seed)
        code = self.realignment.encode_image(pooled_D[None])
        self._concept_ids[slot], self._cosines[slot], self._active[slot] = (part[0] for part in code)
        self._settings[slot] = torch.tensor(_settings(wire), device=self._device)
        self._positions[slot], self._shift[slot] = 0, 0

    def delta(self, step: Step, mean_RD: Tensor) -> Tensor:
        """Changes [R, D] of a step's steered rows, whose text means these are; float32."""
        slots = [state.slot for state in step.states]
        slot_R = torch.tensor([slots[place] for place in step.state_R], device=self._device)
        settings_R = self._settings[slot_R]
        delta_RD = torch.zeros_like(mean_RD)
        forms: list[Form] = list(dict.fromkeys(state.wire.form for state in step.states))
        for form in forms:
            chosen = slice(None)
            if len(forms) > 1:
                mine = [step.states[place].wire.form == form for place in step.state_R]
                chosen = torch.tensor(mine, device=self._device).nonzero()[:, 0]
            mix = MixParameters(*settings_R[chosen, :3].T)
            delta_RD[chosen] = self.realignment.delta(mean_RD[chosen], self._codes, slot_R[chosen], mix, form)
        delta_RD *= settings_R[:, 3:4]
        for place, state in enumerate(step.states):
            if state.slot in self._directions:
                mine_R = torch.tensor([one == place for one in step.state_R], device=self._device)
                lengths = delta_RD[mine_R].norm(dim=-1, keepdim=True)
                delta_RD[mine_R] = lengths * self._directions[state.slot]
        return delta_RD

    @property
    def _codes(self) -> ImageCode:
        return ImageCode(self._concept_ids, self._cosines, self._active)

    def rehearse(self, mean_ND: Tensor) -> None:
        """Encode and decode [N, D] float32 for nobody: takes the memory that a long prefill takes."""
        code = self.realignment.encode_image(mean_ND[:1])
        nobody_N = torch.zeros(len(mean_ND), dtype=torch.int64, device=self._device)
        mix = MixParameters(*torch.ones(3, len(mean_ND), device=self._device))
        self.realignment.delta(mean_ND, code, nobody_N, mix, "union")

    def tally(self, step: Step, stream_RD: Tensor, delta_RD: Tensor) -> None:
        """Count the positions that were changed and sum |delta| / |h| over them, sequence by sequence."""
        counts_R = torch.tensor(step.counts_R, device=self._device)
        shift_R = delta_RD.norm(dim=-1) / stream_RD.norm(dim=-1) * counts_R
        slots = [state.slot for state in step.states]
        slot_R = torch.tensor([slots[place] for place in step.state_R], device=self._device)
        self._shift.index_add_(0, slot_R, shift_R)
        self._positions.index_add_(0, slot_R, (shift_R > 0).long())

    def counted(self, slot: int) -> tuple[int, float]:
        """Positions of a sequence that were changed, and the sum of their relative shifts."""
        return int(self._positions[slot]), float(self._shift[slot])


def _settings(wire: WireSteering) -> list[float]:
    """beta_up, beta_down, scale, sign."""
    return [wire.beta_up, wire.beta_down, wire.scale, -1.0 if wire.control == "reversed" else 1.0]
