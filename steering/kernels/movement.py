"""From coefficients to moved positions: the sum over the table's rows, and the step itself with its tally.

Shapes: E entries, N token rows, D hidden size, k active concepts, M slots, P parts of the sum, T tallies, X edits, R
rows of the table at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from steering.kernels.plan import COUNTED, FLAGS, IN_TWIN, ROW, SLOT, TALLY, entries_here, read_plan
from steering.kernels.selection import EDITS, MAX_EDITS, MAX_SHIFT, RANDOM, SCALE, SUBTRACT, read_setting


@triton.jit(do_not_specialize=["first", "bound"])
def accumulate_kernel(
    plan,
    ids_E2k,
    coefficients_E2k,
    count_E,
    table_KD,
    partial_EPD,
    first,
    bound,
    HIDDEN: tl.constexpr,
    ACTIVE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """partial[e, p] = the p-th share of an entry's weighted table rows; grid (lanes of entries, column tiles, parts).

    The lanes walk through the entries, so that a launch for many entries is no larger than for a few when it is idle.
    """
    entries = entries_here(plan, first, bound)
    part = tl.program_id(2)
    column_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    for entry in range(tl.program_id(0), entries, tl.num_programs(0)):
        count = tl.load(count_E + entry)
        share = tl.cdiv(count, PARTS)
        end = tl.minimum((part + 1) * share, count)
        sum_RD = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        for start in range(part * share, end, BLOCK_R):
            place_R = start + tl.arange(0, BLOCK_R)
            id_R = tl.load(ids_E2k + entry * 2 * ACTIVE + place_R, mask=place_R < end, other=0)
            value_R = tl.load(coefficients_E2k + entry * 2 * ACTIVE + place_R, mask=place_R < end, other=0.0)
            table_RD = table_KD + id_R.to(tl.int64)[:, None] * HIDDEN + column_D[None, :]
            wanted_RD = (place_R < end)[:, None] & (column_D < HIDDEN)[None, :]
            sum_RD += value_R[:, None] * tl.load(table_RD, mask=wanted_RD, other=0.0)
        places_D = partial_EPD + (entry * PARTS + part).to(tl.int64) * HIDDEN + column_D
        tl.store(places_D, tl.sum(sum_RD, axis=0), mask=column_D < HIDDEN)


@triton.jit
def length(value_D):
    """Euclidean norm."""
    return tl.sqrt_rn(tl.sum(value_D * value_D, axis=0))


@triton.jit
def delta_of(
    partial_PD, bias_D, text_D, column_D, inside_D, settings_MC, slot, HIDDEN: tl.constexpr, PARTS: tl.constexpr
):
    """scale (the weighted rows + (1 - subtract) (bias - t))."""
    absolute = 1.0 - read_setting(settings_MC, slot, SUBTRACT)
    delta_D = absolute * (tl.load(bias_D + column_D, mask=inside_D, other=0.0) - text_D)
    for part in tl.static_range(PARTS):
        delta_D += tl.load(partial_PD + part * HIDDEN + column_D, mask=inside_D, other=0.0)
    return read_setting(settings_MC, slot, SCALE) * delta_D


@triton.jit
def edited_by(edits_EX, edit_ids_MX, table_KD, entry, slot, column_D, inside_D, count, HIDDEN: tl.constexpr):
    """The weighted table rows of an entry's edits, of which most have none."""
    sum_D = tl.zeros_like(column_D).to(tl.float32)
    for place in range(count):
        concept = tl.load(edit_ids_MX + slot * MAX_EDITS + place)
        row_D = tl.load(table_KD + concept * HIDDEN + column_D, mask=inside_D, other=0.0)
        sum_D += tl.load(edits_EX + entry * MAX_EDITS + place) * row_D
    return sum_D


@triton.jit(do_not_specialize=["first", "bound"])
def finish_kernel(
    plan,
    partial_EPD,
    edits_EX,
    edit_ids_MX,
    table_KD,
    bias_D,
    mean_ND,
    hidden_ND,
    residual_ND,
    twin_hidden_ND,
    twin_residual_ND,
    settings_MC,
    direction_MD,
    tallies_T3,
    first,
    bound,
    mean_stride,
    hidden_stride,
    residual_stride,
    twin_hidden_stride,
    twin_residual_stride,
    HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Moves each entry's stream by its delta and tallies how far; grid (entries,)."""
    entry = tl.program_id(0)
    if entry >= entries_here(plan, first, bound):
        return
    row = read_plan(plan, first + entry, ROW).to(tl.int64)
    slot = read_plan(plan, first + entry, SLOT).to(tl.int64)
    flags = read_plan(plan, first + entry, FLAGS)
    column_D = tl.arange(0, BLOCK_D)
    inside_D = column_D < HIDDEN

    text_D = tl.load(mean_ND + row * mean_stride + column_D, mask=inside_D, other=0.0).to(tl.float32)
    partial_PD = partial_EPD + entry.to(tl.int64) * PARTS * HIDDEN
    delta_D = delta_of(partial_PD, bias_D, text_D, column_D, inside_D, settings_MC, slot, HIDDEN, PARTS)
    random_D = column_D < tl.where(read_setting(settings_MC, slot, RANDOM) != 0, HIDDEN, 0)
    direction_D = tl.load(direction_MD + slot * HIDDEN + column_D, mask=random_D, other=0.0)
    delta_D = tl.where(random_D, length(delta_D) * direction_D, delta_D)
    edits = read_setting(settings_MC, slot, EDITS).to(tl.int32)
    delta_D += edited_by(edits_EX, edit_ids_MX, table_KD, entry, slot, column_D, inside_D, edits, HIDDEN)

    hidden_D = tl.load(hidden_ND + row * hidden_stride + column_D, mask=inside_D, other=0.0)
    residual_D = tl.load(residual_ND + row * residual_stride + column_D, mask=inside_D, other=0.0)
    stream_D = (hidden_D.to(tl.float32) + residual_D.to(tl.float32)).to(residual_D.dtype).to(tl.float32)
    shift = tl.div_rn(length(delta_D), length(stream_D))
    share = tl.minimum(tl.where(shift > 0, read_setting(settings_MC, slot, MAX_SHIFT) / shift, 1.0), 1.0)
    moved_D = (stream_D + delta_D * share).to(residual_D.dtype)
    base_D = column_D < tl.where((flags & IN_TWIN) == 0, HIDDEN, 0)
    twin_D = column_D < tl.where((flags & IN_TWIN) == 0, 0, HIDDEN)
    zero_D = tl.zeros([BLOCK_D], residual_D.dtype)
    tl.store(hidden_ND + row * hidden_stride + column_D, zero_D, mask=base_D)
    tl.store(residual_ND + row * residual_stride + column_D, moved_D, mask=base_D)
    tl.store(twin_hidden_ND + row * twin_hidden_stride + column_D, zero_D, mask=twin_D)
    tl.store(twin_residual_ND + row * twin_residual_stride + column_D, moved_D, mask=twin_D)

    tally_3 = tallies_T3 + read_plan(plan, first + entry, TALLY) * 3
    counted = (flags & COUNTED) != 0
    tl.atomic_add(tally_3, (shift > 0).to(tl.float32), mask=counted)
    tl.atomic_add(tally_3 + 1, shift * share, mask=counted)
    tl.atomic_add(tally_3 + 2, (share < 1).to(tl.float32), mask=counted & (share < 1))
