"""Realignment of listed rows of a decode step, as Triton kernels that a CUDA graph can hold: start reading here.

Tensors and launch sizes only: no engine, no requests. The equations are those of `steering.realignment`, which stays
the reference; every number of a step (who is steered, how) is read from device memory, nothing is read back, and
nothing is allocated after `__init__`.

Shapes: E entries (steered rows), N token rows, D hidden size, S shared width, K concepts, k active concepts, P parts
of a sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from steering.kernels.movement import accumulate_kernel, finish_kernel
from steering.kernels.plan import PLAN_COLUMNS
from steering.kernels.product import product_kernel
from steering.kernels.selection import select_kernel
from steering.request import MAX_EDITS
from steering.slot_tables import SlotTables, Stream

PARTS = 8
"""Shares of a sum over the table's rows: one entry alone fills the machine."""
LANES = 16
"""Entries that are accumulated side by side; more take turns, which keeps the idle launch small."""


class Streams(NamedTuple):
    """The step's token rows, one dtype, each row contiguous. The stream is hidden + residual."""

    mean_ND: Tensor
    """Text mean of each position."""
    hidden_ND: Tensor
    residual_ND: Tensor
    twin_hidden_ND: Tensor
    """Where entries with the twin flag go; may be `hidden_ND` itself."""
    twin_residual_ND: Tensor


class RealignKernels:
    """Moves the rows that a plan lists (`steering.kernels.plan`) and touches no other.

        shared = E_t t + b,  cos_c = shared . w_c / |shared|,  T = the k largest
        delta = scale (sum of coefficient_c table_c over T and supp z_v + (1 - subtract) (c - t)) + edits

    The forms differ per slot, in one formula (`selection.coefficients_of`, `movement.delta_of`).
    """

    def __init__(self, tables: SlotTables, *, capacity: int, precision: str = "tf32x3") -> None:
        """`tables` must not grow any more. `capacity`: entries of one launch.

        `precision`: of the two products, as `tl.dot` names it (or "ieee").
        """
        self.tables, realignment = tables, tables.realignment
        self.weight_SD, self.bias_S = realignment.text_projection.weight.detach(), realignment.text_projection.bias
        self.directions_KS, self.table_KD = realignment.directions_KS, realignment.table_KD
        self.bias_D = realignment.bias_D
        self.active_concepts = realignment.active_concepts
        self.capacity, self.precision = capacity, precision
        concepts, shared, hidden = self.sizes
        device, width = self.table_KD.device, 2 * self.active_concepts
        self.shared_ES = torch.empty(capacity, shared, device=device)
        self.products_EK = torch.empty(capacity, concepts, device=device)
        self.ids_E2k = torch.empty(capacity, width, dtype=torch.int32, device=device)
        self.coefficients_E2k = torch.empty(capacity, width, device=device)
        self.count_E = torch.empty(capacity, dtype=torch.int32, device=device)
        self.edits_EX = torch.empty(capacity, MAX_EDITS, device=device)
        self.partial_EPD = torch.empty(capacity, PARTS, hidden, device=device)
        gathered = (tables.code.cosines, tables.settings_MC, tables.direction_MD, tables.tally_T3, *tables.edits[1:])
        for weight in (self.weight_SD, self.bias_S, self.directions_KS, self.table_KD, self.bias_D, *gathered):
            assert weight.is_contiguous()
            assert weight.dtype == torch.float32

    @property
    def sizes(self) -> tuple[int, int, int]:
        """K, S, D."""
        concepts, shared = self.directions_KS.shape
        return concepts, shared, self.table_KD.shape[1]

    @property
    def variants(self) -> tuple[int, ...]:
        """Bounds of launches that are compiled differently."""
        return tuple(dict.fromkeys((1, self.capacity)))

    def __call__(self, plan: Tensor, bound: int, mean_ND: Tensor, base: Stream, twin: Stream) -> None:
        """Steers all entries of a plan, at most `bound`, each in the stream that its flag names."""
        for first in range(0, bound, self.capacity):
            self.launch(plan, min(bound - first, self.capacity), Streams(mean_ND, *base, *twin), first=first)

    def launch(self, plan: Tensor, bound: int, streams: Streams, *, first: int = 0) -> None:
        """Steers the plan's entries first .. first + bound - 1 in place; a row stands in one entry at most.

        `bound` [1, capacity] is the most entries that there can be, not their number: that is the plan's. A step with
        more than `capacity` takes several calls.
        """
        assert 0 < bound <= self.capacity
        assert plan.dtype == torch.int32
        assert plan.is_contiguous()
        assert plan.shape[1] == PLAN_COLUMNS.value
        assert all(rows.dtype == streams.mean_ND.dtype and rows.stride(1) == 1 for rows in streams)
        self._encode(plan, bound, streams.mean_ND, first)
        self._select(plan, bound, first)
        self._move(plan, bound, streams, first)

    def _encode(self, plan: Tensor, bound: int, mean_ND: Tensor, first: int) -> None:
        """Text means to the shared space, and to their products with every concept."""
        concepts, shared, hidden = self.sizes
        project = product_options(bound, hidden, shared, gather=True, precision=self.precision)
        product_kernel[product_grid(bound, project)](
            plan, mean_ND, self.weight_SD, self.bias_S, self.shared_ES, first, bound, mean_ND.stride(0), **project
        )
        compare = product_options(bound, shared, concepts, gather=False, precision=self.precision)
        product_kernel[product_grid(bound, compare)](
            plan, self.shared_ES, self.directions_KS, self.bias_S, self.products_EK, first, bound, shared, **compare
        )

    def _select(self, plan: Tensor, bound: int, first: int) -> None:
        concepts, shared, _ = self.sizes
        chosen = (self.ids_E2k, self.coefficients_E2k, self.count_E, self.edits_EX)
        select_kernel[(bound,)](
            plan,
            self.shared_ES,
            self.products_EK,
            self.tables.code.cosines,
            self.tables.code.active,
            self.tables.settings_MC,
            *self.tables.edits,
            *chosen,
            first,
            bound,
            **selection_options(shared, concepts, self.active_concepts),
        )

    def _move(self, plan: Tensor, bound: int, streams: Streams, first: int) -> None:
        _, _, hidden = self.sizes
        chosen = (self.ids_E2k, self.coefficients_E2k, self.count_E)
        sums = accumulation_options(hidden, self.active_concepts)
        accumulate_kernel[(min(bound, LANES), triton.cdiv(hidden, sums["BLOCK_D"]), PARTS)](
            plan, *chosen, self.table_KD, self.partial_EPD, first, bound, **sums
        )
        strides: list[Any] = [rows.stride(0) for rows in streams]
        finish_kernel[(bound,)](
            plan,
            self.partial_EPD,
            self.edits_EX,
            self.tables.edits.concept_ids,
            self.table_KD,
            self.bias_D,
            *streams,
            self.tables.settings_MC,
            self.tables.direction_MD,
            self.tables.tally_T3,
            first,
            bound,
            *strides,
            **finish_options(hidden),
        )


