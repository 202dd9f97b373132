"""A steering layer with everything real but vLLM's attention, for tests of what happens in a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.engines.vllm.plugin.batch import Batch
from steering.engines.vllm.plugin.steering_layer import SteeringLayer
from steering.engines.vllm.plugin.wire import WireSteering
from steering.realignment import Realignment
from steering.slot_tables import SlotTables, Stream
from steering.sparse_autoencoder import VisionLanguageSAE

PICTURE, IMAGE_TOKENS, TEXT_TOKENS = 99, 6, 4
PROMPT = [1, *[PICTURE] * IMAGE_TOKENS, *range(2, 2 + TEXT_TOKENS)]
SETTINGS: list[dict[str, Any]] = [
    {"form": "difference", "scale": 1.5, "beta_up": 0.9, "beta_down": 0.4},
    {"form": "published", "scale": 0.7, "beta_up": 0.3, "beta_down": 1.0},
    {"form": "union", "scale": 2.0, "beta_up": 1.0, "beta_down": 1.0},
    {"form": "difference", "scale": 1.0, "beta_up": 1.0, "beta_down": 1.0, "control": "reversed"},
    {"form": "difference", "scale": 1.0, "beta_up": 1.0, "beta_down": 1.0, "control": "random", "control_seed": 5},
    {"form": "union", "scale": 1.0, "beta_up": 0.5, "beta_down": 0.5, "control": "other_image", "control_seed": 1},
]
TWO = {"gamma": 0.6, "plausibility": 0.3}


class StandInPool:
    """In the place of the pooling attention: each row's 'mean' follows from the row and from the class it asks for."""

    first_layer_name = "pool"

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, stream_ND: Tensor, class_N: Tensor, asked_N: Tensor) -> Tensor:
        return (stream_ND + class_N[:, None].to(stream_ND.dtype)) * (0.5 * asked_N[:, None]).to(stream_ND.dtype)


class StandInTwin:
    """In the place of the tail: what reaches it is seen."""

    def __call__(self, positions: Tensor, hidden_ND: Tensor, residual_ND: Tensor) -> Tensor:
        return hidden_ND + residual_ND


def make_layer(
    *, device: torch.device, dtype: torch.dtype, with_kernels: bool, branches: int = 1, hidden: int = 32,
    concepts: int = 64, active: int = 6, max_sequences: int = 8, max_token_rows: int = 128,
) -> SteeringLayer:  # fmt: skip
    torch.manual_seed(0)
    with device:
        auxiliary, sae = AuxiliaryAutoencoder(hidden, hidden), VisionLanguageSAE(hidden, concepts, active)
        realignment, controls_MD = Realignment(auxiliary, sae, device), torch.randn(3, hidden)
    batch = Batch(PICTURE, 2, max_sequences=max_sequences, branches=branches)
    tables = SlotTables(realignment, controls_MD, slots=batch.slots, tallies=batch.tallies, device=device)
    kernels = None
    if with_kernels:
        from steering.kernels.launch import RealignKernels

        kernels = RealignKernels(tables, capacity=max_sequences)
    pool, twin = StandInPool(dtype), StandInTwin() if branches == 2 else None
    made: Any = SteeringLayer
    return made(batch, tables, pool, twin, kernels=kernels, max_token_rows=max_token_rows)


def enter(layer: SteeringLayer, index: int, settings: dict[str, Any] | None, prompt: list[int] | None = None) -> None:
    """A request takes a place of the runner; None is one that is off."""
    wire = None if settings is None else WireSteering(id=f"sequence {index}", **settings)
    layer.batch.enter(index, wire, prompt or PROMPT)


def announce(layer: SteeringLayer, places: list[int], firsts: list[int], lengths: list[int], padded: int = 0):
    """What `SteeringModelState` does before a pass; the step, if anybody is steered."""
    starts = np.cumsum([0, *lengths])
    step = layer.describe(layer.batch.inside[places], starts, np.array(firsts))
    layer.announce(step, max(padded, int(starts[-1])))
    return step


def random_stream(rows: int, layer: SteeringLayer, seed: int, dtype: torch.dtype) -> Stream:
    generator = torch.Generator().manual_seed(seed)
    device, hidden = layer.tables.device, layer.tables.realignment.hidden_size
    hidden_ND, residual_ND = torch.randn(2, rows, hidden, generator=generator).to(device=device, dtype=dtype)
    return Stream(hidden_ND, residual_ND)


def copied(stream: Stream) -> Stream:
    return Stream(*(part.clone() for part in stream))
