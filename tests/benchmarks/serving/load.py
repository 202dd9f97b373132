"""What happens at half, equal and three times the capacity? An open-loop load on the whole service, on loopback.

    python -m tests.benchmarks.serving.load --json FILE

The bundled miniature on the Hugging Face engine, behind its gateway; captions of 40 tokens at most. The capacity is
what 32 clients get who ask again and again for `--capacity-seconds`; then requests arrive at random times that do not
depend on the answers. Each row: what was offered and what became of it, time to first token and to the last, both from
when the request was due to leave, how late this client was itself, and the memory of all the service's processes
(proportional set size). Client and service share the machine. The exit status is 1 where an answer was lost, wrong or
duplicated, or a request was not sent or left too late for its times to mean anything. Each load runs once: it needs a
minute in which memory could grow, so the spread is of windows within it and not of rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.serving.open_loop import (
    Asked,
    Outcome,
    ask_alone,
    closed_loop,
    endings,
    open_loop,
    percentiles,
    scenes,
)
from tests.benchmarks.serving.running_service import RunningService, running_service
from training.evaluation.manifest import describe_run
from training.miniature.paths import ARTIFACT, LLAVA

SHARES = {"half": 0.5, "equal": 1.0, "three_times": 3.0}
REFUSALS = ("overloaded", "rate_limit_exceeded")
"""Codes of an error that came before any work."""
MAX_LATE_S = 0.5
"""99 % of the requests must have left by then, or the row says more about this client than about the service."""
FAILURES = ("lost", "wrong", "duplicated")
WINDOW_S = 10.0
MEMORY_PERIOD_S = 1.0
PARTS = {"": "all", "ProxyActor": "proxy", ":Ingress": "ingress", ":Model": "model"}
"""Part of a command line to what it belongs to."""


async def measure(service: RunningService, settings: argparse.Namespace) -> dict[str, Any]:
    asked = scenes(LLAVA.name, settings.items, settings.tokens)
    await ask_alone(service.port, asked)
    capacity = await closed_loop(service.port, asked, clients=settings.clients, seconds=settings.capacity_seconds)
    print(f"capacity: {capacity:.1f} answers/s ({settings.clients} clients)", flush=True)
    table, ratios, spread = [], {}, {}
    for number, (name, share) in enumerate(SHARES.items()):
        began = time.monotonic()
        async with MemoryWatch(service) as memory:
            outcomes, unsent = await open_loop(
                service.port, asked, rate=share * capacity, seconds=settings.seconds, seed=number
            )
        await asyncio.sleep(1.0)
        row = describe_phase(name, share * capacity, outcomes, unsent, asked)
        row |= {
            "memory_mib": {name: round(service.memory_mib(part)) for part, name in PARTS.items()},
            "largest_memory_mib": round(max(memory.samples_mib)),
        }
        table.append(row)
        print_row(row)
        shares = [rate / capacity for rate in windows(outcomes, began, settings.seconds)]
        ratios[f"answers_over_capacity_{name}"] = round(statistics.mean(shares), 3)
        spread[f"answers_over_capacity_{name}"] = [round(min(shares), 3), round(max(shares), 3)]
        ratios[f"memory_late_over_early_{name}"] = round(memory.late_over_early(), 3)
        ratios |= {f"{kind}_of_sent_{name}": round(row[kind] / max(1, row["sent"]), 5) for kind in FAILURES}
    manifest = describe_run({name: str(value) for name, value in vars(settings).items()}) | {
        "capacity_per_s": round(capacity, 2),
        "cpus": os.cpu_count(),
        "spread": f"smallest and largest of windows of {WINDOW_S:g} s",
    }
    return {"ratios": ratios, "spread": spread, "table": table, "manifest": manifest}


class MemoryWatch:
    """The memory of a service while the block runs."""

    def __init__(self, service: RunningService) -> None:
        self._service = service
        self.samples_mib: list[float] = []

    async def __aenter__(self) -> MemoryWatch:
        self._watch = asyncio.create_task(self._look())
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self._watch.cancel()

    async def _look(self) -> None:
        while True:
            self.samples_mib.append(await asyncio.to_thread(self._service.memory_mib))
            await asyncio.sleep(MEMORY_PERIOD_S)

    def late_over_early(self) -> float:
        """Mean of the last third over that of the second: 1 where it does not grow with time."""
        third = len(self.samples_mib) // 3
        return statistics.mean(self.samples_mib[-third:]) / statistics.mean(self.samples_mib[third:-third])


def describe_phase(name: str, rate: float, outcomes: list[Outcome], unsent: int, asked: Asked) -> dict[str, Any]:
    """A row of the table."""
    complete = [one for one in outcomes if one.ending == "complete"]
    refused = [one for one in outcomes if one.ending in REFUSALS]
    ended = endings(outcomes, asked)
    answered = ended.get("right", 0) + ended.get("tie", 0)
    wrong = ended.get("wrong", 0)
    return {
        "load": name,
        "offered_per_s": round(rate, 2),
        "sent": len(outcomes),
        "not_sent": unsent,
        "answered": answered,
        "refused": len(refused),
        "lost": len(outcomes) - answered - wrong - len(refused),
        "wrong": wrong,
        "duplicated": ended["duplicated"],
        "endings": ended,
        "late_s": percentiles([one.late_s for one in outcomes]),
        "latest_s": round(max((one.late_s for one in outcomes), default=0.0), 3),
        "first_token_s": percentiles([one.first_token_s for one in complete if one.first_token_s is not None]),
        "whole_s": percentiles([one.whole_s for one in complete]),
        "refusal_s": percentiles([one.whole_s for one in refused]),
    }


def failures(table: list[dict[str, Any]]) -> list[str]:
    """What must not be, in words; a run without any is worth its numbers."""
    found = [f"{row['load']}: {row[kind]} {kind}" for row in table for kind in (*FAILURES, "not_sent") if row[kind]]
    late = [row for row in table if row["late_s"] and row["late_s"]["p99"] > MAX_LATE_S]
    return found + [f"{row['load']}: this client was {row['late_s']['p99']} s late" for row in late]


def windows(outcomes: list[Outcome], began: float, seconds: float) -> list[float]:
    """Answers a second, window by window."""
    ends = [one.sent + one.whole_s - began for one in outcomes if one.ending == "complete"]
    number = max(1, int(seconds / WINDOW_S))
    return [sum(index * WINDOW_S <= end < (index + 1) * WINDOW_S for end in ends) / WINDOW_S for index in range(number)]


def print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['load']:>11} ({row['offered_per_s']:.1f}/s): {row['sent']} sent, {row['answered']} answered, "
        f"{row['refused']} refused, {row['lost']} lost, {row['wrong']} wrong, {row['duplicated']} duplicated, "
        f"{row['not_sent']} not sent (99 % of the others within {(row['late_s'] or {}).get('p99')} s, all within "
        f"{row['latest_s']}); {row['endings']}\n"
        f"             first token {row['first_token_s']}, whole {row['whole_s']}, refusals {row['refusal_s']}; "
        f"memory afterwards {row['memory_mib']} MiB, all at most {row['largest_memory_mib']}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--seconds", type=float, default=60, help="duration of each load, in seconds")
    parser.add_argument("--capacity-seconds", type=float, default=20, help="duration of the measured capacity")
    parser.add_argument("--clients", type=int, default=32, help="clients whose answers a second are the capacity")
    parser.add_argument("--items", type=int, default=150, help="scenes that are asked about")
    parser.add_argument("--tokens", type=int, default=40, help="largest number of tokens of an answer")
    settings = parser.parse_args()
    with running_service("--model", str(LLAVA), "--artifact", str(ARTIFACT), "--gateway", "on") as service:
        report = asyncio.run(measure(service, settings))
    for name, value in report["ratios"].items():
        print(f"{name}: {value} {report['spread'].get(name, '')}")
    if settings.json:
        settings.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    found = failures(report["table"])
    for failure in found:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
