"""LLaVA-NeXT and Qwen2.5-VL on the engine: against plain transformers, and against the equations."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
import torch
from PIL import ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor

from steering.artifact import load_artifact
from steering.engines.base import GenerationRequest, Sampling
from steering.engines.huggingface.engine import HuggingFaceEngine
from steering.errors import BadArtifact, InvalidSteering
from steering.hooks import steer
from steering.lvlm.families import find_family
from steering.request import SteeringRequest, merge_sources
from steering.settings import resolve
from tests.steering.engines.driving import chat_text, send
from tests.steering.reference import next_token_logprobs
from tests.tiny_models import drawn_image

SETTINGS = [
    {"form": form, "mode": mode, "alpha": 1.5, "beta_up": 0.7, "beta_down": 0.9, "strength": 0.8} | branches
    for form, mode, branches in itertools.product(
        ("published", "difference", "union"),
        ("causal", "exact"),
        ({"gamma": 1.0, "plausibility": 0.0}, {"gamma": 0.6, "plausibility": 0.3}),
    )
]
SIZES = [((24, 20),), ((100, 31),), ((31, 100), (64, 64)), ((64, 64), (31, 100)), ((200, 120), (20, 20), (45, 90))]
"""Images of a request, width and height each."""
SHIFT_FLOOR = 0.01


@pytest_asyncio.fixture
async def engine(tiny_family, tiny_family_artifact):
    engine = HuggingFaceEngine(tiny_family, tiny_family_artifact)
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture(scope="module")
def plain(tiny_family) -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(tiny_family, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval(), AutoProcessor.from_pretrained(tiny_family)


def drawn(sizes):
    return tuple(drawn_image(7 * index + sum(size), size) for index, size in enumerate(sizes))


def family_request(engine, sizes, text: str = "what is this?", steering: dict | None = None, **sampling):
    """A request in the checkpoint's own chat template, every logprob asked for."""
    tokenizer = engine.processor.tokenizer
    prompt = tokenizer(chat_text(engine.processor, len(sizes), text), add_special_tokens=False)["input_ids"]
    wanted: dict[str, Any] = {"max_tokens": 5, "temperature": 0.0, "top_logprobs": len(tokenizer)} | sampling
    return GenerationRequest(
        request_id=f"{sizes}-{text}-{steering}",
        prompt_token_ids=tuple(prompt),
        images=drawn(sizes),
        sampling=Sampling(**wanted),
        steering=merge_sources(SteeringRequest(**(steering or {}))),
    )


def processed(processor, request):
    """Prompt and images through the checkpoint's own processor."""
    text = processor.tokenizer.decode(request.prompt_token_ids)
    images = list(request.images) or None
    return processor(images=images, text=[text], add_special_tokens=False, return_tensors="pt")


def dense(logprobs: dict[int, float]) -> torch.Tensor:
    return torch.tensor([logprobs[token] for token in range(len(logprobs))])


def assert_matches_reference(plain, artifact, request, answer):
    """Every step's full logprobs, teacher-forced on the engine's own tokens."""
    model, processor = plain
    settings = resolve(request.steering, presets=artifact.config.presets, default_preset="captions", has_image=True)
    inputs = processed(processor, request)
    prompt = inputs["input_ids"][0].tolist()
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes", "image_grid_thw") if name in inputs}
    generated: list[int] = []
    assert len(answer.logprobs()) >= 3
    for token, logprobs in zip(answer.tokens(), answer.logprobs(), strict=True):
        expected = next_token_logprobs(model, artifact, settings, prompt, generated, images, 1)
        torch.testing.assert_close(dense(logprobs), expected.clamp(min=-9999.0), atol=1e-4, rtol=0)
        generated.append(token)


async def test_strength_0_alone_and_in_a_batch_is_plain_transformers_generate(engine, plain):
    """Images of all shapes, several, and none; side by side float32 sums in another order."""
    requests = [
        family_request(engine, sizes, "x" * 3 * index, {"strength": 0.0} if sizes else None, max_tokens=12)
        for index, sizes in enumerate([*SIZES, ()])
    ]
    together = await asyncio.gather(*(send(engine, request) for request in requests))
    model, processor = plain
    for request, beside_others in zip(requests, together, strict=True):
        alone = await send(engine, request)
        inputs = processed(processor, request)
        made = model.generate(
            **inputs, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        new_tokens = made.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        for answer, tolerance in ((alone, 1e-5), (beside_others, 1e-4)):
            assert answer.end.prompt_tokens == inputs["input_ids"].shape[1]
            assert answer.tokens() == new_tokens[: len(answer.tokens())]
            assert len(answer.logprobs()) >= 3
            for ours, logits in zip(answer.logprobs(), made.logits, strict=False):
                torch.testing.assert_close(dense(ours), logits[0].log_softmax(-1), atol=tolerance, rtol=0)


def ending_at_its_image(engine, settings) -> GenerationRequest:
    request = family_request(engine, SIZES[1], steering=settings)
    behind = request.prompt_token_ids[::-1].index(engine.processor.image_token_id)
    return replace(request, request_id=f"cut {settings}", prompt_token_ids=request.prompt_token_ids[:-behind])


@pytest.mark.slow
async def test_steered_requests_of_all_kinds_in_one_batch_follow_the_equations(engine, plain, tiny_family_artifact):
    """All forms, modes and branch counts with one to three images; more than a batch of prompts holds."""
    requests = [
        family_request(engine, sizes, "x" * (5 * index), settings, max_tokens=4 + index % 3)
        for index, (settings, sizes) in enumerate(zip(SETTINGS, itertools.cycle(SIZES), strict=False))
    ]
    requests += [ending_at_its_image(engine, settings) for settings in (SETTINGS[0], SETTINGS[3])]
    requests += [
        family_request(engine, SIZES[wait], "from here on", settings | {"min_answer_tokens": wait})
        for wait, settings in enumerate(SETTINGS[:4])
    ]
    requests.append(ending_at_its_image(engine, SETTINGS[2] | {"min_answer_tokens": 0}))
    text_only = family_request(engine, (), "hello")
    answers = await asyncio.gather(*(send(engine, request) for request in [text_only, *requests]))
    artifact = load_artifact(tiny_family_artifact)
    assert answers[0].end.receipt.reason == "no_image"
    for request, answer in zip(requests, answers[1:], strict=True):
        assert answer.end.receipt.applied
        assert answer.end.receipt.relative_shift[0] > SHIFT_FLOOR
        assert_matches_reference(plain, artifact, request, answer)


async def test_positions_are_those_behind_the_last_image(engine):
    request = family_request(engine, SIZES[2], steering={"strength": 1.0}, max_tokens=4)
    answer = await send(engine, request)
    image_token = engine.processor.image_token_id
    behind = request.prompt_token_ids[::-1].index(image_token)
    assert answer.end.receipt.positions == [behind + answer.end.completion_tokens[0] - 1]


async def test_every_pass_tells_the_rotary_embedding_all_of_its_axes(engine):
    """Not every version of transformers in our range makes three positions of one."""
    decoder, seen = engine._runner.decoder, []
    handle = decoder.rotary.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["position_ids"].shape), with_kwargs=True
    )
    await send(engine, family_request(engine, SIZES[2], steering={"mode": "exact"}, max_tokens=3))
    handle.remove()
    axes = find_family(decoder.family).rotary_axes
    assert {shape[-1] == 1 for shape in seen} == {True, False}
    assert all(len(shape) == 2 if axes == 1 else shape[0] == axes for shape in seen)


