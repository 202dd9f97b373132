"""Keys and values of many sequences, one slot each; every row of a batch writes at positions of its own.

Shapes: R slots, B batch rows, H key-value heads, T tokens of this pass, J tokens visible, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_CAPACITY_TOKENS = 128


class SlotCache:
    """A key-value cache that transformers' attention layers can `update`.

    The owner keeps slots 0..n-1 in use by moving the last one into a gap: then a whole batch is a view and nothing is
    copied. Memory grows in powers of two, up to what the running sequences need. A padding token writes beyond its
    row's length; the mask hides it until a real token has overwritten it.
    """

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._rows: list[int] = []
        self._positions_BT: Tensor | None = None
        self._visible = 0
        self._slots = 0
        self._capacity = 0

    def select(self, rows: list[int], positions_BT: Tensor, visible: int) -> None:
        """Announce a pass: batch row b continues slot `rows[b]` at `positions[b]`; keys 0..visible-1 are shown."""
        self._rows, self._positions_BT, self._visible = rows, positions_BT, visible
        self._grow(max(rows) + 1, visible)

    def update(self, key_BHTE: Tensor, value_BHTE: Tensor, layer_idx: int, *_: object) -> tuple[Tensor, Tensor]:
        """Store this pass's keys and values; return all visible ones, [B, H, J, E] each."""
        if layer_idx not in self._layers:
            shape = (self._slots, key_BHTE.shape[1], self._capacity, key_BHTE.shape[3])
            self._layers[layer_idx] = (key_BHTE.new_zeros(shape), value_BHTE.new_zeros(shape))
        rows = torch.tensor(self._rows, device=key_BHTE.device)
        stored = self._layers[layer_idx]
        contiguous = self._rows == list(range(len(self._rows)))
        for store, new_BHTE in zip(stored, (key_BHTE, value_BHTE), strict=True):
            store[rows[:, None], :, self._positions_BT] = new_BHTE.transpose(1, 2)
        if contiguous:
            key, value = (store[: len(self._rows), :, : self._visible] for store in stored)
        else:
            key, value = (store[rows, :, : self._visible] for store in stored)
        return key, value

    def move(self, source: int, target: int) -> None:
        """Copy a slot over another."""
        if source < self._slots:
            for key, value in self._layers.values():
                key[target], value[target] = key[source], value[source]

    def shrink(self, slots: int, capacity: int) -> None:
        """Give back the memory of all but the first slots and positions, in powers of two as it grew."""
        if slots == 0:
            self.clear()
            return
        slots, capacity = _rounded_up(slots, capacity)
        slots, capacity = min(self._slots, slots), min(self._capacity, capacity)
        if (slots, capacity) == (self._slots, self._capacity):
            return
        self._layers = {
            layer: (key[:slots, :, :capacity].clone(), value[:slots, :, :capacity].clone())
            for layer, (key, value) in self._layers.items()
        }
        self._slots, self._capacity = slots, capacity

    def clear(self) -> None:
        """Give all memory back."""
        self._layers.clear()
        self._slots = self._capacity = 0

    def _grow(self, slots: int, capacity: int) -> None:
        if slots <= self._slots and capacity <= self._capacity:
            return
        slots, capacity = _rounded_up(slots, capacity)
        slots, capacity = max(self._slots, slots), max(self._capacity, capacity)
        self._layers = {
            layer: (_enlarged(key, slots, capacity), _enlarged(value, slots, capacity))
            for layer, (key, value) in self._layers.items()
        }
        self._slots, self._capacity = slots, capacity


def _rounded_up(slots: int, capacity: int) -> tuple[int, int]:
    """To powers of two, so that memory moves seldom."""
    return 1 << (slots - 1).bit_length(), max(MIN_CAPACITY_TOKENS, 1 << (capacity - 1).bit_length())


def _enlarged(old_RHCE: Tensor, slots: int, capacity: int) -> Tensor:
    new = old_RHCE.new_zeros(slots, old_RHCE.shape[1], capacity, old_RHCE.shape[3])
    new[: old_RHCE.shape[0], :, : old_RHCE.shape[2]] = old_RHCE
    return new
