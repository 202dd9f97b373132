"""From the products with all concepts to the coefficients of the few that move a position.

Shapes: E entries, S shared width, K concepts, k active concepts, M slots, L lanes (lane l has concepts l, l + L, ...),
W concepts of both supports (at most 2k), X edits.

One program per entry. The keys of all K products stay in registers while their k-th largest is found; what follows
reads the products again, which costs less than keeping them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from steering import request, slot_tables
from steering.kernels.plan import SLOT, entries_here, read_plan

BETA_UP, BETA_DOWN, SCALE, DENSE, SUBTRACT, RANDOM, MAX_SHIFT, EDITS = (
    tl.constexpr(number)
    for number in (
        slot_tables.BETA_UP, slot_tables.BETA_DOWN, slot_tables.SCALE, slot_tables.DENSE, slot_tables.SUBTRACT,
        slot_tables.RANDOM, slot_tables.MAX_SHIFT, slot_tables.EDITS,
    )
)  # fmt: skip
SETTINGS = tl.constexpr(len(slot_tables.SETTINGS_COLUMNS))
"""Columns of a slot's settings; the others are not ours."""
MAX_EDITS = tl.constexpr(request.MAX_EDITS)
LOWEST_KEY = tl.constexpr(-(2**31))
"""Key of no number (but of a NaN): the padding's."""


@triton.jit
def read_setting(settings_MC, slot, column: tl.constexpr):
    """One of a slot's settings."""
    return tl.load(settings_MC + slot * SETTINGS + column)


@triton.jit
def sort_key(value):
    """An int32 in the order of the float32."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def cosine_to_activation(cosine):
    """a = 2 - |x - w|, as in `steering.sparse_autoencoder`."""
    return 2.0 - tl.sqrt(tl.maximum(2.0 - 2.0 * cosine, 1e-8))


@triton.jit
def separate_largest(key_K, id_K, k, BLOCK_K: tl.constexpr):
    """(threshold, end): the k largest keys are those above the threshold, and those equal to it with id < end.

    The threshold is found bit by bit from the top, and taken as soon as exactly k keys reach it.
    """
    one = tl.full((), 1, tl.int32)
    threshold = tl.full((), LOWEST_KEY, tl.int32)
    reached = tl.full((), BLOCK_K, tl.int32)
    bit = tl.full((), 31, tl.int32)
    while (bit >= 0) & (reached != k):
        candidate = threshold ^ (one << bit)
        count = tl.sum((key_K >= candidate).to(tl.int32), axis=0)
        threshold = tl.where(count >= k, candidate, threshold)
        reached = tl.where(count >= k, count, reached)
        bit -= 1

    end = tl.full((), BLOCK_K, tl.int32)
    if reached > k:
        wanted = k - tl.sum((key_K > threshold).to(tl.int32), axis=0)
        end = tl.full((), 0, tl.int32)
        step = tl.full((), BLOCK_K, tl.int32)
        while step > 0:
            count = tl.sum(((key_K == threshold) & (id_K < end + step)).to(tl.int32), axis=0)
            end = tl.where(count <= wanted, end + step, end)
            step = step // 2
    return threshold, end


@triton.jit
def inverse_norm(shared_S, SHARED: tl.constexpr, BLOCK_S: tl.constexpr):
    """1 / max(|shared|, 1e-12) of one row."""
    column_S = tl.arange(0, BLOCK_S)
    value_S = tl.load(shared_S + column_S, mask=column_S < SHARED, other=0.0)
    return tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(tl.sum(value_S * value_S, axis=0)), 1e-12))


@triton.jit
def in_support(products_K, active_K, id_L, threshold, end, CONCEPTS: tl.constexpr):
    """Whether concepts are in the text's support or the image's."""
    key_L = sort_key(tl.load(products_K + id_L, mask=id_L < CONCEPTS, other=0.0))
    in_image_L = tl.load(active_K + id_L, mask=id_L < CONCEPTS, other=0) != 0
    in_text_L = (key_L > threshold) | ((key_L == threshold) & (id_L < end))
    return (in_text_L | in_image_L) & (id_L < CONCEPTS)


@triton.jit
def list_supports(
    products_K,
    active_K,
    ids_2k,
    threshold,
    end,
    CONCEPTS: tl.constexpr,
    ACTIVE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Writes the concepts of either support, lane after lane, and says how many they are.

    Every lane first counts its own, so that one running sum over the lanes places them all.
    """
    lane_L = tl.arange(0, BLOCK_L)
    count_L = tl.zeros([BLOCK_L], tl.int32)
    for start in range(0, BLOCK_K, BLOCK_L):
        count_L += in_support(products_K, active_K, start + lane_L, threshold, end, CONCEPTS).to(tl.int32)
    place_L = tl.cumsum(count_L, axis=0) - count_L
    for start in range(0, BLOCK_K, BLOCK_L):
        either_L = in_support(products_K, active_K, start + lane_L, threshold, end, CONCEPTS)
        tl.store(ids_2k + place_L, start + lane_L, mask=either_L & (place_L < 2 * ACTIVE))
        place_L += either_L.to(tl.int32)
    return tl.minimum(tl.sum(count_L, axis=0), 2 * ACTIVE)


