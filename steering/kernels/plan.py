"""Who is steered in this step, as the kernels read it from the device. Knows columns, no mathematics.

The plan is int32 [1 + capacity, PLAN_COLUMNS]: its first number is n, entry i stands in row 1 + i. Nothing of it is
read on the host, so that one captured graph serves every step; with n = 0 every kernel returns at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

PLAN_COLUMNS = tl.constexpr(6)
ROW = tl.constexpr(2)
"""Row of the entry in the token batch."""
SLOT = tl.constexpr(3)
"""Row of the slot tables."""
TALLY = tl.constexpr(4)
"""Row of the tallies."""
FLAGS = tl.constexpr(5)
COUNTED = tl.constexpr(1)
"""Flag: the entry is tallied."""
TWIN = tl.constexpr(2)
"""Flag: the entry is written to the twin's rows."""


@triton.jit
def entries_here(plan, first, bound):
    """How many entries this launch has: of those from `first` on, at most `bound`; not above 0 if there is none."""
    return tl.minimum(tl.load(plan) - first, bound)


@triton.jit
def read_plan(plan, entry, column: tl.constexpr):
    """One column of one entry, or of a vector of entries; `entry` counts from the plan's start."""
    return tl.load(plan + (1 + entry) * PLAN_COLUMNS + column)
