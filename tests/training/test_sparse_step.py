"""The sparse step against the equations written with dense tensors and autograd."""

import pytest
import torch
import torch.nn.functional as F

from steering.sparse_autoencoder import DISTANCE_EPSILON, VisionLanguageSAE
from training import sparse_step
from training.losses import reconstruction_error
from training.sparse_step import TrainableVLSAE, top_k

PAIRS, SHARED, CONCEPTS, ACTIVE = 24, 16, 96, 5


def make(dtype=torch.float64, concepts=CONCEPTS, active=ACTIVE):
    torch.manual_seed(0)
    sae = VisionLanguageSAE(SHARED, concepts, active).to(dtype)
    image_NS, text_NS = torch.randn(PAIRS, SHARED, dtype=dtype), torch.randn(PAIRS, SHARED, dtype=dtype) * 3
    return sae, image_NS, text_NS


def dense_loss(sae, image_NS, text_NS):
    loss = 0
    for x_NS, decoder in ((image_NS, sae.vision_decoder), (text_NS, sae.text_decoder)):
        cosine_NK = F.normalize(x_NS, dim=-1) @ F.normalize(sae.encoder, dim=-1).T
        dense_NK = 2 - torch.sqrt(torch.clamp(2 - 2 * cosine_NK, min=DISTANCE_EPSILON))
        top = torch.topk(dense_NK, sae.active_concepts, dim=-1)
        code_NK = torch.zeros_like(dense_NK).scatter(-1, top.indices, top.values)
        loss = loss + reconstruction_error(decoder(code_NK), x_NS)
    return loss


def gradient(parameter):
    assert parameter.grad is not None
    return parameter.grad


def compare(sae, image_NS, text_NS, tolerance, **options):
    expected = dense_loss(sae, image_NS, text_NS)
    expected.backward()
    trainable = TrainableVLSAE(sae, **options)
    step = trainable(image_NS, text_NS)
    step.loss.backward()
    assert step.loss.item() == pytest.approx(expected.item(), rel=tolerance)
    found = {
        "encoder": gradient(trainable.encoder_KS),
        "vision_decoder.weight": gradient(trainable.decoder_2KS)[0::2].T,
        "text_decoder.weight": gradient(trainable.decoder_2KS)[1::2].T,
        "vision_decoder.bias": gradient(trainable.bias_2S)[0],
        "text_decoder.bias": gradient(trainable.bias_2S)[1],
    }
    for name, parameter in sae.named_parameters():
        scale = parameter.grad.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=tolerance * scale, msg=name)
    return step


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_loss_and_gradients_are_the_dense_ones(dtype, tolerance):
    compare(*make(dtype), tolerance)


@pytest.mark.parametrize("active", [1, CONCEPTS])
def test_one_concept_and_all_of_them(active):
    compare(*make(active=active), 1e-11)


def test_a_row_on_a_concept_vector_stays_at_the_floor():
    sae, image_NS, text_NS = make()
    with torch.no_grad():
        image_NS[0] = sae.encoder[3] * 2
        text_NS[5] = sae.encoder[3] + 1e-7 * torch.randn(SHARED)
    assert 2 - 2 * sae.cosines(image_NS[:1])[0, 3] < DISTANCE_EPSILON
    compare(sae, image_NS, text_NS, 1e-11)


def test_a_row_of_zeros_and_a_concept_of_zeros():
    sae, image_NS, text_NS = make(active=CONCEPTS)
    with torch.no_grad():
        image_NS[2] = 0
        sae.encoder[7] = 0
    trainable = TrainableVLSAE(sae)
    loss = trainable(image_NS, text_NS).loss
    assert loss.item() == pytest.approx(dense_loss(sae, image_NS, text_NS).item(), rel=1e-12)
    loss.backward()
    others = torch.arange(CONCEPTS) != 7
    dense_loss(sae, image_NS, text_NS).backward()
    torch.testing.assert_close(gradient(trainable.encoder_KS)[others], gradient(sae.encoder)[others])
    assert torch.isfinite(gradient(trainable.encoder_KS)).all()


def test_use_of_concepts_is_counted_by_modality():
    sae, image_NS, text_NS = make()
    counts_K2 = TrainableVLSAE(sae)(image_NS, text_NS).counts_2K.view(CONCEPTS, 2)
    for column, rows_NS in enumerate((image_NS, text_NS)):
        expected = torch.bincount(sae.encode(rows_NS).concept_ids.flatten(), minlength=CONCEPTS)
        assert torch.equal(counts_K2[:, column], expected.int())