@triton.jit
def coefficients_of(text_W, image_W, in_text_W, in_image_W, settings_MC, slot):
    """What each listed concept's row of the table is multiplied with, before the scale."""
    dense = read_setting(settings_MC, slot, DENSE)
    text_W = cosine_to_activation(text_W) * tl.maximum(in_text_W.to(tl.float32), dense)
    image_W = cosine_to_activation(image_W) * tl.maximum(in_image_W.to(tl.float32), dense)
    gap_W = image_W - text_W
    up_W = read_setting(settings_MC, slot, BETA_UP) * tl.maximum(gap_W, 0.0)
    down_W = read_setting(settings_MC, slot, BETA_DOWN) * tl.maximum(-gap_W, 0.0)
    return text_W * (1.0 - read_setting(settings_MC, slot, SUBTRACT)) + (up_W - down_W)


@triton.jit(do_not_specialize=["first", "bound"])
def select_kernel(
    plan,
    shared_ES,
    products_EK,
    cosines_MK,
    active_MK,
    settings_MC,
    edit_ids_MX,
    edit_gains_MX,
    edit_adds_MX,
    ids_E2k,
    coefficients_E2k,
    count_E,
    edits_EX,
    first,
    bound,
    SHARED: tl.constexpr,
    CONCEPTS: tl.constexpr,
    ACTIVE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Ids and coefficients of the concepts in either support, how many they are, and coefficients of the edits; grid
    (entries,)."""
    entry = tl.program_id(0)
    if entry >= entries_here(plan, first, bound):
        return
    slot = read_plan(plan, first + entry, SLOT).to(tl.int64)
    products_K = products_EK + entry.to(tl.int64) * CONCEPTS
    cosines_K, active_K = cosines_MK + slot * CONCEPTS, active_MK + slot * CONCEPTS
    ids_2k = ids_E2k + entry * 2 * ACTIVE

    id_K = tl.arange(0, BLOCK_K)
    product_K = tl.load(products_K + id_K, mask=id_K < CONCEPTS, other=0.0)
    key_K = tl.where(id_K < CONCEPTS, sort_key(product_K), LOWEST_KEY)
    threshold, end = separate_largest(key_K, id_K, ACTIVE, BLOCK_K)
    count = list_supports(products_K, active_K, ids_2k, threshold, end, CONCEPTS, ACTIVE, BLOCK_K, BLOCK_L)
    tl.debug_barrier()  # what follows reads ids that other threads of this program wrote

    place_W = tl.arange(0, BLOCK_W)
    id_W = tl.load(ids_2k + place_W, mask=place_W < count, other=0)
    product_W = tl.load(products_K + id_W)
    key_W = sort_key(product_W)
    in_text_W = (key_W > threshold) | ((key_W == threshold) & (id_W < end))
    text_W = product_W * inverse_norm(shared_ES + entry * SHARED, SHARED, BLOCK_S)
    in_image_W = tl.load(active_K + id_W) != 0
    value_W = coefficients_of(text_W, tl.load(cosines_K + id_W), in_text_W, in_image_W, settings_MC, slot)
    tl.store(coefficients_E2k + entry * 2 * ACTIVE + place_W, value_W, mask=place_W < count)
    tl.store(count_E + entry, count)

    place_X = tl.arange(0, MAX_EDITS)
    edited_X = place_X < read_setting(settings_MC, slot, EDITS).to(tl.int32)
    id_X = tl.load(edit_ids_MX + slot * MAX_EDITS + place_X, mask=edited_X, other=0)
    product_X = tl.load(products_K + id_X, mask=edited_X, other=0.0)
    key_X = sort_key(product_X)
    in_text_X = (key_X > threshold) | ((key_X == threshold) & (id_X < end))
    text_X = cosine_to_activation(product_X * inverse_norm(shared_ES + entry * SHARED, SHARED, BLOCK_S))
    gain_X = tl.load(edit_gains_MX + slot * MAX_EDITS + place_X, mask=edited_X, other=0.0)
    add_X = tl.load(edit_adds_MX + slot * MAX_EDITS + place_X, mask=edited_X, other=0.0)
    tl.store(edits_EX + entry * MAX_EDITS + place_X, gain_X * text_X * in_text_X.to(tl.float32) + add_X, mask=edited_X)
