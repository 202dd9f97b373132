import pytest
import torch
import torch.nn.functional as F

from steering.sparse_autoencoder import SparseCode
from training.fitting import quality

CONCEPTS = 40


def apart(rows):
    """Each of a picture of its own."""
    return torch.arange(rows)


def five_texts_each(pictures):
    """As a data set of captions has them, in order."""
    return torch.arange(pictures).repeat_interleave(5)


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
    found = quality.retrieval_of_vectors("shared", image, text, apart(50))
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
    found = quality.retrieval_of_codes("codes", image, text, CONCEPTS, apart(30))
    of_vectors = quality.retrieval_of_vectors("codes", dense(image), dense(text), apart(30))
    assert found == pytest.approx(of_vectors, abs=0.034)
    assert 0.2 < found["retrieval/codes_r1"] < 0.9


def test_codes_that_are_all_alike_find_nothing():
    same = SparseCode(torch.zeros(20, 1, dtype=torch.int64), torch.ones(20, 1))
    assert quality.retrieval_of_codes("codes", same, same, CONCEPTS, apart(20))["retrieval/codes_r10"] == 0
    nothing = SparseCode(same.concept_ids, torch.zeros(20, 1))
    assert quality.retrieval_of_codes("codes", nothing, nothing, CONCEPTS, apart(20))["retrieval/codes_r1"] == 0


def test_retrieval_of_equal_of_rotated_and_of_repeated_rows():
    rows = torch.eye(4)
    assert quality.retrieval_of_vectors("x", rows, rows * 3, apart(4))["retrieval/x_r1"] == 1
    assert quality.retrieval_of_vectors("x", rows, rows.roll(1, 0), apart(4))["retrieval/x_r1"] == 0
    twice = rows[[0, 0, 2, 3]]
    assert quality.retrieval_of_vectors("x", twice, twice, apart(4))["retrieval/x_r1"] == 0.5


@pytest.mark.parametrize("columns", [7, 256])
def test_another_text_of_the_same_picture_is_no_stranger(columns, monkeypatch):
    """Five captions of each picture, all equally near: each is the nearest, unless a stranger is nearer."""
    monkeypatch.setattr(quality, "_COLUMNS", columns)
    torch.manual_seed(0)
    pictures = five_texts_each(12)
    image = torch.randn(12, 6)[pictures]
    text = image + 0.01 * torch.randn(60, 6)
    assert quality.retrieval_of_vectors("x", image, text, pictures)["retrieval/x_r1"] == 1
    assert quality.retrieval_of_vectors("x", image, text, apart(60))["retrieval/x_r1"] < 0.5
    text[2] = image[33] + 0.5 * torch.randn(6)  # a text that is nearer to another picture, on both ways
    found = quality.retrieval_of_vectors("x", image, text, pictures)["retrieval/x_r1"]
    assert found == pytest.approx(1 - 2 / 120)
    code = random_code(12, 5, 0)
    repeated = SparseCode(code.concept_ids[pictures], code.activations[pictures])
    assert quality.retrieval_of_codes("x", repeated, repeated, CONCEPTS, pictures)["retrieval/x_r1"] == 1
    assert quality.retrieval_of_codes("x", repeated, repeated, CONCEPTS, apart(60))["retrieval/x_r1"] == 0


def test_strangers_are_the_next_other_picture():
    assert quality.strangers(torch.tensor([4, 4, 9, 9, 9, 2])).tolist() == [2, 2, 5, 5, 5, 0]
    assert quality.strangers(torch.tensor([1, 7, 1])).tolist() == [1, 2, 1]
    assert quality.strangers(torch.tensor([3, 3, 3])).tolist() == [0, 1, 2], "there are none"
    assert quality.strangers(torch.tensor([3])).tolist() == [0]
    torch.manual_seed(0)
    ids = torch.randint(0, 6, (80,))
    for row, stranger in enumerate(quality.strangers(ids).tolist()):
        order = [(row + shift) % 80 for shift in range(1, 80)]
        assert stranger == next(other for other in order if ids[other] != ids[row])


def test_overlap_is_the_share_in_common_where_all_concepts_are_active():
    first = SparseCode(torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]), torch.ones(2, 4))
    second = SparseCode(torch.tensor([[3, 2, 9, 8], [4, 5, 6, 7]]), torch.ones(2, 4))
    assert quality.overlaps(first, second).tolist() == [0.5, 1.0]
    image = random_code(100, 6, 0)
    assert quality.overlaps(image, image).tolist() == [1.0] * 100


def test_overlap_counts_active_concepts_alone():
    image = SparseCode(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]]))
    text = SparseCode(torch.tensor([[2, 9, 4, 5]]), torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
    assert quality.overlaps(image, text).tolist() == pytest.approx([2 * 1 / (3 + 2)])


def test_pairs_against_strangers():
    image = random_code(50, 4, 0)
    found = quality.overlap_of_pairs(image, image, apart(50))
    gap = 1 - quality.overlaps(image, SparseCode(*(part.roll(-1, 0) for part in image)))
    assert found.paired == 1
    assert found.strangers == pytest.approx(1 - float(gap.mean()))
    assert found.beyond_chance == pytest.approx(float(gap.mean() - 2 * gap.std() / 50**0.5))
    assert found.measures() == {
        "overlap/paired": 1, "overlap/strangers": found.strangers, "overlap/ratio": pytest.approx(1 / found.strangers),
        "overlap/beyond_chance": found.beyond_chance,
    }  # fmt: skip


def test_texts_of_the_same_picture_are_no_strangers():
    """Five captions each, in order: the next row says the same, the next picture something else."""
    pictures = five_texts_each(20)
    code = SparseCode(*(part[pictures] for part in random_code(20, 4, 0)))
    found = quality.overlap_of_pairs(code, code, pictures)
    assert found.paired == 1
    assert found.strangers < 0.3
    assert found.beyond_chance > 0.6
    assert quality.overlap_of_pairs(code, code, apart(100)).strangers > 0.8


def test_of_one_picture_or_one_pair_nothing_is_beyond_chance():
    code = random_code(5, 4, 0)
    assert quality.overlap_of_pairs(code, code, torch.zeros(5, dtype=torch.long)) == (1, 1, 0)
    one = SparseCode(*(part[:1] for part in code))
    assert quality.overlap_of_pairs(one, one, apart(1)).beyond_chance == -float("inf")


def test_what_few_unrelated_pairs_show_is_not_beyond_chance():
    """Codes that have nothing to do with each other: the mean gap is above 0 in half of all draws, `beyond` rarely."""
    found = [
        quality.overlap_of_pairs(random_code(8, 4, 2 * seed), random_code(8, 4, 2 * seed + 1), apart(8))
        for seed in range(200)
    ]
    assert sum(one.paired > one.strangers for one in found) > 60
    assert sum(one.beyond_chance > 0 for one in found) < 15
