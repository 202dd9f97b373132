import math

import pytest
import torch

from training.losses import info_nce, reconstruction_error, unexplained_variance


def straightforward(image, text, ids, temperature, cosine):
    def similarity(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        lengths = math.hypot(*a) * math.hypot(*b) if cosine else 1.0
        return dot / lengths / temperature

    total = 0.0
    for first, second in ((image, text), (text, image)):
        for i, row in enumerate(first):
            weights = [math.exp(similarity(row, other)) for other in second]
            positives = sum(weight for weight, other_id in zip(weights, ids, strict=True) if other_id == ids[i])
            total -= math.log(positives / sum(weights)) / len(first) / 2
    return total


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [0, 1, 0, 2], [5, 5, 5, 5]])
def test_info_nce_is_the_formula(similarity, ids):
    torch.manual_seed(0)
    image, text = torch.randn(4, 3), torch.randn(4, 3)
    expected = straightforward(image.tolist(), text.tolist(), ids, 0.7, similarity == "cosine")
    got = info_nce(image, text, torch.tensor(ids), temperature=0.7, similarity=similarity)
    assert got.item() == pytest.approx(expected, abs=1e-5)


def test_identical_texts_cost_nothing():
    same = torch.zeros(3, dtype=torch.long)
    assert info_nce(torch.randn(3, 4), torch.randn(3, 4), same, temperature=0.07, similarity="cosine") < 1e-6


def test_errors_of_reconstruction():
    original = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    assert reconstruction_error(original + 2, original).item() == pytest.approx(4.0)
    assert unexplained_variance(original, original) == 0.0
    assert unexplained_variance(original.mean(0).expand(2, 2), original) == pytest.approx(1.0)
