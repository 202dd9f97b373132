"""vLLM against the Hugging Face engine: every form and branch count, alone and in one batch, however scheduled."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest
import pytest_asyncio

from tests.steering.engines.driving import make_request, send
from tests.steering.engines.vllm.agreement import VOCABULARY, assert_agree
from tests.steering.engines.vllm.conftest import running_engine
from tests.steering.engines.vllm.conversations import conversation

FORMS = ("published", "difference", "union")
BRANCHES = ({"gamma": 1.0, "plausibility": 0.0}, {"gamma": 0.6, "plausibility": 0.3})
SETTINGS = [
    {"form": form, "alpha": 1.5, "beta_up": 0.7, "beta_down": 0.9, "strength": 0.8} | branches
    for form, branches in itertools.product(FORMS, BRANCHES)
]
MIXED = [
    *SETTINGS,
    {"enabled": False},
    {"strength": 0.0},
    {"control": "reversed"},
    {"control": "random", "control_seed": 4},
    {"control": "other_image", "control_seed": 2},
    {"gamma": 1.0, "plausibility": 0.5},
]
CONFIGURATIONS = {
    "mha": None,
    "gqa, chunked prefill": ("gqa", {"vllm_arguments": {"max_num_batched_tokens": 17, "max_num_seqs": 16}}),
    "preempted, no prefix cache": (
        "mha",
        {"vllm_arguments": {"num_gpu_blocks_override": 14, "enable_prefix_caching": False}},
    ),
    "compiled": ("gqa", {"compile": True}),
    "two ranks": ("mha", {"tensor_parallel_size": 2}),
    "second runner": ("gqa", {"vllm_arguments": {"max_num_batched_tokens": 64, "max_num_seqs": 16}}),
}
"""How vLLM runs it: None is the default engine; else a model and options. Starting one takes half a minute."""
SECOND_RUNNER = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "TRITON_INTERPRET": "1",
    "PYTHONPATH": str(Path(__file__).parent / "second_runner"),
}
"""vLLM's second model runner, the default on GPUs; see second_runner/sitecustomize.py."""


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=list(CONFIGURATIONS))
async def pair(request, engine, tiny_models, references):
    """Name, engine and the engine to compare it with."""
    configuration = CONFIGURATIONS[request.param]
    if configuration is None:
        yield request.param, engine, references["mha"]
        return
    model, options = configuration
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "second runner":
            patch.setattr("vllm.config.vllm.HAS_TRITON", True)
            for name, value in SECOND_RUNNER.items():
                patch.setenv(name, value)
        async with running_engine(tiny_models[model], **options) as configured:
            yield request.param, configured, references[model]


def requests_with(engine, settings: list[dict], letter: str, max_tokens: int = 8):
    """One request per setting: other texts, one or two images, full logprobs."""
    return [
        make_request(
            engine, letter * (7 * index), (index, index + 1)[: 1 + index % 2], chosen,
            max_tokens=max_tokens + index % 3, top_logprobs=VOCABULARY,
        )
        for index, chosen in enumerate(settings)
    ]  # fmt: skip


async def answers_alone(engine, requests):
    return [await send(engine, request) for request in requests]


async def test_the_runner_is_the_one_meant(pair):
    name, engine, _ = pair
    runners = await engine.vllm.collective_rpc("model_runner_name")
    assert set(runners) == {f"vllm.v1.worker.{'cpu.' if name == 'second runner' else 'cpu_'}model_runner"}


async def test_alone(pair):
    _, engine, reference = pair
    requests = requests_with(engine, MIXED, "x")
    answers = await answers_alone(engine, requests)
    expected = await answers_alone(reference, requests)
    assert_agree(answers, expected)
    for ours, theirs in zip(answers, expected, strict=True):
        assert ours.end.receipt.applied == theirs.end.receipt.applied
        assert ours.end.receipt.positions == theirs.end.receipt.positions
        assert ours.end.receipt.relative_shift == pytest.approx(theirs.end.receipt.relative_shift, rel=1e-3)
        assert ours.end.prompt_tokens == theirs.end.prompt_tokens


async def test_batched_with_different_settings_and_off(pair):
    name, engine, reference = pair
    requests = requests_with(engine, MIXED, "y", max_tokens=30)
    expected = await answers_alone(reference, requests)
    preempted_before = engine.progress.preempted
    answers = await asyncio.gather(*(send(engine, request) for request in requests))
    assert_agree(answers, expected)
    assert [one.end.receipt.positions for one in answers] == [one.end.receipt.positions for one in expected]
    assert (engine.progress.preempted > preempted_before) == ("preempted" in name)


@pytest.mark.parametrize("steering", [{"strength": 1.0}, {"strength": 1.0, "gamma": 0.5}], ids=["one", "two"])
async def test_an_image_added_in_a_later_turn(pair, steering):
    """What was text after the last image becomes text before it: cached as steered, it must not be reused."""
    _, engine, reference = pair
    for images in ((3,), (3, 5)):
        answer = await send(engine, conversation(engine, images, steering=steering))
        assert_agree([answer], [await send(reference, conversation(reference, images, steering=steering))])
