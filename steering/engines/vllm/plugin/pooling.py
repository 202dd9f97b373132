"""Running means of image and text states, computed by vLLM's own paged attention.

An attention layer whose values are the residual stream and whose keys tell only a token's class: to a query of one
class, keys of that class are all alike and all others weigh exp(-128) = 0, so the output is the mean over the class up
to here. Chunked prefill, prefix caching and preemption then need nothing from us.
The means are as exact as the model's dtype: summed in float32 by the attention, rounded once at its output.

Shapes: N tokens of this step, D hidden size, P = kv_heads * head_size columns pooled by one layer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import CacheConfig
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.attention import Attention

from steering.engines.vllm.plugin.batch import IMAGE, TEXT

MIN_EXPONENT = 128
"""exp(-128) is 0 in float32."""


class PoolingAttention(nn.Module):
    """As many attention layers of the base's own shape as it takes to pool D columns (design, section 1).

    With the base's number of heads and scale, vLLM plans them together with the base's layers. In tensor parallel,
    each rank pools its share of the columns.
    """

    def __init__(
        self,
        base: Attention,
        hidden_size: int,
        cache_config: CacheConfig | None,
        prefix: str,
        *,
        rank: int,
        ranks: int,
    ) -> None:
        super().__init__()
        self._prefix, self._rank, self._ranks = prefix, rank, ranks
        self._hidden_size = hidden_size
        self._columns = math.ceil(hidden_size / ranks)
        self._heads, self._kv_heads, self._head_size = base.num_heads, base.num_kv_heads, base.head_size
        self._width = self._kv_heads * self._head_size
        scale = base.impl.scale
        sharpness = 2.0 ** math.ceil(math.log2(math.sqrt(MIN_EXPONENT / scale)))
        """Length c of keys and queries, a power of two, so that it is exact in every dtype; c^2 * scale >= 128."""
        one_hot = torch.zeros(3, self._head_size)
        one_hot[IMAGE, 0] = one_hot[TEXT, 1] = sharpness
        self._key_3P, self._query_3Q = one_hot.repeat(1, self._kv_heads), one_hot.repeat(1, self._heads)
        """By class, for all heads: c at the class's place; zero for OTHER."""
        self.layers = nn.ModuleList(
            Attention(
                base.num_heads,
                base.head_size,
                scale,
                num_kv_heads=base.num_kv_heads,
                cache_config=cache_config,
                prefix=f"{prefix}.vl_sae_pool_{index}",
            )
            for index in range(math.ceil(self._columns / self._width))
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the states that are pooled."""
        return self._key_3P.dtype

    @property
    def first_layer_name(self) -> str:
        return f"{self._prefix}.vl_sae_pool_0"

    def forward(self, stream_ND: Tensor, class_N: Tensor, asked_N: Tensor) -> Tensor:
        """Means [N, D] over the tokens of class `asked_N` up to and including each token.

        `class_N` holds each token's own class. A row whose class has no token yet gets a finite mean of something else.
        """
        keys_NP, query_NQ = self._key_3P[class_N], self._query_3Q[asked_N]
        mine = stream_ND[:, self._rank * self._columns : (self._rank + 1) * self._columns]
        missing = len(self.layers) * self._width - mine.shape[1]
        padded = F.pad(mine, (0, missing)) if missing else mine
        parts = []
        for index, layer in enumerate(self.layers):
            values_NP = padded[:, index * self._width : (index + 1) * self._width].contiguous()
            pooled_NQ = layer(query_NQ, keys_NP, values_NP)
            per_head = pooled_NQ.view(-1, self._kv_heads, self._heads // self._kv_heads, self._head_size)
            parts.append(per_head[:, :, 0].reshape(-1, self._width))
        pooled = (torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])[:, : self._columns]
        if self._ranks > 1:
            pooled = tensor_model_parallel_all_gather(pooled.contiguous(), dim=1)
        return pooled[:, : self._hidden_size]
