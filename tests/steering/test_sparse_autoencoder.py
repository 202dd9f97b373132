"""Encoder and decoders of the VL-SAE."""

from __future__ import annotations

import pytest
import torch

from steering.sparse_autoencoder import SparseCode, VisionLanguageSAE, cosine_to_activation


def test_an_orthogonal_concept_has_activation_2_minus_root_2():
    assert cosine_to_activation(torch.tensor(0.0)) == pytest.approx(2 - 2**0.5)
    assert cosine_to_activation(torch.tensor(1.0)) == pytest.approx(2.0, abs=2e-4)
    assert cosine_to_activation(torch.tensor(-1.0)) == pytest.approx(0.0, abs=1e-6)


def test_encode_keeps_the_k_nearest_concepts_strongest_first():
    sae = VisionLanguageSAE(8, 30, 4)
    x = torch.randn(5, 8)
    code = sae.encode(x)
    distances = torch.cdist(torch.nn.functional.normalize(x), torch.nn.functional.normalize(sae.encoder))
    assert torch.equal(code.concept_ids, distances.topk(4, largest=False).indices)
    torch.testing.assert_close(2 - code.activations, distances.topk(4, largest=False).values, atol=1e-5, rtol=1e-5)


def test_decode_gathers_what_the_dense_decoder_computes():
    sae = VisionLanguageSAE(8, 30, 4)
    code = SparseCode(torch.tensor([[3, 7, 1, 29]]), torch.tensor([[1.0, 0.5, 0.25, 2.0]]))
    dense = torch.zeros(1, 30)
    dense[0, code.concept_ids[0]] = code.activations[0]
    torch.testing.assert_close(sae.decode(code, "image"), sae.vision_decoder(dense))
    torch.testing.assert_close(sae.decode(code, "text"), sae.text_decoder(dense))


def test_gradients_reach_every_parameter_even_where_a_row_meets_its_concept():
    sae = VisionLanguageSAE(8, 30, 4)
    x = torch.cat([sae.encoder[:1].detach(), torch.randn(6, 8)])
    image, text = sae(x, x)
    (image.square().sum() + text.square().sum()).backward()
    for parameter in sae.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0


def test_more_active_concepts_than_there_are_is_refused():
    with pytest.raises(ValueError, match="active_concepts is 31"):
        VisionLanguageSAE(8, 30, 31)


def test_concept_vectors_begin_about_as_long_as_the_authors_do():
    """Kaiming-uniform entries: in training a vector's length divides its steps, in serving it is of no account."""
    torch.manual_seed(0)
    encoder = VisionLanguageSAE(256, 512, 4).encoder.detach()
    assert float(encoder.abs().max()) == pytest.approx(256**-0.5, rel=1e-3)
    torch.testing.assert_close(encoder.norm(dim=1), torch.full((512,), 3**-0.5), atol=0.06, rtol=0)
