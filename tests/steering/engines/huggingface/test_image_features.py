"""Images that several requests show are encoded once, and their features are the same to the bit however they came."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from PIL import ImageOps

from steering.engines.base import GenerationRequest, Sampling
from steering.engines.huggingface import image_features
from steering.engines.huggingface.batch_runner import BatchRunner
from steering.engines.huggingface.loaded_model import load_model
from steering.engines.preparation import prepare_with_pixels
from steering.request import SteeringRequest, merge_sources
from tests.tiny_models import drawn_image


class Runs:
    """A plain model, and how many pictures its vision tower has seen."""

    def __init__(self, loaded) -> None:
        self.loaded, self.runner, self.seen = loaded, BatchRunner(loaded.model, loaded.decoder, None, 4), 0

    def prefill(self, *requests: GenerationRequest) -> torch.Tensor:
        """Logits [B, V] of all choices; the runner forgets what they leave but for their pictures."""
        prepared = [prepare_with_pixels(self.loaded.checkpoint, one, lambda _event: None) for one in requests]
        with torch.inference_mode():
            return self.runner.prefill([sequence for one in prepared for sequence in one.sequences], 0)

    def request(self, seed: int, *, tenant: str = "", n: int = 1) -> GenerationRequest:
        prompt = self.loaded.checkpoint.processor.tokenizer("USER: <image>\nwhat? ASSISTANT:")["input_ids"]
        return GenerationRequest(
            request_id=str(seed),
            prompt_token_ids=tuple(prompt),
            images=(drawn_image(seed),),
            sampling=Sampling(max_tokens=4, n=n),
            steering=merge_sources(SteeringRequest(enabled=False)),
            tenant=tenant,
        )


@pytest.fixture
def runs(tiny_llava) -> Iterator[Runs]:
    loaded = load_model(str(tiny_llava), None, "cpu", "float32", None)
    made = Runs(loaded)

    def count(_tower, arguments, options) -> None:
        made.seen += len(options.get("pixel_values", arguments[0] if arguments else ()))

    hook = loaded.model.model.vision_tower.register_forward_pre_hook(count, with_kwargs=True)
    yield made
    hook.remove()


def test_several_requests_and_choices_share_a_picture(runs: Runs) -> None:
    logits_BV = runs.prefill(runs.request(1, n=3), runs.request(1), runs.request(2))
    assert runs.seen == 2
    for row_V in logits_BV[1:4]:  # a product may round by where a row lies
        torch.testing.assert_close(row_V, logits_BV[0], atol=1e-5, rtol=0)
    assert not torch.equal(logits_BV[0], logits_BV[4])
    runs.prefill(runs.request(2))
    assert runs.seen == 2, "while the engine is at work"
    runs.runner.clear()
    runs.prefill(runs.request(2))
    assert runs.seen == 3


def test_features_are_the_same_to_the_bit_kept_or_not_and_whoever_is_beside(runs: Runs) -> None:
    batch = [runs.request(seed) for seed in (1, 2, 3)]
    fresh = runs.prefill(*batch)
    assert runs.seen == 3
    assert torch.equal(runs.prefill(*batch), fresh)
    assert runs.seen == 3
    runs.runner.clear()
    runs.prefill(batch[2], batch[1])
    assert torch.equal(runs.prefill(*batch), fresh), "two were encoded in another batch"
    assert runs.seen == 6


def test_nothing_is_kept_for_another_tenant(runs: Runs) -> None:
    runs.prefill(runs.request(1, tenant="a"), runs.request(1, tenant="b"))
    assert runs.seen == 2


def test_the_oldest_go_where_there_is_no_room(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.prefill(runs.request(1))
    [one] = runs.runner._images._kept.values()
    monkeypatch.setattr(image_features, "MAX_KEPT_BYTES", 2 * one.nbytes)
    runs.prefill(runs.request(2), runs.request(1), runs.request(3), runs.request(1))
    assert (runs.seen, len(runs.runner._images._kept)) == (3, 2)
    monkeypatch.setattr(image_features, "MAX_KEPT_BYTES", 1)
    runs.prefill(runs.request(4))
    assert len(runs.runner._images._kept) == 0


def test_other_pixels_are_another_picture(runs: Runs) -> None:
    one = runs.request(1)
    inverted = ImageOps.invert(one.images[0])
    first, second = runs.prefill(one, replace(one, images=(inverted,)))
    assert runs.seen == 2
    assert not torch.equal(first, second)
