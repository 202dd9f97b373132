"""The rows that activate each concept most, out of any number of rows, in memory for K x T of them.

Codes come batch by batch in the order of the store; of rows that show the same thing (equal keys) only the strongest
counts. The result is the same whatever the batches: among equally strong rows the earlier one wins.

Shapes: N rows of a batch, K concepts, k active concepts, T rows kept of each concept, E entries of a batch's codes,
U concepts that a batch has something new for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from steering.sparse_autoencoder import SparseCode

NO_ROW = -1


class StrongestRows:
    """A running top T of each concept."""

    def __init__(self, num_concepts: int, count: int) -> None:
        self.activations_KT = np.zeros((num_concepts, count), dtype=np.float32)
        """Strongest first; 0 where there is no further row."""
        self.rows_KT = np.full((num_concepts, count), NO_ROW, dtype=np.int64)
        """Rows of the store."""
        self._keys_KT = np.zeros((num_concepts, count), dtype=np.int64)

    def add(self, code: SparseCode, first_row: int, keys_N: np.ndarray) -> None:
        """The codes of rows `first_row` and following, none of which was there before."""
        count = self.rows_KT.shape[1]
        if not count:
            return
        concepts_E, activations_E, rows_E, keys_E = self._candidates(code, first_row, keys_N)
        touched_U, place_E = np.unique(concepts_E, return_inverse=True)
        starts_U = np.searchsorted(place_E, np.arange(len(touched_U)))
        rank_E = np.arange(len(place_E)) - starts_U[place_E]
        kept = rank_E < count
        new = _Rows.empty(len(touched_U), count)
        for target, values_E in zip(new, (activations_E, rows_E, keys_E), strict=True):
            target[place_E[kept], rank_E[kept]] = values_E[kept]
        held = _Rows(self.activations_KT[touched_U], self.rows_KT[touched_U], self._keys_KT[touched_U])
        merged = held.merge(new)
        self.activations_KT[touched_U], self.rows_KT[touched_U], self._keys_KT[touched_U] = merged

    def _candidates(self, code: SparseCode, first_row: int, keys_N: np.ndarray) -> tuple[np.ndarray, ...]:
        """Entries that may enter, by concept, strongest first: concept, activation, row, key; no key twice in one."""
        ids_Nk, strengths_Nk = code.concept_ids.cpu().numpy(), code.activations.detach().cpu().float().numpy()
        enters_Nk = strengths_Nk > self.activations_KT[ids_Nk, -1]
        row_E, _ = np.nonzero(enters_Nk)
        concepts_E, activations_E = ids_Nk[enters_Nk], strengths_Nk[enters_Nk]
        entries = [concepts_E, activations_E, row_E + first_row, keys_N[row_E]]
        by_key = np.lexsort((entries[2], -activations_E, entries[3], concepts_E))
        entries = [values[by_key] for values in entries]
        repeated = (np.diff(entries[0]) == 0) & (np.diff(entries[3]) == 0)
        entries = [values[np.concatenate([[True], ~repeated])[: len(values)]] for values in entries]
        order = np.lexsort((entries[2], -entries[1], entries[0]))
        return tuple(values[order] for values in entries)


class _Rows(NamedTuple):
    """Kept rows of some concepts, [U, T] each."""

    activations: np.ndarray
    rows: np.ndarray
    keys: np.ndarray

    @classmethod
    def empty(cls, concepts: int, count: int) -> _Rows:
        shape = (concepts, count)
        return cls(np.zeros(shape, np.float32), np.full(shape, NO_ROW, np.int64), np.zeros(shape, np.int64))

    def merge(self, later: _Rows) -> _Rows:
        """The strongest of both; rows of `later` come after these in the store."""
        mine, its = self.activations.copy(), later.activations.copy()
        same_UTT = self.keys[:, :, None] == later.keys[:, None, :]
        same_UTT &= (mine[:, :, None] > 0) & (its[:, None, :] > 0)
        its_wins_UTT = same_UTT & (its[:, None, :] > mine[:, :, None])
        its[(same_UTT & ~its_wins_UTT).any(1)] = 0
        mine[its_wins_UTT.any(2)] = 0
        both = ((mine, its), (self.rows, later.rows), (self.keys, later.keys))
        activations, rows, keys = (np.concatenate(pair, axis=1) for pair in both)
        order = np.argsort(-activations, axis=1, kind="stable")[:, : mine.shape[1]]
        activations, rows, keys = (np.take_along_axis(values, order, axis=1) for values in (activations, rows, keys))
        return _Rows(activations, np.where(activations > 0, rows, NO_ROW), keys)