async def test_the_library_alone_steers_as_the_engine_does(engine, plain, tiny_family_artifact):
    asked = {"strength": 1.0, "form": "published", "alpha": 1.5}
    request = family_request(engine, SIZES[2], steering=asked, max_tokens=10)
    model, processor = plain
    inputs = processed(processor, request)

    def generate():
        made = model.generate(
            **inputs, max_new_tokens=10, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return made.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.stack(made.logits)[:, 0]

    before, before_logits = generate()
    with steer(model, load_artifact(tiny_family_artifact), SteeringRequest(**asked)) as steering:
        tokens, logits = generate()
    after, after_logits = generate()
    answer = await send(engine, request)
    assert answer.tokens() == tokens[: len(answer.tokens())]
    for ours, theirs in zip(answer.logprobs(), logits, strict=False):
        torch.testing.assert_close(dense(ours), theirs.log_softmax(-1), atol=1e-4, rtol=0)
    assert steering.tallies[0].positions == answer.end.receipt.positions[0]
    assert not torch.allclose(logits[0], before_logits[0], atol=1e-2)
    assert before == after
    assert torch.equal(before_logits, after_logits)


def test_the_library_alone_steers_each_row_of_a_padded_batch(plain, tiny_family_artifact):
    """Rows of different images, padded on the left as `generate` wants it."""
    model, processor = plain
    questions, images = ["what?", "what is this, and where?"], [[one] for one in drawn(((24, 20), (100, 31)))]
    texts = [chat_text(processor, 1, question) for question in questions]

    def first_logits(rows):
        inputs = processor(
            text=[texts[row] for row in rows], images=[images[row] for row in rows], padding=True, padding_side="left",
            return_tensors="pt",
        )  # fmt: skip
        with steer(model, load_artifact(tiny_family_artifact), SteeringRequest(strength=1.0)) as steering:
            made = model.generate(
                **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        return torch.stack(made.logits, dim=1), [tally.positions for tally in steering.tallies]

    together, positions = first_logits([0, 1])
    for row in (0, 1):
        alone, alone_positions = first_logits([row])
        torch.testing.assert_close(together[row, 0], alone[0, 0], atol=1e-4, rtol=0)
        assert positions[row] == alone_positions[0]


async def test_images_and_their_shapes_reach_the_answer(engine):
    """A picture, its mirror image, and its tokens in another order of the same number."""
    picture = drawn_image(1, (90, 60))
    pictures = [picture, ImageOps.mirror(picture), picture.rotate(90, expand=True)]
    first = []
    for image in pictures:
        request = family_request(engine, ((90, 60),), max_tokens=1)
        answer = await send(engine, replace(request, images=(image,)))
        first.append(dense(answer.logprobs()[0]))
    for one, other in itertools.combinations(first, 2):
        assert (one - other).abs().max() > 1e-2


async def test_images_that_touch(engine):
    """M-RoPE as transformers computes it needs a token between two images; the other families do not."""
    request = family_request(engine, SIZES[2], steering={"strength": 1.0})
    image_token = engine.processor.image_token_id
    others = [token for token in request.prompt_token_ids if token != image_token]
    touching = replace(request, prompt_token_ids=(image_token, image_token, *others))
    if engine.capabilities().model_family == "qwen2_5_vl":
        with pytest.raises(InvalidSteering, match="no token between them"):
            await send(engine, touching)
    else:
        assert (await send(engine, touching)).end.receipt.applied
    assert (await send(engine, request)).end.receipt.applied


async def test_an_artifact_of_another_family_is_refused(tiny_family, tiny_artifact):
    with pytest.raises(BadArtifact, match="made for another model"):
        await HuggingFaceEngine(tiny_family, tiny_artifact).start()
