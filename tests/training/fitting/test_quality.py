import pytest
import torch
import torch.nn.functional as F

from steering.sparse_autoencoder import SparseCode
from training.fitting import quality

CONCEPTS = 40


def random_code(rows, active, seed):
    torch.manual_seed(seed)
    ids = torch.stack([torch.randperm(CONCEPTS)[:active] for _ in range(rows)])
    return SparseCode(ids, torch.rand(rows, active))


def dense(code):
    return torch.zeros(len(code.concept_ids), CONCEPTS).scatter_(1, code.concept_ids, code.activations)


def test_reconstruction():
    original = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    perfect = quality.reconstruction_quality("image", original, original)
    assert perfect == {"image/explained_variance": 1, "image/fvu": 0, "image/cosine": pytest.approx(1), "image/mse": 0}
    mean = quality.reconstruction_quality("image", original.mean(0).expand(2, 2), original)
    assert (mean["image/fvu"], mean["image/explained_variance"]) == (1, 0)
    assert mean["image/mse"] == pytest.approx(0.5)


@pytest.mark.parametrize("columns", [7, 256])
def test_retrieval_is_what_one_counts(columns, monkeypatch):
    monkeypatch.setattr(quality, "_COLUMNS", columns)
    torch.manual_seed(0)
    image = torch.randn(50, 6)
    text = image + 0.8 * torch.randn(50, 6)
    found = quality.retrieval_of_vectors("shared", image, text)
    cosines = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    for rank in (1, 10):
        hits = [
            (matrix.topk(rank, dim=1).indices == torch.arange(50)[:, None]).any(1).float().mean()
            for matrix in (cosines, cosines.T)
        ]
        assert 0.1 < float(sum(hits)) / 2 < 1
        assert found[f"retrieval/shared_r{rank}"] == pytest.approx(float(sum(hits)) / 2)


@pytest.mark.parametrize("columns", [7, 256])
def test_retrieval_of_codes_is_that_of_their_vectors(columns, monkeypatch):
    monkeypatch.setattr(quality, "_COLUMNS", columns)
    image, other = random_code(30, 5, 0), random_code(30, 5, 1)
    text = SparseCode(torch.where(torch.rand(30, 1) < 0.5, image.concept_ids, other.concept_ids), other.activations)
    found = quality.retrieval_of_codes("codes", image, text, CONCEPTS)
    assert found == pytest.approx(quality.retrieval_of_vectors("codes", dense(image), dense(text)), abs=0.034)
    assert 0.2 < found["retrieval/codes_r1"] < 0.9


def test_codes_that_are_all_alike_find_nothing():
    same = SparseCode(torch.zeros(20, 1, dtype=torch.int64), torch.ones(20, 1))
    assert quality.retrieval_of_codes("codes", same, same, CONCEPTS)["retrieval/codes_r10"] == 0
    nothing = SparseCode(same.concept_ids, torch.zeros(20, 1))
    assert quality.retrieval_of_codes("codes", nothing, nothing, CONCEPTS)["retrieval/codes_r1"] == 0


def test_retrieval_of_equal_of_rotated_and_of_repeated_rows():
    rows = torch.eye(4)
    assert quality.retrieval_of_vectors("x", rows, rows * 3)["retrieval/x_r1"] == 1
    assert quality.retrieval_of_vectors("x", rows, rows.roll(1, 0))["retrieval/x_r1"] == 0
    twice = rows[[0, 0, 2, 3]]
    assert quality.retrieval_of_vectors("x", twice, twice)["retrieval/x_r1"] == 0.5


def test_overlap_is_the_share_in_common_where_all_concepts_are_active():
    first = SparseCode(torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]), torch.ones(2, 4))
    second = SparseCode(torch.tensor([[3, 2, 9, 8], [4, 5, 6, 7]]), torch.ones(2, 4))
    assert quality.overlap(first, second) == 0.75
    image = random_code(100, 6, 0)
    assert quality.overlap(image, image) == 1


def test_overlap_counts_active_concepts_alone():
    image = SparseCode(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]]))
    text = SparseCode(torch.tensor([[2, 9, 4, 5]]), torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
    assert quality.overlap(image, text) == pytest.approx(2 * 1 / (3 + 2))


def test_pairs_against_strangers():
    image = random_code(50, 4, 0)
    found = quality.overlap_of_pairs(image, image)
    assert found["overlap/paired"] == 1
    assert found["overlap/shuffled"] == pytest.approx(
        quality.overlap(image, SparseCode(*(p.roll(1, 0) for p in image)))
    )
    assert found["overlap/ratio"] == pytest.approx(1 / found["overlap/shuffled"])
