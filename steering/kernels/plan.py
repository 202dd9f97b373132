"""Who is steered in this step, as the kernels read it from the device. Knows columns, no mathematics.

The plan is int32 [1 + capacity, 7], see `steering.slot_tables`. Nothing of it is
read on the host, so that one captured graph serves every step; with n = 0 every kernel returns at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from steering import slot_tables

PLAN_COLUMNS = tl.constexpr(len(slot_tables.PLAN_COLUMNS))
ROW, SLOT, TALLY, FLAGS, COUNTED, IN_TWIN = (
    tl.constexpr(number)
    for number in (
        slot_tables.ROW, slot_tables.SLOT, slot_tables.TALLY, slot_tables.FLAGS, slot_tables.COUNTED,
        slot_tables.IN_TWIN,
    )
)  # fmt: skip


@triton.jit
def entries_here(plan, first, bound):
    """How many entries this launch has: of those from `first` on, at most `bound`; not above 0 if there is none."""
    return tl.minimum(tl.load(plan) - first, bound)


@triton.jit
def read_plan(plan, entry, column: tl.constexpr):
    """One column of one entry, or of a vector of entries; `entry` counts from the plan's start."""
    return tl.load(plan + (1 + entry) * PLAN_COLUMNS + column)
