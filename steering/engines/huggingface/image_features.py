"""What the vision side makes of a request's images: once for all requests that show the same ones while the engine is
at work. Knows no text and no steering.

Images of a request are always encoded by themselves, so their features depend on nothing but them, to the last bit,
whoever else is in the batch and whether they were kept. What one tenant showed is not kept for another: how long an
answer takes must not tell of it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from steering.engines.sequence import RunningRequest
from steering.lvlm.decoder_layers import encode_images

MAX_KEPT_BYTES = 64 * 1024 * 1024
"""Of features: a dozen pictures of LLaVA-1.5-7B in 16 bits; the latest used stay."""


class ImageFeatures:
    """Of one model."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def of(self, request: RunningRequest) -> Tensor:
        """Features [N, D] of all its images, in order; it has some."""
        key = _digest(request)
        found = self._kept.pop(key, None)
        if found is None:
            found = encode_images(
                self._model, {name: one.to(self._device) for name, one in request.image_inputs.items()}
            )
        self._kept[key] = found
        while sum(one.nbytes for one in self._kept.values()) > MAX_KEPT_BYTES:
            self._kept.popitem(last=False)
        return found

    def clear(self) -> None:
        """Give their memory back."""
        self._kept.clear()


def _digest(request: RunningRequest) -> bytes:
    digest = hashlib.sha256(request.tenant.encode() + b"\0")
    for name, value in sorted(request.image_inputs.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        digest.update(value.contiguous().numpy().data)
    return digest.digest()
