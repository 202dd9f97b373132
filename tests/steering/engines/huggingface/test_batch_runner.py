"""Batches of one fixed composition: what a neighbour does must not reach a row, not even in its last bit."""

from __future__ import annotations

import pytest
import torch

from steering.engines.base import GenerationRequest, Sampling
from steering.engines.huggingface.batch_runner import BatchRunner
from steering.engines.huggingface.loaded_model import load_model
from steering.engines.preparation import prepare_with_pixels
from steering.hooks import output_hook
from steering.intervention import Intervention
from steering.request import SteeringRequest, merge_sources
from tests.tiny_models import drawn_image

STEPS = 6
TOKENS = [[7, 30, 41], [8, 31, 42], [9, 32, 43], [10, 33, 44]]


def request(loaded, seed: int, steering: dict) -> GenerationRequest:
    token_ids = loaded.checkpoint.processor.tokenizer(f"USER: <image>\n{'x' * seed} ASSISTANT:")["input_ids"]
    return GenerationRequest(
        request_id=str(seed),
        prompt_token_ids=tuple(token_ids),
        images=(drawn_image(seed),),
        sampling=Sampling(max_tokens=20),
        steering=merge_sources(SteeringRequest(**steering)),
    )


@torch.inference_mode()
def logits_of_first(loaded, runner, steering: list[dict]) -> torch.Tensor:
    """Row 0's logits over prefill and some steps with given tokens, [1 + steps, V]."""
    sequences = [
        prepare_with_pixels(loaded.checkpoint, request(loaded, seed, one), lambda _event: None).sequences[0]
        for seed, one in enumerate(steering)
    ]
    rows = [runner.prefill(sequences, 0)[0]]
    for step in range(STEPS):
        for sequence, tokens in zip(sequences, TOKENS, strict=True):
            sequence.tokens.append(tokens[step % 3])
        rows.append(runner.decode(sequences)[0])
    return torch.stack(rows)


def test_an_off_row_has_the_plain_model_s_logits_bit_for_bit(tiny_llava, tiny_artifact):
    off, neighbours = {"enabled": False}, [{"strength": 1.0}, {"strength": 1.0, "gamma": 0.5}, {"mode": "exact"}]
    plain = load_model(str(tiny_llava), None, "cpu", "float32", None)
    plain_logits = logits_of_first(plain, BatchRunner(plain.model, plain.decoder, None, 4), [{}] * 4)

    loaded = load_model(str(tiny_llava), tiny_artifact, "cpu", "float32", None)
    assert loaded.checkpoint.artifact is not None
    intervention = Intervention(loaded.checkpoint.artifact, loaded.model.device)
    runner = BatchRunner(loaded.model, loaded.decoder, intervention, loaded.checkpoint.artifact.config.hook_layer)
    with output_hook(loaded.decoder.layers[loaded.checkpoint.artifact.config.hook_layer], intervention):
        beside_off = logits_of_first(loaded, runner, [off] * 4)
        beside_steered = logits_of_first(loaded, runner, [off, *neighbours])
        strength_0 = logits_of_first(loaded, runner, [{"strength": 0.0}, *neighbours])
        steered = logits_of_first(loaded, runner, [{"strength": 1.0}, *neighbours])
    assert torch.equal(beside_off, plain_logits)
    assert torch.equal(beside_steered, plain_logits)
    assert torch.equal(strength_0, plain_logits)
    assert not torch.allclose(steered, plain_logits, atol=1e-2)


@pytest.mark.parametrize("mode", ["causal", "exact"])
@pytest.mark.parametrize(
    ("wait", "steered_tokens"),
    [(None, None), (0, 1), (2, 0)],
    ids=["from the text's beginning", "from the prompt's last token", "two tokens into the answer"],
)
def test_image_positions_and_what_stands_before_steering_begins_are_left_alone(
    tiny_llava, tiny_artifact, mode, wait, steered_tokens
):
    loaded = load_model(str(tiny_llava), tiny_artifact, "cpu", "float32", None)
    assert loaded.checkpoint.artifact is not None
    layer, seen = loaded.checkpoint.artifact.config.hook_layer, {}
    intervention = Intervention(loaded.checkpoint.artifact, loaded.model.device)

    def watch(hidden: torch.Tensor) -> torch.Tensor:
        seen["steered"] = intervention(hidden)
        seen["base"] = hidden
        return seen["steered"]

    runner = BatchRunner(loaded.model, loaded.decoder, intervention, layer)
    asked = request(loaded, 3, {"mode": mode, "min_answer_tokens": wait})
    sequence = prepare_with_pixels(loaded.checkpoint, asked, lambda _event: None).sequences[0]
    with output_hook(loaded.decoder.layers[layer], watch), torch.inference_mode():
        runner.prefill([sequence], 0)
    text_start = sequence.request.spans.text_start
    assert text_start is not None
    length = len(sequence.tokens)
    expected = length - text_start if steered_tokens is None else steered_tokens
    changed = (seen["steered"] != seen["base"])[0].any(-1)
    assert changed.tolist() == [False] * (length - expected) + [True] * expected
