"""Should replicas follow a signal of the engine's own rather than the number of requests? Asked of the simulated fleet.

    python -m tests.benchmarks.cluster.scaling_signal --json FILE

The replica of `sizing.py`'s table, with a cache that its batch of one-picture requests just fills. Ray Serve's own
policy counts *requests*. Against it stand the *tokens* of their prompts, in the cache or waiting for a place there,
and *either*, whichever of the two is nearer to its limit: what a policy of our own could read from the engine. Load
comes in three ways: twice as many requests of one picture; twice as many where every fourth has four pictures; as many
as before that all turn to four pictures.

More replicas are always better, so each signal runs at several fullnesses, and two are compared where they cost the
same: `late`, the share of requests that are refused or wait more than `--late-s` for their first token, at what
requests at three quarters cost. A ratio below 1 speaks for the engine's signal.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from service.scaling import FULL_SHARE
from tests.benchmarks.cluster.fleet import Fleet
from tests.benchmarks.cluster.plan import Plan, Replica
from tests.benchmarks.cluster.sizing import assumed
from tests.benchmarks.cluster.sizing import parser as sizing_parser
from training.evaluation.manifest import describe_run

PICTURE_TOKENS = 600.0
FULLNESS = (0.4, 0.5, 0.6, FULL_SHARE, 0.9, 1.1)
SECONDS = 1800.0


class Scenario(NamedTuple):
    """How load comes."""

    pictures: tuple[int, ...]
    later_pictures: tuple[int, ...]
    surge: float


SCENARIOS = {
    "twice as many, alike": Scenario((1,), (1,), 2.0),
    "twice as many, mixed": Scenario((1, 1, 1, 4), (1, 1, 1, 4), 2.0),
    "as many, larger": Scenario((1,), (4,), 1.0),
}


def of_requests(kind: Replica) -> Callable[[Fleet], float]:
    return lambda fleet: fleet.ongoing / kind.batch


def of_tokens(kind: Replica) -> Callable[[Fleet], float]:
    return lambda fleet: fleet.prompt_tokens / kind.cache_tokens


def of_either(kind: Replica) -> Callable[[Fleet], float]:
    requests, tokens = of_requests(kind), of_tokens(kind)
    return lambda fleet: max(requests(fleet), tokens(fleet))


SIGNALS = {"requests": of_requests, "tokens": of_tokens, "either": of_either}
"""Each gives how many replicas' worth of load there is."""


def one_run(kind: Replica, rate: float, late_s: float, what: tuple[str, str, float, int]) -> dict[str, Any]:
    name, signal, fullness, seed = what
    scenario = SCENARIOS[name]
    kind = replace(kind, pictures=scenario.pictures)
    plan = Plan(least=2, most=40, target=fullness, load=SIGNALS[signal](kind), queue=256)
    seen = Fleet(
        kind,
        plan,
        rate=rate,
        seconds=SECONDS,
        surge=scenario.surge,
        later_pictures=scenario.later_pictures,
        seed=seed,
    ).run()
    late = seen.refused + sum(one > late_s for one in seen.first_token_s)
    return {
        "scenario": name,
        "signal": signal,
        "fullness": fullness,
        "seed": seed,
        "replica_hours": round(seen.replica_s / 3600, 3),
        "late": late / max(1, seen.arrived),
    }


def late_at(table: list[dict[str, Any]], cost: float) -> float:
    """Between the two runs of a signal that cost a little less and a little more; an end's where it has no such."""
    ordered = sorted(table, key=lambda row: row["replica_hours"])
    return float(np.interp(cost, [row["replica_hours"] for row in ordered], [row["late"] for row in ordered]))


def compared(table: list[dict[str, Any]], name: str, signal: str, seed: int) -> float:
    rows = [row for row in table if row["scenario"] == name and row["seed"] == seed]
    [usual] = [row for row in rows if row["signal"] == "requests" and row["fullness"] == FULL_SHARE]
    return late_at([row for row in rows if row["signal"] == signal], usual["replica_hours"]) / usual["late"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind")
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second before load comes")
    parser.add_argument("--late-s", type=float, default=2.0, help="a longer wait for the first token is late")
    parser.add_argument("--processes", type=int, default=1)
    settings = parser.parse_args()
    one_picture = assumed(sizing_parser().parse_args([]))
    room = one_picture.batch * (PICTURE_TOKENS + statistics.mean(one_picture.lengths))
    kind = replace(one_picture, picture_tokens=PICTURE_TOKENS, cache_tokens=room)
    runs = list(product(SCENARIOS, SIGNALS, FULLNESS, range(settings.seeds)))
    with ProcessPoolExecutor(settings.processes) as pool:
        tasks = [pool.submit(one_run, kind, settings.rate, settings.late_s, what) for what in runs]
        table = [task.result() for task in tasks]
    report: dict[str, Any] = {"ratios": {}, "spread": {}, "table": table}
    for name, signal in product(SCENARIOS, list(SIGNALS)[1:]):
        ratios = [compared(table, name, signal, seed) for seed in range(settings.seeds)]
        report["ratios"][f"{name}: {signal}"] = round(statistics.median(ratios), 3)
        report["spread"][f"{name}: {signal}"] = [round(min(ratios), 3), round(max(ratios), 3)]
    print(json.dumps({"ratios": report["ratios"], "spread": report["spread"]}, indent=1))
    report["manifest"] = describe_run({name: str(value) for name, value in vars(settings).items()})
    if settings.json:
        settings.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