def test_weights_go_out_as_they_came_in():
    sae, _, _ = make()
    for name, tensor in TrainableVLSAE(sae).published().items():
        assert torch.equal(tensor, sae.state_dict()[name]), name
        assert tensor.is_contiguous()


def test_the_product_in_bfloat16_keeps_codes_in_full():
    """Well-separated concepts: the same are found, and their activations are not rounded."""
    torch.manual_seed(0)
    sae = VisionLanguageSAE(SHARED, SHARED, 1)
    with torch.no_grad():
        sae.encoder.copy_(torch.eye(SHARED) + 0.01 * torch.randn(SHARED, SHARED))
    rows_NS = torch.eye(SHARED) + 0.05 * torch.randn(SHARED, SHARED)
    compare(sae, rows_NS, rows_NS.flip(0), 1e-5, bfloat16_product=True)


def near_ties(seed):
    """Rows whose k-th and next concepts differ by less than bfloat16 tells apart: around .2 its steps are .001."""
    torch.manual_seed(seed)
    sae, rows_NS = VisionLanguageSAE(128, 2048, 32), torch.randn(300, 128)
    nearest = sae.cosines(rows_NS).topk(33, dim=1).values
    assert nearest[:, -1].median() > 0.125
    assert (nearest[:, -2] - nearest[:, -1]).median() < 1e-3
    return sae, rows_NS


@torch.no_grad()
def test_the_product_in_bfloat16_finds_the_concepts_that_float32_finds():
    """Of twice as many candidates: none of the nearest is left out for its rounding, but for a row now and then."""
    sae, rows_NS = near_ties(0)
    scale_K = sparse_step._inverse_norms(sae.encoder)
    settings = sparse_step._Settings(32, True, sparse_step._Workspace())
    unit_NS = F.normalize(rows_NS, dim=1)
    cosine_Nk, ids_Nk = sparse_step._nearest_concepts(unit_NS, sae.encoder, scale_K, settings)
    same = (ids_Nk.sort(1).values == sae.encode(rows_NS).concept_ids.sort(1).values).all(1)
    assert same.float().mean() > 0.99
    torch.testing.assert_close(cosine_Nk, sae.cosines(rows_NS).gather(1, ids_Nk), rtol=0, atol=1e-6)


def test_training_in_bfloat16_is_training_in_float32():
    """As far as the codes are the same."""
    sae, rows_NS = near_ties(1)
    losses, gradients = [], []
    for bfloat16_product in (False, True):
        trainable = TrainableVLSAE(sae, bfloat16_product=bfloat16_product)
        step = trainable(rows_NS[:150], rows_NS[150:])
        step.loss.backward()
        losses.append(step.loss.item())
        gradients.append(gradient(trainable.encoder_KS).flatten())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


@pytest.mark.parametrize("active", [1200, 2048])
def test_candidates_are_never_more_than_there_are_concepts(active):
    sae, rows_NS = near_ties(2)
    sae.active_concepts = active
    step = TrainableVLSAE(sae, bfloat16_product=True)(rows_NS[:5], rows_NS[5:10])
    assert int(step.counts_2K.sum()) == 10 * active


@pytest.mark.parametrize(("width", "k"), [(64, 3), (64, 4), (512, 16), (4096, 64), (100, 7)])
def test_top_k_is_torch_topk(width, k):
    torch.manual_seed(width)
    values = torch.randn(9, width)
    values[3] = values[3].round()  # ties
    found, ids = top_k(values, k)
    assert torch.equal(found, torch.topk(values, k, dim=1).values)
    assert torch.equal(values.gather(1, ids), found)
    assert all(len(set(row)) == k for row in ids.tolist())


def test_gradients_add_up_and_start_anew():
    """They share memory from step to step, which nobody must notice."""
    sae, image_NS, text_NS = make()
    trainable = TrainableVLSAE(sae)
    parameters = list(trainable.parameters())

    def step(*pairs):
        trainable(*pairs).loss.backward()
        return [gradient(parameter).clone() for parameter in parameters]

    first = step(image_NS, text_NS)
    for both, one in zip(step(image_NS, text_NS), first, strict=True):
        torch.testing.assert_close(both, 2 * one)
    for _ in range(2):
        trainable.zero_grad(set_to_none=True)
        for again, one in zip(step(image_NS, text_NS), first, strict=True):
            assert torch.equal(again, one)
    trainable.zero_grad(set_to_none=True)
    places = []
    for _ in range(2):
        trainable.zero_grad(set_to_none=True)
        step(text_NS, image_NS)
        places.append([gradient(parameter).data_ptr() for parameter in parameters[:2]])
    assert places[0] == places[1]
