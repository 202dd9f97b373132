import pytest
import torch

from training.alignment import measure_alignment
from training.representations import Representations
from training.train_auxiliary_autoencoder import (
    AuxiliaryTraining,
    auxiliary_loss,
    describe,
    train_auxiliary_autoencoder,
)
from training.train_sparse_autoencoder import SparseTraining, shared_representations, train_sparse_autoencoder

AUXILIARY = AuxiliaryTraining(
    shared_size=16, contrastive_weight=0.1, learning_rate=1e-2, batch_size=64, epochs=60, weight_decay=0.0
)


@pytest.fixture(scope="module")
def pairs():
    """Two noisy views of the same eight hidden numbers, each with an offset of its own."""
    torch.manual_seed(0)
    content = torch.randn(400, 8)
    image, text = torch.randn(8, 24), torch.randn(8, 24)
    return Representations(
        image_ND=content @ image + 5.0 + 0.05 * torch.randn(400, 24),
        text_ND=content @ text - 3.0 + 0.05 * torch.randn(400, 24),
        texts=tuple(str(row) for row in range(400)),
        image_references=tuple(str(row) for row in range(400)),
    )


def quiet(line):
    pass


def test_training_aligns_and_rebuilds(pairs):
    training, held_out = pairs.split(100)
    auxiliary = train_auxiliary_autoencoder(training, AUXILIARY, quiet)
    sae = train_sparse_autoencoder(
        *shared_representations(auxiliary, training),
        SparseTraining(num_concepts=64, active_concepts=8, learning_rate=1e-2, batch_size=64, epochs=15),
        quiet,
    )
    found = measure_alignment(auxiliary, sae, held_out.image_ND, held_out.text_ND)
    assert found.recall_at_1 > 0.9
    assert found.passes
    assert found.image_unexplained < 0.5
    assert found.text_unexplained < 0.5
    assert "R@1 of 100" in describe(auxiliary, held_out)


def test_the_same_seed_gives_the_same_weights(pairs):
    settings = AUXILIARY.model_copy(update={"epochs": 1})
    first, second = (train_auxiliary_autoencoder(pairs, settings, quiet) for _ in range(2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def test_the_loss_without_contrast_is_the_two_errors(pairs):
    auxiliary = train_auxiliary_autoencoder(pairs, AUXILIARY.model_copy(update={"epochs": 1}), quiet)
    settings = AUXILIARY.model_copy(update={"contrastive_weight": 0.0})
    loss = auxiliary_loss(auxiliary, pairs.image_ND, pairs.text_ND, pairs.text_ids_N, settings)
    image_NS, text_NS = auxiliary(pairs.image_ND, pairs.text_ND)
    image_back, text_back = auxiliary.reconstruct(image_NS, text_NS)
    expected = (image_back - pairs.image_ND).square().mean() + (text_back - pairs.text_ND).square().mean()
    torch.testing.assert_close(loss, expected)
