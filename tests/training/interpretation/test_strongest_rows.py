"""The running top rows against sorting everything at once."""

import numpy as np
import pytest
import torch

from steering.sparse_autoencoder import SparseCode
from training.interpretation.strongest_rows import NO_ROW, StrongestRows

ROWS, CONCEPTS, ACTIVE, KEPT = 240, 12, 3, 4


def random_codes(seed=0):
    """Few levels of activation and few keys, so that ties and repeated things are common; some activations are 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(CONCEPTS, generator=generator)[:ACTIVE] for _ in range(ROWS)])
    activations = torch.randint(0, 6, (ROWS, ACTIVE), generator=generator) / 5
    return SparseCode(ids, activations), torch.randint(0, 60, (ROWS,), generator=generator).numpy()


def all_at_once(code, keys):
    """[(activation, row)] of each concept: one per key, strongest first, then earliest."""
    best = []
    for concept in range(CONCEPTS):
        rows, places = (code.concept_ids == concept).nonzero(as_tuple=True)
        found = sorted(zip((-code.activations[rows, places]).tolist(), rows.tolist(), strict=True))
        seen, kept = set(), []
        for activation, row in found:
            if activation < 0 and keys[row] not in seen:
                seen.add(keys[row])
                kept.append((-activation, row))
        best.append(kept[:KEPT])
    return best


@pytest.mark.parametrize("batch", [1, 7, 64, ROWS])
@pytest.mark.parametrize("seed", range(4))
def test_batches_give_what_sorting_everything_gives(batch, seed):
    code, keys = random_codes(seed)
    strongest = StrongestRows(CONCEPTS, KEPT)
    for start in range(0, ROWS, batch):
        part = slice(start, start + batch)
        strongest.add(SparseCode(code.concept_ids[part], code.activations[part]), start, keys[part])
    for concept, expected in enumerate(all_at_once(code, keys)):
        rows, activations = strongest.rows_KT[concept].tolist(), strongest.activations_KT[concept].tolist()
        got = [(activation, row) for activation, row in zip(activations, rows, strict=True) if row != NO_ROW]
        assert got == [(pytest.approx(activation), row) for activation, row in expected]
        assert activations[len(got) :] == [0] * (KEPT - len(got))


def test_a_thing_that_comes_again_stronger_counts_once_at_its_best():
    strongest = StrongestRows(1, 2)
    for row, (activation, key) in enumerate([(0.5, 7), (0.4, 8), (0.9, 7), (0.6, 7)]):
        code = SparseCode(torch.tensor([[0]]), torch.tensor([[activation]]))
        strongest.add(code, row, np.array([key]))
    assert strongest.rows_KT.tolist() == [[2, 1]]


def test_no_rows_kept_is_no_error():
    strongest = StrongestRows(3, 0)
    strongest.add(SparseCode(torch.tensor([[0]]), torch.tensor([[1.0]])), 0, np.array([1]))
    assert strongest.rows_KT.shape == (3, 0)
