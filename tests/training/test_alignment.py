import torch

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.sparse_autoencoder import SparseCode, VisionLanguageSAE
from training.alignment import code_overlap, measure_alignment, recall_at_1


def test_code_overlap_counts_common_concepts():
    first = SparseCode(torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]), torch.ones(2, 4))
    second = SparseCode(torch.tensor([[3, 2, 9, 8], [4, 5, 6, 7]]), torch.ones(2, 4))
    assert code_overlap(first, second) == 0.75


def test_recall_at_1_of_equal_and_of_rotated_rows():
    rows = torch.eye(4)
    assert recall_at_1(rows, rows * 3) == 1.0
    assert recall_at_1(rows, rows.roll(1, 0)) == 0.0


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
