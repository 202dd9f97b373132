"""The steered branch's own pass through the tail: the base's layers and weights, keys and values of its own."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from vllm.config import CacheConfig
from vllm.model_executor.layers.attention import Attention


class TwinTail:
    """Decoder layers after the hook layer once more, for gamma below 1 or plausibility above 0 (design, section 1).

    Its batch has the base's rows, so the base branch is computed exactly as in plain vLLM.
    """

    def __init__(self, tail: list[nn.Module], norm: nn.Module, cache_config: CacheConfig | None) -> None:
        self.attention = [_own_attention(layer, cache_config) for layer in tail]
        self._layers = [_with_attention(layer, own) for layer, own in zip(tail, self.attention, strict=True)]
        self._norm = norm

    def __call__(self, positions: Tensor, hidden_ND: Tensor, residual_ND: Tensor) -> Tensor:
        """States [N, D] after the final norm."""
        for layer in self._layers:
            hidden_ND, residual_ND = layer(positions, hidden_ND, residual_ND)
        normed_ND, _ = self._norm(hidden_ND, residual_ND)
        return normed_ND


def _own_attention(layer: Any, cache_config: CacheConfig | None) -> Attention:
    base: Attention = layer.self_attn.attn
    prefix, _, last = base.layer_name.rpartition(".")
    return Attention(
        base.num_heads,
        base.head_size,
        base.impl.scale,
        num_kv_heads=base.num_kv_heads,
        cache_config=cache_config,
        quant_config=base.quant_config,
        per_layer_sliding_window=base.sliding_window,
        prefix=f"{prefix}.vl_sae_twin_{last}",
    )


def _with_attention(layer: Any, attention: Attention) -> Any:
    """The layer with another attention and every other submodule shared, so that weights are loaded and kept once."""
    twin = _shallow(layer)
    twin.self_attn = _shallow(layer.self_attn)
    twin.self_attn.attn = attention
    return twin


def _shallow(module: nn.Module) -> Any:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