def product_options(bound: int, inputs: int, outputs: int, *, gather: bool, precision: str) -> dict[str, Any]:
    """Tiles of a product: about 40 KiB of the weight on its way to every SM; narrower where the outputs are few.

    32 entries a tile at most: 64 would take the Hopper instruction, which has its operands in shared memory, where
    tf32x3 must first write them split.
    """
    narrow = outputs < 64 * 256
    return {
        "INPUTS": inputs,
        "OUTPUTS": outputs,
        "GATHER": gather,
        "BIAS": gather,
        "BLOCK_E": 16 if bound <= 16 else 32,
        "BLOCK_O": 32 if narrow else 64,
        "BLOCK_I": min(64, max(16, triton.next_power_of_2(inputs))),
        "PRECISION": precision,
        "num_warps": 4,
        "num_stages": 6 if narrow else 4,
    }


def product_grid(bound: int, options: dict[str, Any]) -> tuple[int, int]:
    """Entry tiles are neighbours: they read a weight tile from the cache."""
    return -(-bound // options["BLOCK_E"]), -(-options["OUTPUTS"] // options["BLOCK_O"])


def selection_options(shared: int, concepts: int, active: int) -> dict[str, Any]:
    """One program holds all keys: 32 a thread at 32,768 concepts."""
    block = max(128, triton.next_power_of_2(concepts))
    return {
        "SHARED": shared,
        "CONCEPTS": concepts,
        "ACTIVE": active,
        "BLOCK_S": triton.next_power_of_2(shared),
        "BLOCK_K": block,
        "BLOCK_L": min(block, 4096),
        "BLOCK_W": triton.next_power_of_2(2 * active),
        "num_warps": min(32, max(4, block // 512)),
    }


def accumulation_options(hidden: int, active: int) -> dict[str, Any]:
    """A share of 2k = 512 ids is one block of rows, all of it in flight at once."""
    rows = min(64, max(1, triton.next_power_of_2(triton.cdiv(2 * active, PARTS))))
    return {"HIDDEN": hidden, "ACTIVE": active, "PARTS": PARTS, "BLOCK_R": rows, "BLOCK_D": 128, "num_warps": 8}


def finish_options(hidden: int) -> dict[str, Any]:
    """16 columns a thread at 4,096."""
    return {"HIDDEN": hidden, "PARTS": PARTS, "BLOCK_D": triton.next_power_of_2(hidden), "num_warps": 8}
