"""A few rows times a large float32 weight, transposed. Knows nothing of concepts.

Shapes: E entries, I inputs, O outputs. Its time is that of reading the weight once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from steering.kernels.plan import PLAN_COLUMNS, ROW, entries_here


@triton.jit(do_not_specialize=["first", "bound"])
def product_kernel(
    plan,
    inputs,
    weight_OI,
    bias_O,
    outputs_EO,
    first,
    bound,
    input_stride,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GATHER: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """outputs[e] = weight inputs[e] + bias; grid (entry tiles, output tiles), so that neighbours share a weight tile.

    With GATHER the input of an entry is the row that the plan names, without it the row of the same number.
    """
    entries = entries_here(plan, first, bound)
    if tl.program_id(0) * BLOCK_E >= entries:
        return
    entry_E = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    output_O = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    input_I = tl.arange(0, BLOCK_I)
    listed_E = entry_E < entries
    row_E = entry_E
    if GATHER:
        row_E = tl.load(plan + (1 + first + entry_E) * PLAN_COLUMNS + ROW, mask=listed_E, other=0)
    inputs_EI = inputs + row_E.to(tl.int64)[:, None] * input_stride + input_I[None, :]
    weight_IO = weight_OI + output_O.to(tl.int64)[None, :] * INPUTS + input_I[:, None]
    sum_EO = tl.zeros([BLOCK_E, BLOCK_O], tl.float32)
    for start in range(0, INPUTS, BLOCK_I):
        here_I = start + input_I < INPUTS
        x_EI = tl.load(inputs_EI + start, mask=listed_E[:, None] & here_I[None, :], other=0.0).to(tl.float32)
        w_IO = tl.load(weight_IO + start, mask=here_I[:, None] & (output_O < OUTPUTS)[None, :], other=0.0)
        sum_EO = tl.dot(x_EI, w_IO, sum_EO, input_precision=PRECISION)
    if BIAS:
        sum_EO += tl.load(bias_O + output_O, mask=output_O < OUTPUTS, other=0.0)[None, :]
    places_EO = outputs_EO + entry_E.to(tl.int64)[:, None] * OUTPUTS + output_O[None, :]
    tl.store(places_EO, sum_EO, mask=listed_E[:, None] & (output_O < OUTPUTS)[None, :])
