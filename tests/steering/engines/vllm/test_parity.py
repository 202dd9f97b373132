"""vLLM against the Hugging Face engine: every form and branch count, alone and in one batch, however scheduled."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio

from steering.errors import EngineUnavailable
from tests.steering.engines.driving import LATER_TURN, make_request, send
from tests.steering.engines.vllm.agreement import VOCABULARY, assert_agree
from tests.steering.engines.vllm.conftest import running_engine
from tests.steering.engines.vllm.conversations import SHORT, conversation, image_end, in_turn

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
    {"min_answer_tokens": 0},
    {"min_answer_tokens": 2, "gamma": 0.6, "plausibility": 0.3},
    {"min_answer_tokens": 6},
]


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """How vLLM runs the tiny LLaVA, and what that must bring about."""

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    """For `running_engine`."""
    preempts: bool = False
    caches: bool = True
    letters: int = 7
    """By which each request is longer than the one before it; fewer where kernels are interpreted, row by row."""
    step: int = 1
    """Each so many of `MIXED` is asked for alone; in one batch all are."""
    max_tokens: int = 30
    """Of the requests in one batch; the blocks of one that preempts must not hold them all."""

    @property
    def runner(self) -> str:
        """Module of the runner that it must take."""
        return f"vllm.v1.worker.{'cpu.' if self.options.get('second_runner') else 'cpu_'}model_runner"


CONFIGURATIONS = {
    "chunked prefill, preempted, no prefix cache": Configuration(
        model="gqa",
        options={
            "vllm_arguments": {
                "max_num_batched_tokens": 17,
                "max_num_seqs": 16,
                "num_gpu_blocks_override": 14,
                "enable_prefix_caching": False,
            }
        },
        preempts=True,
        caches=False,
    ),
    "compiled, spawned": Configuration(model="gqa", options={"compile": True, "spawned": True}),
    "two ranks, chunked prefill": Configuration(
        model="mha", options={"tensor_parallel_size": 2, "vllm_arguments": {"max_num_batched_tokens": 40}}
    ),
    "second runner, chunked prefill, preempted": Configuration(
        model="gqa",
        options={
            "second_runner": True,
            "vllm_arguments": {"max_num_batched_tokens": 64, "max_num_seqs": 16, "num_gpu_blocks_override": 14},
        },
        preempts=True,
        letters=3,
        step=3,
        max_tokens=12,
    ),
    "default": Configuration(model="mha"),
}


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=list(CONFIGURATIONS))
async def pair(request, engine, tiny_models, references):
    """Configuration, engine and the engine to compare it with."""
    configuration = CONFIGURATIONS[request.param]
    if request.param == "default":
        yield configuration, engine, references["mha"]
        return
    async with running_engine(tiny_models[configuration.model], **configuration.options) as configured:
        yield configuration, configured, references[configuration.model]


def requests_with(engine, letters: str, max_tokens: int = 8):
    """One request per setting: other texts, one or two images, full logprobs."""
    return [
        make_request(
            engine, letters * index, (index, index + 1)[: 1 + index % 2], chosen,
            max_tokens=max_tokens + index % 3, top_logprobs=VOCABULARY,
        )
        for index, chosen in enumerate(MIXED)
    ]  # fmt: skip


async def test_the_runner_is_the_one_meant(pair):
    configuration, engine, _ = pair
    assert set(await engine.vllm.collective_rpc("model_runner_name")) == {configuration.runner}


async def test_alone(pair):
    configuration, engine, reference = pair
    requests = requests_with(engine, "x" * configuration.letters)[:: configuration.step]
    answers, expected = await in_turn(engine, requests), await in_turn(reference, requests)
    assert_agree(answers, expected)
    for ours, theirs in zip(answers, expected, strict=True):
        assert ours.end.receipt.applied == theirs.end.receipt.applied
        assert ours.end.receipt.positions == theirs.end.receipt.positions
        assert ours.end.receipt.relative_shift == pytest.approx(theirs.end.receipt.relative_shift, rel=1e-3)
        assert ours.end.prompt_tokens == theirs.end.prompt_tokens


async def test_batched_with_different_settings_and_off(pair):
    configuration, engine, reference = pair
    requests = requests_with(engine, "y" * configuration.letters, configuration.max_tokens)
    expected = await in_turn(reference, requests)
    preempted_before = engine.progress.preempted
    answers = await asyncio.gather(*(send(engine, request) for request in requests))
    assert_agree(answers, expected)
    assert [one.end.receipt.positions for one in answers] == [one.end.receipt.positions for one in expected]
    assert (engine.progress.preempted > preempted_before) == configuration.preempts


@pytest.mark.parametrize("steering", [{"strength": 1.0}, {"strength": 1.0, "gamma": 0.5}], ids=["one", "two"])
async def test_an_image_added_in_a_later_turn(pair, steering):
    """What was text after the last image becomes text before it: cached as steered, it must not be reused."""
    _, engine, reference = pair
    requests = [conversation(engine, images, steering=steering, text=SHORT) for images in ((3,), (3, 5))]
    answers, expected = await in_turn(engine, requests), await in_turn(reference, requests)
    for ours, theirs in zip(answers, expected, strict=True):
        assert_agree([ours], [theirs])


@pytest.mark.parametrize("wait", [0, 2, 6])
async def test_a_later_turn_is_steered_from_a_place_in_its_own_answer(pair, wait):
    """With one branch and with two, side by side."""
    configuration, engine, reference = pair
    requests = [
        make_request(
            engine, LATER_TURN, (2,), {"strength": 1.0, "gamma": gamma, "min_answer_tokens": wait},
            max_tokens=configuration.max_tokens, top_logprobs=VOCABULARY,
        )
        for gamma in (1.0, 0.6)
    ]  # fmt: skip
    answers = await asyncio.gather(*(send(engine, request) for request in requests))
    expected = await in_turn(reference, requests)
    assert_agree(answers, expected)
    for ours, theirs in zip(answers, expected, strict=True):
        assert ours.end.receipt.positions == theirs.end.receipt.positions
        assert ours.end.receipt.positions == [ours.end.completion_tokens[0] - wait]


@pytest.mark.parametrize("steering", [{"strength": 1.0}, {"strength": 1.0, "gamma": 0.5}], ids=["one", "two"])
async def test_an_image_whose_tokens_are_all_in_the_prefix_cache(pair, steering):
    """It is pooled and encoded again from there: the place of its code has been another image's meanwhile."""
    configuration, engine, reference = pair
    requests = [
        make_request(engine, SHORT, (image,), steering, max_tokens=4, top_logprobs=VOCABULARY) for image in (4, 9, 4)
    ]
    first = await in_turn(engine, requests[:2])
    cached_before = engine.progress.cached_tokens
    answers = [*first, *await in_turn(engine, requests[2:])]
    assert_agree(answers, await in_turn(reference, requests))
    cached = engine.progress.cached_tokens - cached_before
    assert cached >= image_end(engine, requests[2], answers[2]) if configuration.caches else cached == 0
    assert answers[2].end.receipt.positions == answers[0].end.receipt.positions
    assert answers[2].end.receipt.applied


@pytest.mark.parametrize("pair", [name for name in CONFIGURATIONS if name != "default"], indirect=True)
async def test_stopping_fails_what_runs(pair):
    """The last test of each engine but the one that others use, too."""
    _, engine, _ = pair
    listening = asyncio.create_task(send(engine, make_request(engine, max_tokens=200, logit_bias={257: -100.0})))
    while not engine.health().running:
        await asyncio.sleep(0.01)
    await engine.stop()
    with pytest.raises(EngineUnavailable):
        await asyncio.wait_for(listening, timeout=10)
