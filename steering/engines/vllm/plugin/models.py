"""vLLM's own LVLM classes, with steering put between two of their decoder layers. Nothing of their code is repeated."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from steering.artifact import Artifact, check_fits, load_artifact
from steering.engines.base import IMPLAUSIBLE
from steering.engines.vllm.plugin.batch import Batch
from steering.engines.vllm.plugin.configuration import check_config, read_config
from steering.engines.vllm.plugin.pooling import PoolingAttention
from steering.engines.vllm.plugin.steering_layer import STEERING_LAYER, SteeringLayer
from steering.engines.vllm.plugin.twin import TwinTail
from steering.errors import BadArtifact
from steering.realignment import Realignment
from steering.slot_tables import SlotTables

Made = TypeVar("Made")
MIN_KERNEL_ROWS = 256
"""Rows that a launch of the kernels takes at least: the texts of several prompts that are prefilled together."""


class _Steered(nn.Module):
    """Mixin before one of vLLM's LVLM classes, whose decoder is at `language_model.model`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        plugin = read_config(vllm_config)
        check_config(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # pyright: ignore[reportCallIssue]
        check_config(vllm_config)  # building the layers may have chosen another cache dtype
        language_model: Any = self.language_model
        decoder: Any = language_model.model
        hf_config: Any = vllm_config.model_config.hf_config
        device = next(decoder.parameters()).device
        artifact = _in_float32(lambda: load_artifact(plugin.artifact))
        self._hidden_size = decoder.config.hidden_size
        if artifact.config.fingerprint != plugin.fingerprint:
            raise BadArtifact(f"{plugin.artifact} is not the artifact {plugin.fingerprint} any more", field="artifact")
        check_fits(artifact, family=hf_config.model_type, hidden_size=self._hidden_size, num_layers=len(decoder.layers))
        hook: Any = decoder.layers[artifact.config.hook_layer]
        base = hook.self_attn.attn
        pool = PoolingAttention(
            base, self._hidden_size, vllm_config.cache_config, base.layer_name.rpartition(".self_attn")[0],
            rank=get_tensor_model_parallel_rank(), ranks=get_tensor_model_parallel_world_size(),
        )  # fmt: skip
        twin = None
        if plugin.branches == 2:
            tail = list(decoder.layers[artifact.config.hook_layer + 1 :])
            twin = TwinTail(tail, decoder.norm, vllm_config.cache_config)
        self.vl_sae_attention = nn.ModuleList([*pool.layers, *(twin.attention if twin else [])])
        """Among the model's modules, so that vLLM prepares their caches as it does the base's."""
        self.steering = _in_float32(lambda: _make_layer(vllm_config, artifact, device, pool, twin))
        vllm_config.compilation_config.static_forward_context[STEERING_LAYER] = self.steering
        hook.__class__ = _steered_class(type(hook))

    @staticmethod
    def get_model_state_cls() -> type:
        """Second model runner: how requests reach us."""
        from steering.engines.vllm.plugin.model_state import SteeringModelState

        return SteeringModelState

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """[N, D], or [N, 2 D + a few] where a row of this step has a steered branch beside the base's."""
        self.steering.begin()
        return self.steering.join(super().forward(*args, **kwargs))

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[M, V]: (1 - gamma) base + gamma steered, without tokens implausible to the base (paper, section 4.2)."""
        base_MD, twin_MD, blend_M2 = self.steering.split(hidden_states, self._hidden_size)
        base_MV = super().compute_logits(base_MD)  # pyright: ignore[reportAttributeAccessIssue]
        if twin_MD is None or blend_M2 is None or not self.steering.blends:
            return base_MV
        steered_MV = super().compute_logits(twin_MD)  # pyright: ignore[reportAttributeAccessIssue]
        return None if base_MV is None else _blend(base_MV.float(), steered_MV.float(), *blend_M2.split(1, dim=1))


def _blend(base_MV: Tensor, steered_MV: Tensor, gamma_M1: Tensor, log_plausibility_M1: Tensor) -> Tensor:
    """Rows of one branch, gamma 0 and log(plausibility) -inf, keep the base's bits."""
    blended_MV = (1 - gamma_M1) * base_MV + gamma_M1 * steered_MV
    floor_M1 = base_MV.amax(1, keepdim=True) + log_plausibility_M1
    blended_MV = torch.where(base_MV < floor_M1, blended_MV - IMPLAUSIBLE, blended_MV)
    return torch.where((gamma_M1 != 0) | (log_plausibility_M1 > -torch.inf), blended_MV, base_MV)


def _make_layer(
    vllm_config: VllmConfig, artifact: Artifact, device: torch.device, pool: PoolingAttention, twin: TwinTail | None
) -> SteeringLayer:
    """All that it will ever need is allocated here, where vLLM counts it as the model's memory."""
    scheduler, config = vllm_config.scheduler_config, artifact.config
    batch = Batch(
        vllm_config.model_config.hf_config.image_token_id,
        config.min_text_tokens,
        max_sequences=scheduler.max_num_seqs,
        branches=1 if twin is None else 2,
        has_control_images=len(artifact.control_image_MD) > 0,
        concepts=config.num_concepts,
    )
    realignment = Realignment(artifact.auxiliary, artifact.sae, device)
    tables = SlotTables(
        realignment, artifact.control_image_MD, slots=batch.slots, tallies=batch.tallies, device=device
    )  # fmt: skip
    kernels = None
    if triton_runs(device):
        from steering.kernels.launch import RealignKernels

        kernels = RealignKernels(tables, capacity=max(MIN_KERNEL_ROWS, scheduler.max_num_seqs))
    largest_graph = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return SteeringLayer(
        batch, tables, pool, twin, kernels=kernels, max_token_rows=max(scheduler.max_num_batched_tokens, largest_graph)
    )  # fmt: skip


def triton_runs(device: torch.device) -> bool:
    """On a GPU; on a CPU only interpreted, which is for tests."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def _in_float32(make: Callable[[], Made]) -> Made:
    """Whatever dtype and device vLLM has made the default while it builds a model."""
    model_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            return make()
    finally:
        torch.set_default_dtype(model_dtype)


def _steered_class(base: type[Any]) -> type:
    """The decoder layer's class, with the steering operator after its forward."""

    class SteeredDecoderLayer(base):
        def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **kwargs: Any):
            hidden_states, residual = super().forward(positions, hidden_states, residual, **kwargs)
            torch.ops.vl_sae.steer(hidden_states, residual, positions)
            return hidden_states, residual

    return SteeredDecoderLayer


class VlSaeLlavaForConditionalGeneration(_Steered, LlavaForConditionalGeneration):
    """LLaVA-1.5."""


class VlSaeLlavaNextForConditionalGeneration(_Steered, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""


class VlSaeQwen2_5_VLForConditionalGeneration(_Steered, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""
