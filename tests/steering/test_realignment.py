"""The folded, gathered equations against dense ones written down again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.realignment import FORM_TERMS, Mix, Realignment, exact_float32
from steering.sparse_autoencoder import VisionLanguageSAE

HIDDEN, SHARED, CONCEPTS, ACTIVE = 12, 10, 40, 5


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    return AuxiliaryAutoencoder(HIDDEN, SHARED), VisionLanguageSAE(SHARED, CONCEPTS, ACTIVE)


def mix_of(form, beta_up, beta_down, scale, rows) -> Mix:
    return Mix(*(torch.full((rows, 1), float(value)) for value in (beta_up, beta_down, scale, *FORM_TERMS[form])))


def dense_code(sae, shared_NS):
    unit_x, unit_w = (rows / rows.norm(dim=-1, keepdim=True) for rows in (shared_NS, sae.encoder))
    dense = 2 - (unit_x[:, None] - unit_w[None]).norm(dim=-1)
    keep = dense.topk(ACTIVE).indices
    return torch.zeros_like(dense).scatter(1, keep, dense.gather(1, keep)), dense


@torch.no_grad()
def dense_delta(auxiliary, sae, image, text, beta_up, beta_down, scale, form):
    z_v, a_v = dense_code(sae, auxiliary.vision_projection(image))
    z_t, a_t = dense_code(sae, auxiliary.text_projection(text))
    if form == "union":
        support = (z_v > 0) | (z_t > 0)
        z_v, z_t = torch.where(support, a_v, 0.0), torch.where(support, a_t, 0.0)
    mixed = z_t + beta_up * (z_v - z_t).clamp(min=0) - beta_down * (z_t - z_v).clamp(min=0)
    if form == "published":
        return scale * (auxiliary.text_decoder(sae.text_decoder(mixed)) - text)
    return scale * (mixed - z_t) @ sae.text_decoder.weight.T @ auxiliary.text_decoder.weight.T


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(["published", "difference", "union"]),
    beta_up=st.floats(0, 1),
    beta_down=st.floats(0, 1),
    scale=st.floats(0, 4),
    seed=st.integers(0, 10_000),
)
def test_delta_is_the_dense_equation(parts, form, beta_up, beta_down, scale, seed):
    auxiliary, sae = parts
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(6, HIDDEN, generator=generator) for _ in range(2))
    row = torch.tensor([2, 0, 1, 3, 5, 4])
    realignment = Realignment(auxiliary, sae)
    mix = mix_of(form, beta_up, beta_down, scale, 6)
    got = realignment.delta(text, realignment.encode_image(image), row, mix)
    expected = dense_delta(auxiliary, sae, image[row], text, beta_up, beta_down, scale, form)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_identical_codes_need_no_difference(parts):
    """An image and a text with the same shared representation: nothing to realign."""
    auxiliary, sae = parts
    twin = AuxiliaryAutoencoder(HIDDEN, SHARED)
    twin.load_state_dict(auxiliary.state_dict())
    twin.text_projection.load_state_dict(twin.vision_projection.state_dict())
    realignment, states = Realignment(twin, sae), torch.randn(3, HIDDEN)
    mix = mix_of("difference", 1, 1, 1, 3)
    delta = realignment.delta(states, realignment.encode_image(states), torch.arange(3), mix)
    assert delta.abs().max() < 1e-5


def test_a_long_prefill_in_chunks_is_the_same(parts, monkeypatch):
    realignment = Realignment(*parts)
    image, text = realignment.encode_image(torch.randn(1, HIDDEN)), torch.randn(23, HIDDEN)
    mix = mix_of("published", 0.7, 0.7, 0.7, 23)
    row = torch.zeros(23, dtype=torch.long)
    whole = realignment.delta(text, image, row, mix)
    monkeypatch.setattr("steering.realignment.ROWS_PER_CHUNK", 5)
    torch.testing.assert_close(realignment.delta(text, image, row, mix), whole, atol=1e-6, rtol=1e-5)


def test_rows_of_different_forms_are_one_computation(parts):
    realignment = Realignment(*parts)
    image, text = torch.randn(2, 3, HIDDEN)
    code, row = realignment.encode_image(image), torch.arange(3)
    each = [mix_of(form, 0.5, 0.8, 1.2, 3) for form in FORM_TERMS]
    mixed = Mix(*(torch.stack([one[place] for place, one in enumerate(values)]) for values in zip(*each, strict=True)))
    got = realignment.delta(text, code, row, mixed)
    for place, mix in enumerate(each):
        torch.testing.assert_close(got[place], realignment.delta(text, code, row, mix)[place], atol=1e-6, rtol=1e-5)


def test_float32_is_float32_whatever_the_process_has_set(parts):
    """On a CPU 'medium' lets oneDNN multiply in bfloat16 where the processor can; on a GPU it is TF32."""
    realignment = Realignment(*parts)
    image, text = torch.randn(2, 3, HIDDEN)
    matmul: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    seen = []
    watched = realignment.text_projection.register_forward_hook(lambda *_: seen.append(matmul.fp32_precision))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        set_by_process = matmul.fp32_precision
        realignment.delta(text, realignment.encode_image(image), torch.arange(3), mix_of("union", 1, 1, 1, 3))
        assert seen == ["ieee"]
        assert matmul.fp32_precision == set_by_process != "ieee"
        with pytest.raises(RuntimeError, match="boom"), exact_float32():
            raise RuntimeError("boom")
        assert matmul.fp32_precision == set_by_process
    finally:
        watched.remove()
        torch.set_float32_matmul_precision(before)
