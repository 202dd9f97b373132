"""What one steering step costs on a GPU by itself: kernels in a CUDA graph against plain torch, and how exact they are.

    python -m tests.benchmarks.steering.step --json FILE

At LLaVA-1.5-7B's shape with random weights (--hidden, --concepts, --active-concepts change it). By number of rows:
microseconds of a replayed graph with nobody steered and with every row steered, the same for each stage, and for plain
torch captured in a graph; the ratio is torch / kernels of the same run. Then, over fresh rows: how many of the concepts
that the kernels choose are those of float64, and the largest difference to torch in the moved states.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.kernels.launch import RealignKernels, Streams
from steering.realignment import Realignment
from steering.slot_tables import COUNTED, PLAN_COLUMNS, SlotTables, SteeredRows, Stream
from steering.sparse_autoencoder import VisionLanguageSAE

ROUNDS, REPLAYS = 7, 20
DEVICE = torch.device("cuda")
FORMS = ("difference", "published", "union")


def make_tables(settings: argparse.Namespace, rows: int) -> SlotTables:
    """A realignment with random weights; slot i + 1 has an image of its own, and the forms take turns."""
    torch.manual_seed(0)
    with DEVICE:
        auxiliary = AuxiliaryAutoencoder(settings.hidden, settings.hidden)
        sae = VisionLanguageSAE(settings.hidden, settings.concepts, settings.active_concepts)
    realignment = Realignment(auxiliary, sae, DEVICE)
    tables = SlotTables(
        realignment, torch.zeros(0, settings.hidden), slots=rows + 1, tallies=rows + 1, device=DEVICE
    )  # fmt: skip
    requests: list[Any] = [
        SimpleNamespace(form=FORMS[slot % 3], scale=1.0, beta_up=0.9, beta_down=0.9, gamma=1.0, plausibility=0.0,
                        control="none", control_seed=0)
        for slot in range(rows)
    ]  # fmt: skip
    tables.set_images(range(1, rows + 1), requests, torch.randn(rows, settings.hidden, device=DEVICE))
    return tables


def make_plan(rows: int, steered: int) -> Tensor:
    plan = torch.zeros(1 + rows, len(PLAN_COLUMNS), dtype=torch.int32)
    plan[0, 0] = steered
    for row in range(rows):
        plan[1 + row] = torch.tensor([2, 0, row, row + 1, row + 1, COUNTED])
    return plan.to(DEVICE)


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def replay_us(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, list[float]]:
    """Microseconds of one replay, ROUNDS times each, in turns."""
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(-1, ROUNDS):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            if number >= 0:
                found[name].append(begin.elapsed_time(end) / REPLAYS * 1000)
    return found


def time_rows(tables: SlotTables, rows: int, dtype: torch.dtype) -> dict[str, list[float]]:
    kernels = RealignKernels(tables, capacity=max(64, rows))
    hidden = tables.realignment.hidden_size
    mean_ND, *both = (torch.randn(rows, hidden, device=DEVICE, dtype=dtype) for _ in range(3))
    base, nobody, everybody = Stream(*both), make_plan(rows, 0), make_plan(rows, rows)
    streams = Streams(mean_ND, *base, *base)
    listed = everybody[1:].long()
    places = SteeredRows(listed[:, 3], listed[:, 4], torch.ones(rows, dtype=torch.bool, device=DEVICE))
    return replay_us({
        "nobody": captured(lambda: kernels(nobody, rows, mean_ND, base, base)),
        "everybody": captured(lambda: kernels(everybody, rows, mean_ND, base, base)),
        "encode": captured(lambda: kernels._encode(everybody, rows, mean_ND, 0)),
        "select": captured(lambda: kernels._select(everybody, rows, 0)),
        "move": captured(lambda: kernels._move(everybody, rows, streams, 0)),
        "torch": captured(lambda: tables.step(places, base.hidden + base.residual, mean_ND)),
    })  # fmt: skip


@torch.no_grad()
def compare(tables: SlotTables, rows: int, dtype: torch.dtype, precision: str) -> dict[str, float]:
    """Concepts and moved states of fresh rows."""
    kernels = RealignKernels(tables, capacity=rows, precision=precision)
    realignment = tables.realignment
    mean_ND, hidden_ND, residual_ND = (
        torch.randn(rows, realignment.hidden_size, device=DEVICE, dtype=dtype) for _ in range(3)
    )
    stream_ND, base = hidden_ND + residual_ND, Stream(hidden_ND, residual_ND)
    plan = make_plan(rows, rows)
    listed = plan[1:].long()
    places = SteeredRows(listed[:, 3], listed[:, 4], torch.ones(rows, dtype=torch.bool, device=DEVICE))
    tables.tally_T3.zero_()
    wanted_ND = tables.step(places, stream_ND, mean_ND)
    wanted_T2 = tables.tally_T3.clone()
    tables.tally_T3.zero_()
    kernels(plan, rows, mean_ND, base, base)
    exact = (
        realignment.text_projection.weight.double() @ mean_ND.double().T
        + realignment.text_projection.bias.double()[:, None]
    )
    products_NK = (realignment.directions_KS.double() @ exact).T
    k = realignment.active_concepts
    true_NK = torch.zeros_like(products_NK, dtype=torch.bool).scatter_(1, products_NK.topk(k).indices, True)
    chosen_Nk = kernels.products_EK[:rows].topk(k).indices
    moved = wanted_ND.float() - stream_ND.float()
    return {
        "concepts": rows * k,
        "concepts_not_float64_s": rows * k - int(true_NK.gather(1, chosen_Nk).sum()),
        "relative_difference": float((residual_ND.float() - wanted_ND.float()).norm() / moved.norm()),
        "hidden_left": float(hidden_ND.abs().max()),
        "positions_differ": float((tables.tally_T3[:, 0] - wanted_T2[:, 0]).abs().max()),
        "shift_differs": float((tables.tally_T3[:, 1] - wanted_T2[:, 1]).abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--concepts", type=int, default=32768)
    parser.add_argument("--active-concepts", type=int, default=256)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    settings = parser.parse_args()
    tables = make_tables(settings, max(settings.rows))
    report: dict[str, Any] = {"ratios": {}, "spread": {}, "table": [], "exactness": []}
    for dtype in (torch.float32, torch.bfloat16):
        for precision in ("tf32x3", "ieee"):
            found = compare(tables, max(settings.rows), dtype, precision)
            report["exactness"].append({"dtype": str(dtype), "precision": precision, **found})
            print(dtype, precision, found, flush=True)
    for rows in settings.rows:
        times = time_rows(tables, rows, torch.bfloat16)
        medians = {name: statistics.median(values) for name, values in times.items()}
        report["ratios"][f"torch / kernels, {rows} rows"] = medians["torch"] / medians["everybody"]
        report["spread"][f"{rows} rows"] = {name: [min(values), max(values)] for name, values in times.items()}
        report["table"].append({"rows": rows, **medians})
        print(f"{rows} rows, us:", {name: round(value, 1) for name, value in medians.items()}, flush=True)
    report["manifest"] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "rounds": ROUNDS,
        **{name: str(value) for name, value in vars(settings).items()},
    }  # fmt: skip
    if settings.json:
        settings.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
