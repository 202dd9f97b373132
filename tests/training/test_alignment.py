import pytest
import torch

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.sparse_autoencoder import VisionLanguageSAE
from training.alignment import agrees, measure_alignment


@pytest.mark.parametrize(
    ("paired", "shuffled", "expected"), [(0.31, 0.2, True), (0.29, 0.2, False), (0.1, 0.0, True), (0.0, 0.0, False)]
)
def test_the_gate(paired, shuffled, expected):
    assert agrees(paired, shuffled) is expected


def test_equal_modalities_pass_the_gate_and_unrelated_ones_do_not():
    torch.manual_seed(0)
    auxiliary, sae = AuxiliaryAutoencoder(16, 16), VisionLanguageSAE(16, 64, 4)
    with torch.no_grad():
        auxiliary.text_projection.load_state_dict(auxiliary.vision_projection.state_dict())
    image, other = torch.randn(50, 16), torch.randn(50, 16)
    aligned, strangers = (
        measure_alignment(auxiliary, sae, image, image),
        measure_alignment(auxiliary, sae, image, other),
    )
    assert aligned.paired_overlap == 1.0
    assert aligned.recall_at_1 == 1.0
    assert aligned.passes
    assert not strangers.passes
    assert aligned.as_dict()["pairs"] == 50.0
