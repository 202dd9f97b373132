"""From the products with all concepts to the coefficients of the few that move a position.

Shapes: E entries, S shared width, K concepts, k active concepts, M slots, C concepts of one chunk.

One program per entry. The keys of all K products stay in registers while their k-th largest is found; what follows
reads the products again chunk by chunk, which costs less than keeping them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from steering.kernels.plan import SLOT, entries_here, read_plan

BETA_UP = tl.constexpr(0)
BETA_DOWN = tl.constexpr(1)
SCALE = tl.constexpr(2)
DENSE = tl.constexpr(3)
SUBTRACT = tl.constexpr(4)
RANDOM = tl.constexpr(5)
SETTINGS = tl.constexpr(8)
"""Columns of a slot's settings; the others are not ours."""
LOWEST_KEY = tl.constexpr(-(2**31))
"""Key of no number (but of a NaN): the padding's."""


@triton.jit
def read_setting(settings_M8, slot, column: tl.constexpr):
    """One of a slot's settings."""
    return tl.load(settings_M8 + slot * SETTINGS + column)


@triton.jit
def sort_key(value):
    """An int32 in the order of the float32."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def cosine_to_activation(cosine):
    """a = 2 - |x - w|, as in `steering.sparse_autoencoder`."""
    return 2.0 - tl.sqrt_rn(tl.maximum(2.0 - 2.0 * cosine, 1e-8))


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
def coefficients_of(text_C, image_C, in_text_C, in_image_C, settings_M8, slot):
    """What one unit of the table's rows is worth for each concept; 0 off the support."""
    dense = read_setting(settings_M8, slot, DENSE)
    text_C = cosine_to_activation(text_C) * tl.maximum(in_text_C.to(tl.float32), dense)
    image_C = cosine_to_activation(image_C) * tl.maximum(in_image_C.to(tl.float32), dense)
    gap_C = image_C - text_C
    up_C = read_setting(settings_M8, slot, BETA_UP) * tl.maximum(gap_C, 0.0)
    down_C = read_setting(settings_M8, slot, BETA_DOWN) * tl.maximum(-gap_C, 0.0)
    return text_C * (1.0 - read_setting(settings_M8, slot, SUBTRACT)) + (up_C - down_C)


@triton.jit(do_not_specialize=["first", "bound"])
def select_kernel(
    plan,
    shared_ES,
    products_EK,
    cosines_MK,
    active_MK,
    settings_M8,
    ids_E2k,
    coefficients_E2k,
    count_E,
    first,
    bound,
    SHARED: tl.constexpr,
    CONCEPTS: tl.constexpr,
    ACTIVE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Ids and coefficients of the concepts in either support, in rising order; grid (entries,)."""
    entry = tl.program_id(0)
    if entry >= entries_here(plan, first, bound):
        return
    slot = read_plan(plan, first + entry, SLOT).to(tl.int64)
    products_K = products_EK + entry.to(tl.int64) * CONCEPTS
    id_K = tl.arange(0, BLOCK_K)
    product_K = tl.load(products_K + id_K, mask=id_K < CONCEPTS, other=0.0)
    key_K = tl.where(id_K < CONCEPTS, sort_key(product_K), LOWEST_KEY)
    threshold, end = separate_largest(key_K, id_K, ACTIVE, BLOCK_K)
    to_cosine = inverse_norm(shared_ES + entry * SHARED, SHARED, BLOCK_S)

    total = tl.full((), 0, tl.int32)
    for start in range(0, BLOCK_K, BLOCK_C):
        id_C = start + tl.arange(0, BLOCK_C)
        valid_C = id_C < CONCEPTS
        product_C = tl.load(products_K + id_C, mask=valid_C, other=0.0)
        image_C = tl.load(cosines_MK + slot * CONCEPTS + id_C, mask=valid_C, other=0.0)
        in_image_C = tl.load(active_MK + slot * CONCEPTS + id_C, mask=valid_C, other=0) != 0
        key_C = sort_key(product_C)
        in_text_C = valid_C & ((key_C > threshold) | ((key_C == threshold) & (id_C < end)))
        value_C = coefficients_of(product_C * to_cosine, image_C, in_text_C, in_image_C, settings_M8, slot)
        either_C = in_text_C | in_image_C
        place_C = total + tl.cumsum(either_C.to(tl.int32), axis=0) - 1
        kept_C = either_C & (place_C < 2 * ACTIVE)
        tl.store(ids_E2k + entry * 2 * ACTIVE + place_C, id_C, mask=kept_C)
        tl.store(coefficients_E2k + entry * 2 * ACTIVE + place_C, value_C, mask=kept_C)
        total += tl.sum(either_C.to(tl.int32), axis=0)
    tl.store(count_E + entry, tl.minimum(total, 2 * ACTIVE))
