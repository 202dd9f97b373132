"""What an engine must be configured like for steering to be real; everything else refuses to start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from steering.errors import EngineUnavailable

if TYPE_CHECKING:
    from vllm.config import CUDAGraphMode, VllmConfig

CONFIG_KEY = "vl_sae"
OPERATOR = "vl_sae::steer"
"""Our custom operator: opaque to torch.compile; between piecewise CUDA graphs, inside a full one."""


class PluginConfig(BaseModel):
    """`additional_config={"vl_sae": {...}}` of an engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    artifact: str
    """Folder of the artifact."""
    fingerprint: str
    """The artifact's own: part of the engine's configuration, so that no graph compiled for another is reused."""
    branches: int = 2
    """1 builds no second tail: requests that need one cannot be served, its KV memory is saved."""


@dataclass(frozen=True)
class Refusal:
    """A setting under which steering would be wrong or silently absent, and what to do about it."""

    setting: str
    remedy: str


def read_config(vllm_config: VllmConfig) -> PluginConfig:
    """Our part of the engine's configuration. Raises EngineUnavailable where it is missing or malformed."""
    additional: Any = vllm_config.additional_config or {}
    if CONFIG_KEY not in additional:
        raise EngineUnavailable(
            f"a steered model class needs additional_config={{'{CONFIG_KEY}': {{'artifact': FOLDER}}}}",
            field="additional_config",
        )
    try:
        return PluginConfig.model_validate(additional[CONFIG_KEY])
    except ValidationError as error:
        raise EngineUnavailable(f"additional_config.{CONFIG_KEY}: {error}", field="additional_config") from error


def check_config(vllm_config: VllmConfig) -> None:
    """Raise EngineUnavailable, naming the setting and the remedy, for what would un-steer in silence."""
    refusal = next(_refusals(vllm_config), None)
    if refusal is not None:
        raise EngineUnavailable(
            f"{refusal.setting} cannot be combined with steering: {refusal.remedy}", field=refusal.setting
        )


def _refusals(config: VllmConfig):
    parallel, cache, compilation = config.parallel_config, config.cache_config, config.compilation_config
    if config.speculative_config is not None:
        yield Refusal("speculative_config", "drafted tokens would be accepted unsteered; start without it")
    if parallel.pipeline_parallel_size > 1:
        yield Refusal("pipeline_parallel_size", "hook layer and tail must be on one rank; use tensor_parallel_size")
    if cache.cache_dtype not in ("auto", str(config.model_config.dtype).removeprefix("torch.")):
        yield Refusal("kv_cache_dtype", "the pooled states would be rounded; use 'auto'")
    if parallel.data_parallel_size > 1:
        yield Refusal("data_parallel_size", "receipts would be asked of one engine only; start several services")
    if config.lora_config is not None:
        yield Refusal("enable_lora", "an adapter on the tail would not fit the artifact; merge it into the weights")
    if parallel.use_ubatching:
        yield Refusal("enable_dbo", "a batch split in two would lose its rows; start without it")
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield Refusal("decode_context_parallel_size", "a mean over a split context would be wrong; use 1")
    if config.model_config.enable_prompt_embeds:
        yield Refusal("enable_prompt_embeds", "without token ids there is no telling image from text; leave it out")
    if cache.kv_sharing_fast_prefill:
        yield Refusal("kv_sharing_fast_prefill", "prompt positions would be skipped; leave it out")
    yield from graph_refusals(config, compilation.cudagraph_mode)


def graph_refusals(config: VllmConfig, mode: CUDAGraphMode | None):
    """A graph replays what was captured: of decode steps our operator captures all, of others it stands in between."""
    from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
    from vllm.config import CompilationMode, CUDAGraphMode

    if mode is None or config.device_config.device_type == "cpu":
        return
    if mode.mixed_mode() == CUDAGraphMode.FULL:
        yield Refusal("cudagraph_mode", "a full graph of a prefill would not learn its image; use FULL_AND_PIECEWISE")
    if mode.has_full_cudagraphs() and not config.use_v2_model_runner:
        yield Refusal("cudagraph_mode", "vLLM's first runner would replay without steering; use PIECEWISE")
    if not mode.has_piecewise_cudagraphs():
        return
    if is_breakable_cudagraph_enabled():
        yield Refusal("VLLM_USE_BREAKABLE_CUDAGRAPH", "graphs would not break at our operator; unset it")
    if config.compilation_config.mode != CompilationMode.VLLM_COMPILE:
        yield Refusal("compilation_config.mode", "without compilation nothing splits the graphs; use enforce_eager")
    if OPERATOR not in (config.compilation_config.splitting_ops or []):
        yield Refusal("splitting_ops", f"a graph would replay without steering; add {OPERATOR!r} to them")
