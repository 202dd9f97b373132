"""Settings under which steering would be wrong or silently absent are refused, each by its name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from steering.engines.vllm.engine import VllmEngine
from steering.engines.vllm.plugin.configuration import OPERATOR, graph_refusals
from steering.errors import EngineUnavailable


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


def refused_setting(graphs: str, *, second_runner: bool, compiled: str, splits: bool, device: str = "cuda"):
    """The first one, or None."""
    from vllm.config import CompilationMode, CUDAGraphMode

    config: Any = SimpleNamespace(
        device_config=SimpleNamespace(device_type=device),
        use_v2_model_runner=second_runner,
        compilation_config=SimpleNamespace(
            mode=CompilationMode[compiled], splitting_ops=[OPERATOR] if splits else ["vllm::unified_attention"]
        ),
    )
    refused = next(graph_refusals(config, CUDAGraphMode[graphs]), None)
    return refused.setting if refused else None


@pytest.mark.parametrize(
    ("graphs", "second_runner", "compiled", "splits", "setting"),
    [
        ("FULL", True, "VLLM_COMPILE", True, "cudagraph_mode"),
        ("FULL_AND_PIECEWISE", True, "VLLM_COMPILE", True, None),
        ("FULL_AND_PIECEWISE", True, "VLLM_COMPILE", False, "splitting_ops"),
        ("FULL_AND_PIECEWISE", True, "NONE", True, "compilation_config.mode"),
        ("FULL_DECODE_ONLY", True, "NONE", False, None),
        ("FULL", False, "VLLM_COMPILE", True, "cudagraph_mode"),
        ("FULL_AND_PIECEWISE", False, "VLLM_COMPILE", True, "cudagraph_mode"),
        ("FULL_DECODE_ONLY", False, "VLLM_COMPILE", True, "cudagraph_mode"),
        ("PIECEWISE", False, "VLLM_COMPILE", False, "splitting_ops"),
        ("PIECEWISE", False, "NONE", True, "compilation_config.mode"),
        ("PIECEWISE", False, "VLLM_COMPILE", True, None),
        ("PIECEWISE", True, "VLLM_COMPILE", True, None),
        ("NONE", False, "NONE", False, None),
    ],
)
def test_graphs_that_would_replay_without_steering_are_refused(graphs, second_runner, compiled, splits, setting):
    refused = refused_setting(graphs, second_runner=second_runner, compiled=compiled, splits=splits)
    assert refused == setting


def test_graphs_that_break_elsewhere_are_refused(monkeypatch):
    monkeypatch.setattr("vllm.compilation.breakable_cudagraph.is_breakable_cudagraph_enabled", lambda: True)
    refused = refused_setting("PIECEWISE", second_runner=True, compiled="VLLM_COMPILE", splits=True)
    assert refused == "VLLM_USE_BREAKABLE_CUDAGRAPH"


def test_a_cpu_has_no_graphs_to_refuse():
    assert refused_setting("FULL", second_runner=False, compiled="NONE", splits=False, device="cpu") is None
