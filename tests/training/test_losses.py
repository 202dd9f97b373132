import math

import pytest
import torch

from training.losses import info_nce, reconstruction_error, unexplained_variance


def straightforward(image, text, text_ids, image_ids, temperature, cosine):
    def similarity(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        lengths = math.hypot(*a) * math.hypot(*b) if cosine else 1.0
        return dot / lengths / temperature

    total = 0.0
    for first, second in ((image, text), (text, image)):
        for i, row in enumerate(first):
            weights = [math.exp(similarity(row, other)) for other in second]
            positives = sum(
                weight for j, weight in enumerate(weights) if text_ids[j] == text_ids[i] or image_ids[j] == image_ids[i]
            )
            total -= math.log(positives / sum(weights)) / len(first) / 2
    return total


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize(
    ("text_ids", "image_ids"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3]),
        ([0, 1, 0, 2], [0, 1, 2, 3]),
        ([0, 1, 2, 3], [7, 8, 8, 7]),
        ([0, 1, 0, 2], [5, 5, 6, 7]),
        ([0, 1, 2, 3], [3, 2, 1, 0]),
        ([5, 5, 5, 5], [0, 1, 2, 3]),
    ],
)
def test_info_nce_is_the_formula(similarity, text_ids, image_ids):
    """Rows of one text or of one picture are positives; a text's number and a picture's are never compared."""
    torch.manual_seed(0)
    image, text = torch.randn(4, 3), torch.randn(4, 3)
    expected = straightforward(image.tolist(), text.tolist(), text_ids, image_ids, 0.7, similarity == "cosine")
    ids = torch.tensor(text_ids), torch.tensor(image_ids)
    got = info_nce(image, text, *ids, temperature=0.7, similarity=similarity)
    assert got.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("which", ["texts", "pictures"])
def test_identical_texts_or_pictures_cost_nothing(which):
    same, different = torch.zeros(3, dtype=torch.long), torch.arange(3)
    ids = (same, different) if which == "texts" else (different, same)
    assert info_nce(torch.randn(3, 4), torch.randn(3, 4), *ids, temperature=0.07, similarity="cosine") < 1e-6


def test_errors_of_reconstruction():
    original = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    assert reconstruction_error(original + 2, original).item() == pytest.approx(4.0)
    assert unexplained_variance(original, original) == 0.0
    assert unexplained_variance(original.mean(0).expand(2, 2), original) == pytest.approx(1.0)
