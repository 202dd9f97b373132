"""The kernels of realignment against torch in float64, interpreted; `test_kernels.py` runs this.

Triton decides at import whether it interprets, hence TRITON_INTERPRET=1 must stand before Python starts.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.kernels.launch import RealignKernels, Streams
from steering.realignment import Realignment
from steering.request import MAX_EDITS
from steering.settings import Edit
from steering.slot_tables import EDITS, FLAGS, MAX_SHIFT, PLAN_COLUMNS, ROW, SlotTables
from steering.sparse_autoencoder import VisionLanguageSAE

COUNTED, TWIN = 1, 2
PUBLISHED, DIFFERENCE, UNION = (0, 0), (0, 1), (1, 1)
"""(dense, subtract) of each form."""
ROWS, SLOTS, TALLIES = 11, 6, 5
TOLERANCES = {torch.float32: (2e-5, 1e-4), torch.float16: (2e-4, 1e-3), torch.bfloat16: (4e-2, 1e-2)}
"""Of states and of tallies. bfloat16 is wide because the interpreter rounds to it towards zero."""


class Entry(NamedTuple):
    row: int
    slot: int
    tally: int
    flags: int


class Case(NamedTuple):
    """One realignment with everything that its kernels read and write."""

    tables: SlotTables
    streams: Streams

    @property
    def realignment(self) -> Realignment:
        return self.tables.realignment

    def copy(self) -> Case:
        copies = {id(rows): rows.clone() for rows in self.streams}
        tables = copy.copy(self.tables)
        tables.tally_T3 = self.tables.tally_T3.clone()
        return Case(tables, Streams(*(copies[id(rows)] for rows in self.streams)))


@torch.no_grad()
def make_case(hidden=24, shared=20, concepts=40, active=5, dtype=torch.float32, twin=True, seed=0) -> Case:
    torch.manual_seed(seed)
    realignment = Realignment(AuxiliaryAutoencoder(hidden, shared), VisionLanguageSAE(shared, concepts, active))
    tables = SlotTables(
        realignment, torch.zeros(0, hidden), slots=SLOTS, tallies=TALLIES, device=torch.device("cpu")
    )  # fmt: skip
    tables.code = realignment.encode_image(torch.randn(SLOTS, hidden))
    tables.tally_T3 = torch.rand(TALLIES, 3)
    tables.direction_MD = torch.nn.functional.normalize(torch.randn(SLOTS, hidden), dim=-1)
    tables.settings_MC.fill_(7.0)
    tables.settings_MC[:, MAX_SHIFT], tables.settings_MC[:, EDITS] = float("inf"), 0
    tables._set_edits(1, (Edit(3, 0.0, 0.0), Edit(17, 1.0, 0.5), Edit(concepts - 1, 2.0, -0.25)))
    tables._set_edits(5, tuple(Edit(concept, 0.0, 0.125) for concept in range(MAX_EDITS)))
    tables.settings_MC[1, EDITS], tables.settings_MC[5, EDITS] = 3, MAX_EDITS
    tables.settings_MC[4, MAX_SHIFT] = 0.25
    forms = (DIFFERENCE, PUBLISHED, DIFFERENCE, UNION, UNION, PUBLISHED)
    for slot, form in enumerate(forms):
        row = [0.3 + 0.1 * slot, 0.8 - 0.1 * slot, 1.5 - slot, *form, slot in (2, 5)]
        tables.settings_MC[slot, :6] = torch.tensor(row)
    streams = [torch.randn(ROWS, hidden).to(dtype) for _ in range(3)]
    streams += [rows.clone() for rows in streams[1:]] if twin else streams[1:]
    return Case(tables, Streams(*streams))


def make_plan(entries: list[Entry], capacity: int) -> torch.Tensor:
    """The rows beyond the entries are junk that must not be followed."""
    plan = torch.full((1 + capacity, len(PLAN_COLUMNS)), 2**30, dtype=torch.int32)
    plan[0, 0] = len(entries)
    for index, entry in enumerate(entries):
        plan[1 + index, ROW : FLAGS + 1] = torch.tensor(entry)
    return plan


def run(case: Case, entries: list[Entry], *, bound=16, capacity=16, first=0) -> None:
    kernels = RealignKernels(case.tables, capacity=capacity)
    kernels.launch(make_plan(entries, 20), bound, case.streams, first=first)


def largest(value_K: torch.Tensor, k: int) -> torch.Tensor:
    """Membership in the k largest, ties by lowest index."""
    order = sorted(range(len(value_K)), key=lambda index: (-float(value_K[index]), index))[:k]
    return torch.zeros(len(value_K), dtype=torch.bool).index_fill(0, torch.tensor(order), True)


def activation(cosine: torch.Tensor) -> torch.Tensor:
    return 2 - (2 - 2 * cosine).clamp(min=1e-8).sqrt()


def expected_delta(case: Case, entry: Entry) -> torch.Tensor:
    """The equations written down again, dense and in float64."""
    realignment, tables = case.realignment, case.tables
    up, down, scale, dense, subtract, random = tables.settings_MC[entry.slot, :6].double().tolist()
    t = case.streams.mean_ND[entry.row].double()
    x = realignment.text_projection.weight.double() @ t + realignment.text_projection.bias.double()
    cosine = (realignment.directions_KS.double() @ x) / x.norm().clamp(min=1e-12)
    in_text, in_image = largest(cosine, realignment.active_concepts), tables.code.active[entry.slot]
    a_t, a_v = activation(cosine), activation(tables.code.cosines[entry.slot].double())
    if not dense:
        a_t, a_v = a_t * in_text, a_v * in_image
    gap = a_v - a_t
    mixed = a_t + up * gap.clamp(min=0) - down * (-gap).clamp(min=0)
    coefficient = (mixed - subtract * a_t) * (in_text | in_image)
    delta = coefficient @ realignment.table_KD.double() + (1 - subtract) * (realignment.bias_D.double() - t)
    delta = scale * delta
    delta = delta.norm() * tables.direction_MD[entry.slot].double() if random else delta
    ids, gain, add = (table[entry.slot] for table in tables.edits)
    for concept, more, plus in zip(ids.tolist(), gain.tolist(), add.tolist(), strict=True):
        z_t = float(activation(cosine)[concept]) if in_text[concept] else 0.0
        delta = delta + (more * z_t + plus) * realignment.table_KD[concept].double()
    return delta


@torch.no_grad()
def expected(case: Case, entries: list[Entry]) -> Case:
    after = case.copy()
    for entry in entries:
        h = case.streams.hidden_ND[entry.row] + case.streams.residual_ND[entry.row]
        delta = expected_delta(case, entry)
        share = min(1.0, float(case.tables.settings_MC[entry.slot, MAX_SHIFT] * h.double().norm() / delta.norm()))
        delta = share * delta
        twin = entry.flags & TWIN
        hidden = after.streams.twin_hidden_ND if twin else after.streams.hidden_ND
        residual = after.streams.twin_residual_ND if twin else after.streams.residual_ND
        hidden[entry.row] = 0
        residual[entry.row] = (h.double() + delta).to(h.dtype)
        if entry.flags & COUNTED:
            shift = delta.norm() / h.double().norm()
            after.tables.tally_T3[entry.tally] += torch.tensor([shift > 0, shift, share < 1], dtype=torch.float32)
    return after


def check(case: Case, entries: list[Entry], **how) -> None:
    want, got = expected(case, entries[how.get("first", 0) :]), case.copy()
    run(got, entries, **how)
    near, tally = TOLERANCES[case.streams.mean_ND.dtype]
    for got_ND, want_ND in zip(got.streams, want.streams, strict=True):
        torch.testing.assert_close(got_ND, want_ND, atol=near, rtol=10 * near)
    torch.testing.assert_close(got.tables.tally_T3, want.tables.tally_T3, atol=tally, rtol=tally)
    untouched = [row for row in range(ROWS) if row not in {entry.row for entry in entries}]
    for got_ND, before_ND in zip(got.streams, case.streams, strict=True):
        assert torch.equal(got_ND[untouched], before_ND[untouched])


MIXED = [
    Entry(7, 0, 1, COUNTED),
    Entry(2, 3, 1, COUNTED | TWIN),
    Entry(9, 1, 0, COUNTED),
    Entry(0, 4, 3, 0),
    Entry(4, 2, 2, COUNTED),
    Entry(10, 5, 2, TWIN),
    Entry(5, 3, 4, COUNTED),
]
"""Every form, negative scales (slots 2 to 5), random directions (2 and 5), shared and uncounted tallies, no order."""


@pytest.mark.parametrize(
    ("dtype", "twin"),
    [(torch.float32, True), (torch.float32, False), (torch.float16, True), (torch.bfloat16, True)],
)
def test_a_mixed_step_is_the_equations(dtype, twin):
    check(make_case(dtype=dtype, twin=twin), MIXED)


@pytest.mark.parametrize("slot", range(SLOTS))
def test_each_form_alone(slot):
    check(make_case(seed=slot), [Entry(3, slot, 0, COUNTED)], bound=1, capacity=1)


@pytest.mark.parametrize(
    ("hidden", "shared", "concepts", "active"),
    [(24, 20, 261, 17), (130, 70, 128, 128), (300, 33, 40, 1), (16, 16, 4200, 9), (24, 20, 4096, 300)],
)
def test_sizes_that_are_no_powers_of_two(hidden, shared, concepts, active):
    check(make_case(hidden, shared, concepts, active), MIXED[:3])


def test_more_entries_than_a_tile_and_than_lanes():
    case = make_case()
    many = Case(case.tables, Streams(*(rows.repeat(4, 1) for rows in case.streams)))
    entries = [Entry(43 - row, row % SLOTS, row % TALLIES, COUNTED) for row in range(40)]
    want, got = expected(many, entries), many.copy()
    RealignKernels(got.tables, capacity=44).launch(make_plan(entries, 44), 44, got.streams)
    torch.testing.assert_close(got.streams.residual_ND, want.streams.residual_ND, atol=2e-5, rtol=2e-4)
    torch.testing.assert_close(got.tables.tally_T3, want.tables.tally_T3, atol=1e-4, rtol=2e-4)


@torch.no_grad()
def test_ties_at_the_last_place_go_to_the_lowest_index():
    case = make_case(concepts=40, active=5)
    directions_KS = case.realignment.directions_KS
    directions_KS[[1, 6, 8, 17, 23, 31, 39]] = directions_KS[3].clone()  # eight equals for five places
    near_S = directions_KS[3] + 0.1 * torch.randn_like(directions_KS[3])  # where they meet, rounding is magnified
    projection = case.realignment.text_projection
    means_ND = torch.linalg.lstsq(projection.weight, (near_S - projection.bias)[:, None]).solution.T
    case.streams.mean_ND.copy_(means_ND.expand(ROWS, -1))
    check(case, [Entry(3, 0, 0, COUNTED), Entry(4, 1, 0, COUNTED), Entry(5, 3, 0, COUNTED)])


def test_nobody_steered_touches_nothing():
    case = make_case(dtype=torch.bfloat16)
    for rows in case.streams:
        rows[3] = float("nan")
    got = case.copy()
    run(got, [])
    run(got, MIXED, first=7)
    run(got, MIXED, first=12)
    for got_ND, before_ND in zip(got.streams, case.streams, strict=True):
        assert torch.equal(got_ND.view(torch.int16), before_ND.view(torch.int16))
    assert torch.equal(got.tables.tally_T3, case.tables.tally_T3)


def test_a_step_larger_than_the_capacity_takes_several_launches():
    check(make_case(), MIXED, first=4, bound=3, capacity=3)
    case = make_case()
    want, got = expected(case, MIXED), case.copy()
    kernels = RealignKernels(got.tables, capacity=3)
    for first in (0, 3, 6):
        kernels.launch(make_plan(MIXED, 20), 3, got.streams, first=first)
    torch.testing.assert_close(got.streams.residual_ND, want.streams.residual_ND, atol=2e-5, rtol=2e-4)
    torch.testing.assert_close(got.tables.tally_T3, want.tables.tally_T3, atol=1e-5, rtol=2e-4)


def test_rows_of_a_wider_buffer():
    case = make_case()
    wide = [torch.randn(ROWS, 60) for _ in case.streams]
    for buffer, rows in zip(wide, case.streams, strict=True):
        buffer[:, 8:32] = rows
    want = expected(case, MIXED)
    kernels = RealignKernels(case.tables, capacity=16)
    outside = [torch.cat([buffer[:, :8], buffer[:, 32:]], dim=1) for buffer in wide]
    kernels.launch(make_plan(MIXED, 20), 9, Streams(*(buffer[:, 8:32] for buffer in wide)))
    for buffer, want_ND, before in zip(wide, want.streams, outside, strict=True):
        torch.testing.assert_close(buffer[:, 8:32], want_ND, atol=2e-5, rtol=2e-4)
        assert torch.equal(torch.cat([buffer[:, :8], buffer[:, 32:]], dim=1), before)
