"""Timings of all rounds as ratios to plain, a table and a picture. Measures nothing."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steering.engines.vllm.start import installed_version
from tests.benchmarks.steering.generation_timing import Timing
from tests.benchmarks.steering.overhead_conditions import CONDITIONS, LOOP, CacheMemory, Setup
from tests.benchmarks.steering.random_llava import describe
from training.evaluation.manifest import describe_run

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d", "#e45756")


@dataclass(kw_only=True)
class Comparison:
    """What the rounds of one shape on one kind of engine brought."""

    shape_name: str
    setup: Setup
    timings: dict[tuple[str, int], list[Timing]] = field(default_factory=dict)
    """By condition and batch, one per round."""
    memory: dict[str, CacheMemory] = field(default_factory=dict)
    """By condition."""

    @property
    def prefix(self) -> str:
        """Of the ratios' names."""
        shape = "" if self.shape_name == "default" else f"{self.shape_name}_"
        return shape + ("hf_" if self.setup.kind == "huggingface" else "")


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A condition over another, round by round."""

    median: float
    smallest: float
    largest: float

    @property
    def spread(self) -> list[float]:
        return [round(self.smallest, 3), round(self.largest, 3)]


def compare_rounds(ours: list[Timing], theirs: list[Timing], quantity: Callable[[Timing], float]) -> Ratio:
    """Median and extremes of the rounds' ratios."""
    ratios = [quantity(one) / quantity(other) for one, other in zip(ours, theirs, strict=True)]
    return Ratio(median=statistics.median(ratios), smallest=min(ratios), largest=max(ratios))


def make_report(
    comparisons: list[Comparison], settings: dict[str, Any], load_averages: list[tuple[float, float, float]]
) -> dict[str, Any]:
    """`ratios` above 1 are faster than plain; `spread` holds the smallest and largest of the rounds."""
    ratios: dict[str, Ratio] = {}
    table: list[dict[str, Any]] = []
    for comparison in comparisons:
        ratios |= _named_ratios(comparison)
        table += [_row(comparison, label, batch) for label, batch in comparison.timings]
    manifest = describe_run(settings)
    manifest["versions"]["vllm"] = installed_version()
    return {
        "ratios": {name: round(ratio.median, 3) for name, ratio in ratios.items()},
        "spread": {name: ratio.spread for name, ratio in ratios.items()},
        "table": table,
        "manifest": manifest
        | {
            "comparisons": [_describe_setup(comparison) for comparison in comparisons],
            "spread": "smallest and largest ratio of the rounds",
            "cpus": os.cpu_count(),
            "load_averages_before_and_after": load_averages,
        },
    }


def _named_ratios(comparison: Comparison) -> dict[str, Ratio]:
    prefix, timings = comparison.prefix, comparison.timings
    named = {
        f"{prefix}{label}_b{batch}": compare_rounds(rounds, timings["plain", batch], _whole)
        for (label, batch), rounds in timings.items()
        if label != "plain"
    }
    loop, causal = timings.get(("two_full_passes", 1)), timings.get(("two_branches", 1))
    if loop and causal:
        named[f"{prefix}causal_over_two_full_passes_b1"] = compare_rounds(causal, loop, _whole)
    for label in ("one_branch", "two_branches"):
        if label in comparison.memory:
            share = comparison.memory[label].tokens_that_fit / comparison.memory["plain"].tokens_that_fit
            named[f"{prefix}kv_tokens_{label}"] = Ratio(median=share, smallest=share, largest=share)
    return named


def _row(comparison: Comparison, label: str, batch: int) -> dict[str, Any]:
    rounds, plain = comparison.timings[label, batch], comparison.timings["plain", batch]
    memory = comparison.memory.get(label)
    row: dict[str, Any] = {
        "shape": comparison.shape_name,
        "engine": comparison.setup.kind,
        "ran_on": _ran_on(comparison.setup.kind, label),
        "condition": label,
        "batch": batch,
    }
    for name, quantity, unit in (
        ("tokens_per_s", _whole, 1),
        ("decode_tokens_per_s", _decode, 1),
        ("first_token_ms", _first, 1000),
        ("inter_token_ms", _gap, 1000),
    ):
        values, ratio = [quantity(one) * unit for one in rounds], compare_rounds(rounds, plain, quantity)
        row |= {
            name: round(statistics.median(values), 1),
            f"{name}_spread": [round(min(values), 1), round(max(values), 1)],
            f"{name}_ratio": round(ratio.median, 3),
            f"{name}_ratio_spread": ratio.spread,
        }
    if memory:
        row |= {"kv_bytes_per_token": memory.bytes_per_token, "kv_tokens_that_fit": memory.tokens_that_fit}
        row["kv_caches"] = memory.caches
    return row


def _ran_on(kind: str, label: str) -> str:
    """Which of the engines beside each other answered."""
    engine = CONDITIONS[kind][label].engine
    if kind == "huggingface":
        return {"plain": "no artifact", LOOP: "a loop of its own"}.get(engine, "artifact")
    return {"plain": "no plugin", "one": "branches 1", "two": "branches 2"}[engine]


def _whole(one: Timing) -> float:
    return one.tokens_per_s


def _decode(one: Timing) -> float:
    return one.decode_tokens_per_s


def _first(one: Timing) -> float:
    return one.first_token_s


def _gap(one: Timing) -> float:
    return one.inter_token_s


