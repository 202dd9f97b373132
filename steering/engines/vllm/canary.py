"""The artifact's canary, recomputed through the model as vLLM runs it (design, section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from PIL.Image import Image
from torch import Tensor

from steering.engines.canary import judge_canary
from steering.engines.checkpoint import Checkpoint
from steering.engines.vllm.plugin.wire import WireSteering, cache_salt
from steering.engines.vllm.worker_client import WorkerClient
from steering.errors import EngineUnavailable

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

PROBE_TOKENS = 3
"""Where a prompt's end ran as a decode step, what it pools is learned in the steps after it: first v, then t."""


async def check_canary(vllm: AsyncLLM, workers: WorkerClient, checkpoint: Checkpoint, dtype: str) -> dict[str, float]:
    """Smallest cosine and largest unexplained share. Raises BadArtifact if the artifact is another model's."""
    assert checkpoint.artifact is not None
    canary = checkpoint.artifact.canary
    states = [
        await _pooled_states(vllm, workers, f"canary-{index}", image, list(token_ids))
        for index, (image, token_ids) in enumerate(zip(canary.images, canary.token_ids, strict=True))
    ]
    return judge_canary(checkpoint.artifact, states, half_precision=dtype != "float32")


async def _pooled_states(
    vllm: AsyncLLM, workers: WorkerClient, name: str, image: Image, token_ids: list[int]
) -> tuple[Tensor, Tensor]:
    """v and t [D] of one prompt, as the pooling layers give them."""
    from vllm import SamplingParams

    wire = WireSteering(id=name, task="probe")
    prompt = {
        "prompt_token_ids": token_ids,
        "multi_modal_data": {"image": [image]},
        "cache_salt": cache_salt(wire, fingerprint=None, last_image_index=None, prompt_length=None, tenant=name),
    }
    parameters = SamplingParams(max_tokens=PROBE_TOKENS, temperature=0, detokenize=False, extra_args=wire.extra_args())
    try:
        async for _ in vllm.generate(prompt, parameters, name):  # pyright: ignore[reportArgumentType]
            pass
    except Exception as error:
        raise EngineUnavailable(f"vLLM failed on the artifact's canary ({error}); its log says why") from error
    told = await workers.finish(name)
    if not told or set(told["probe"]) != {"image", "text"}:
        raise EngineUnavailable("vLLM did not run the steering layers; is its plugin installed?")
    return torch.tensor(told["probe"]["image"]), torch.tensor(told["probe"]["text"])