def _describe_setup(comparison: Comparison) -> dict[str, Any]:
    setup = comparison.setup
    return {
        "shape": comparison.shape_name,
        "shape_text": str(setup.shape),
        **describe(setup.shape),
        "engine": setup.kind,
        "device": setup.device,
        "dtype": setup.dtype,
        "threads_per_engine": setup.threads,
        "compile": setup.compile,
        "rounds": min(len(rounds) for rounds in comparison.timings.values()),
        "prompt_tokens": setup.prompt_tokens,
        "new_tokens": setup.new_tokens,
        "kv_cache_bytes": setup.kv_cache_bytes,
    }


# -- for people ------------------------------------------------------------------------------------------------------


def print_report(report: dict[str, Any]) -> None:
    """One table per shape and kind of engine."""
    for setup in report["manifest"]["comparisons"]:
        rows = [row for row in report["table"] if (row["shape"], row["engine"]) == (setup["shape"], setup["engine"])]
        print(f"\n{_title(setup)}\n")
        width = max(len(row["condition"]) for row in rows)
        print(
            f"{'condition':{width}} {'ran on':17} {'batch':>5} {'tokens/s':>9} {'of plain':>21} "
            f"{'decoding':>9} {'of plain':>21} {'first token':>12} {'x plain':>7} {'gap':>9} {'x plain':>7}"
        )
        for row in sorted(rows, key=lambda row: row["batch"]):
            print(
                f"{row['condition']:{width}} {row['ran_on']:17} {row['batch']:5} {row['tokens_per_s']:9.1f} "
                f"{_with_spread(row, 'tokens_per_s'):>21} {row['decode_tokens_per_s']:9.1f} "
                f"{_with_spread(row, 'decode_tokens_per_s'):>21} {row['first_token_ms']:9.0f} ms "
                f"{row['first_token_ms_ratio']:7.2f} {row['inter_token_ms']:6.0f} ms {row['inter_token_ms_ratio']:7.2f}"
            )
        _print_memory(rows, setup)
    over_loop = {name: value for name, value in report["ratios"].items() if "two_full_passes_b1" in name}
    for name, value in over_loop.items():
        print(f"{name}: {value} {report['spread'][name]}")


def _print_memory(rows: list[dict[str, Any]], setup: dict[str, Any]) -> None:
    by_engine = {row["ran_on"]: row for row in rows if "kv_caches" in row}
    if not by_engine:
        return
    print(f"\nkeys and values, in {setup['kv_cache_bytes'] / 1024**3:.2f} GiB for each engine:")
    for ran_on, row in by_engine.items():
        extra = row["kv_caches"] / setup["layers"] - 1
        print(
            f"  {ran_on:10} {row['kv_caches']:3} caches, {row['kv_bytes_per_token']:8,} bytes per token "
            f"(+{extra:.1%}), {row['kv_tokens_that_fit']:7,} tokens fit"
        )


def _title(setup: dict[str, Any]) -> str:
    return (
        f"{setup['shape']} shape: {setup['shape_text']}; prompts of {setup['prompt_tokens']} tokens, "
        f"{setup['new_tokens']} new ones;\n{setup['engine']} on {setup['device']}, {setup['dtype']}, "
        f"{setup['threads_per_engine']} CPU threads per engine; medians of {setup['rounds']} interleaved rounds, "
        "smallest and largest in brackets"
    )


def _with_spread(row: dict[str, Any], name: str) -> str:
    if row["condition"] == "plain":
        return ""
    low, high = row[f"{name}_ratio_spread"]
    return f"{row[f'{name}_ratio']:.3f} [{low:.3f}, {high:.3f}]"


def plot(report: dict[str, Any], file: Path) -> None:
    """Throughput over plain's by condition and batch, a panel for each shape and kind of engine."""
    import matplotlib.pyplot as plt

    setups = report["manifest"]["comparisons"]
    figure, axes = plt.subplots(len(setups), 1, figsize=(9, 4.4 * len(setups)), squeeze=False)
    for setup, axis in zip(setups, axes[:, 0], strict=True):
        rows = [
            row
            for row in report["table"]
            if (row["shape"], row["engine"]) == (setup["shape"], setup["engine"]) and row["condition"] != "plain"
        ]
        _draw(axis, rows)
        axis.set_title(f"{setup['shape']} shape, {setup['engine']} on {setup['device']}, {setup['dtype']}")
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _draw(axis: Any, rows: list[dict[str, Any]]) -> None:
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    batches = sorted({row["batch"] for row in rows})
    width = 0.8 / len(batches)
    for index, batch in enumerate(batches):
        mine = [row for row in rows if row["batch"] == batch]
        places = [conditions.index(row["condition"]) + (index - (len(batches) - 1) / 2) * width for row in mine]
        heights = [row["tokens_per_s_ratio"] for row in mine]
        spreads = [row["tokens_per_s_ratio_spread"] for row in mine]
        below = [height - low for height, (low, _) in zip(heights, spreads, strict=True)]
        above = [high - height for height, (_, high) in zip(heights, spreads, strict=True)]
        colour = COLOURS[index % len(COLOURS)]
        axis.bar(places, heights, width, yerr=[below, above], capsize=3, label=f"batch {batch}", color=colour)
        for place, height in zip(places, heights, strict=True):
            axis.text(place, 0.02, f"{height:.2f}", ha="center", va="bottom", color="white", fontsize=8)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(range(len(conditions)), [name.replace("_", " ") for name in conditions])
    axis.set_ylabel("tokens a second, plain = 1")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
