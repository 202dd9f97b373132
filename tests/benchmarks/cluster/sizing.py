"""How many replicas for how many requests? A simulated fleet, held against real ones, and a table from it.

    python -m tests.benchmarks.cluster.sizing --json FILE

First one replica of the bundled miniature is measured through HTTP: with 1 to 4 clients that each ask again as soon
as they are answered, and with three times as many as a batch holds, its capacity. From these come, by least squares,
what `fleet.py` wants to know: a decoding step of n sequences takes `base_s + each_s * n`, a prompt `prefill_s`, and
what is left of a lonely client's first token is outside the batch. Then the same service is run with one, two and three
replicas under requests at random times, and the fleet says what those runs should give: the error is what is printed.
Replicas, HTTP and clients share this machine's cores, so how much two replicas do at once (`cores`) is measured, too,
as the ratio of their capacities; three are then a prediction.

The table is for a replica of one's own: `--base-s`, `--each-s` and so on replace what is assumed for one (two GPUs,
LLaVA-1.5-7B) that nobody has measured. `--only table` makes it without a run, `--only runs` leaves it out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from service.scaling import FULL_SHARE
from tests.benchmarks.cluster.cluster_load import BATCH, Clients
from tests.benchmarks.cluster.fleet import Fleet
from tests.benchmarks.cluster.plan import Plan, Replica, Seen
from tests.benchmarks.serving.open_loop import Asked, Outcome, ask_alone, open_loop, scenes
from tests.benchmarks.serving.running_service import running_service
from training.evaluation.manifest import describe_run
from training.miniature.paths import ARTIFACT, LLAVA

ENGINE = ("--model", str(LLAVA), "--artifact", str(ARTIFACT), "--engine.max-batch-size", str(BATCH))
CLIENTS = (1, 2, 3, 4)
SHARES = (0.4, 0.7)
"""Of the capacity: what arrives in the runs that the fleet predicts."""
FIGURES = (("first_token_s", 0.5), ("first_token_s", 0.9), ("whole_s", 0.5), ("whole_s", 0.9))
RATES = (10, 100, 1_000, 10_000)
HORIZON_S = {10: 900, 100: 600, 1_000: 180, 10_000: 40}
"""Shorter for more requests: so many seconds hold hundreds of thousands."""
SURGE = 2.0
SURGE_S = 1800.0


async def closed(port: int, asked: Asked, clients: int, seconds: float) -> list[Outcome]:
    """Complete answers with so many clients."""
    asking = Clients(port, asked)
    asking.set(clients)
    await asyncio.sleep(seconds)
    return [one for one in await asking.finish() if one.ending == "complete" and one.first_token_s is not None]


def fitted(by_clients: dict[int, list[Outcome]], most: float, lengths: tuple[float, ...]) -> Replica:
    """What explains the answers of so many clients, and `most` answers a second from a full batch: least squares.

    `lengths` are those of the answers after their first tokens. While a sequence is decoded, each other client's prompt
    comes once in that client's own round, and stops it.
    """
    steps = statistics.mean(lengths)
    rows = [(steps / BATCH, steps, 1.0, 1 / most)]
    for number, outcomes in by_clients.items():
        whole = statistics.mean(one.whole_s for one in outcomes)
        decoding = whole - statistics.mean(one.first_token_s or 0.0 for one in outcomes)
        others = (number - 1) * decoding / whole
        rows.append((steps, steps * (1 + others), others, decoding))
    scaled = np.array(rows) / np.array(rows)[:, -1:]  # so that each counts alike
    (base, each, prefill), _ = nnls(scaled[:, :-1], scaled[:, -1])
    outside = statistics.mean(one.first_token_s or 0.0 for one in by_clients[1]) - prefill
    return Replica(
        base_s=base, each_s=each, prefill_s=prefill, outside_s=max(0.0, outside), lengths=lengths, batch=BATCH
    )


async def one_replica(port: int, asked: Asked, most: float, seconds: float) -> Replica:
    by_clients = {number: await closed(port, asked, number, seconds) for number in CLIENTS}
    return fitted(by_clients, most, tuple(len(solo.tokens) - 1.0 for solo in asked.solos))


async def capacity(port: int, asked: Asked, replicas: int, seconds: float) -> float:
    return len(await closed(port, asked, 3 * BATCH * replicas, seconds)) / seconds


def figures(seen: Seen) -> dict[str, float]:
    return {
        f"{name}_p{share * 100:.0f}": round(seen.quantile(getattr(seen, name), share), 3) for name, share in FIGURES
    }


def compared(seen: Seen) -> dict[str, float]:
    """Means, and how long the slower ones take: a quantile of who waits at all jumps where one in ten does."""
    return {
        "first_token_s_mean": round(statistics.mean(seen.first_token_s), 3),
        "whole_s_mean": round(statistics.mean(seen.whole_s), 3),
        "whole_s_p90": round(seen.quantile(seen.whole_s, 0.9), 3),
    }


async def real(port: int, asked: Asked, rate: float, seconds: float) -> dict[str, float]:
    outcomes, _unsent = await open_loop(port, asked, rate=rate, seconds=seconds, seed=1)
    seen = Seen(refused=sum(one.status == 503 for one in outcomes), arrived=len(outcomes))
    for one in outcomes:
        if one.ending == "complete" and one.first_token_s is not None:
            seen.first_token_s.append(one.first_token_s)
            seen.whole_s.append(one.whole_s)
    return compared(seen) | {"answered": len(seen.whole_s), "refused": seen.refused}


def fixed(replicas: int, kind: Replica, **more: Any) -> Plan:
    return Plan(least=replicas, most=replicas, target=FULL_SHARE * kind.batch, **more)


def validate(asked: Asked, settings: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What was measured (also `drift`: one replica's capacity afterwards, of that before), and a row for each real run
    with its prediction.
    """
    kind, cores, drift, capacities, table = None, 1.0, 1.0, {}, []
    for replicas in (1, 2, 3):
        with running_service(*ENGINE, "--model-replicas", str(replicas)) as service:
            if not asked.solos:
                asyncio.run(ask_alone(service.port, asked))
            if replicas <= 2:
                capacities[replicas] = asyncio.run(capacity(service.port, asked, replicas, settings.seconds))
                cores = max(1.0, min(2.0, capacities[replicas] / capacities[1]))
            kind = kind or asyncio.run(one_replica(service.port, asked, capacities[1], settings.seconds / 2))
            for share in SHARES:
                rate = share * capacities[1] * min(replicas, cores)
                found = asyncio.run(real(service.port, asked, rate, settings.seconds))
                plan = fixed(replicas, kind, cores=cores)
                said = compared(Fleet(kind, plan, rate=rate, seconds=3_000, seed=2).run())
                errors = {name: round(said[name] / found[name] - 1, 3) for name in said if found[name]}
                table.append(
                    {"replicas": replicas, "rate": round(rate, 2), "real": found, "said": said, "error": errors}
                )
                print(json.dumps(table[-1]), flush=True)
            if replicas == 1:
                drift = asyncio.run(capacity(service.port, asked, 1, settings.seconds)) / capacities[1]
    assert kind is not None
    return {**vars(kind), "cores": cores, "capacity": capacities[1], "drift": drift}, table


def sized(kind: Replica, rate: float, settings: argparse.Namespace) -> dict[str, Any]:
    """Enough replicas to be three quarters full, what they give, and what twice the requests do to them at once."""
    replicas = math.ceil(rate / (FULL_SHARE * kind.capacity))
    seconds = HORIZON_S.get(int(rate), 300)
    calm = Fleet(kind, fixed(replicas, kind, queue=64 * replicas), rate=rate, seconds=seconds).run()
    row = {
        "rate": rate,
        "replicas": replicas,
        **figures(calm),
        "first_token_s_p99": round(calm.quantile(calm.first_token_s, 0.99), 3),
        "refused": calm.refused / max(1, calm.arrived),
        "cost_per_million": round(replicas / rate / 3600 * 1e6 * settings.price, 1),
    }
    if rate <= settings.largest_surge:
        plan = Plan(
            least=replicas, most=3 * replicas, target=FULL_SHARE * kind.batch, queue=64 * replicas, up_delay_s=30.0
        )
        surge = Fleet(kind, plan, rate=rate, seconds=SURGE_S, surge=SURGE).run()
        row |= {
            "surge_refused": round(surge.refused / max(1, surge.arrived), 4),
            "surge_first_token_s_p99": round(surge.quantile(surge.first_token_s, 0.99), 1),
            "surge_replicas": surge.largest,
        }
    return row


def assumed(settings: argparse.Namespace) -> Replica:
    mean = settings.mean_tokens
    return Replica(
        base_s=settings.base_s,
        each_s=settings.each_s,
        prefill_s=settings.prefill_s,
        lengths=tuple(mean * share for share in (0.2, 0.5, 0.8, 1.0, 1.2, 1.5, 1.8)),
        batch=settings.batch,
        start_s=settings.start_s,
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--only", choices=["table", "runs"], help="half of it")
    parser.add_argument("--seconds", type=float, default=30, help="duration of each real run")
    parser.add_argument("--items", type=int, default=20, help="scenes that are asked about")
    parser.add_argument("--tokens", type=int, default=40, help="largest number of tokens of an answer")
    parser.add_argument("--base-s", type=float, default=0.012, help="assumed: a decoding step, in seconds")
    parser.add_argument("--each-s", type=float, default=0.0002, help="assumed: more of it for each sequence")
    parser.add_argument("--prefill-s", type=float, default=0.04, help="assumed: a prompt and its picture, in seconds")
    parser.add_argument("--mean-tokens", type=float, default=100, help="assumed: mean length of an answer")
    parser.add_argument("--batch", type=int, default=32, help="engine.max_batch_size")
    parser.add_argument("--start-s", type=float, default=180, help="assumed: a machine, and the model loaded on it")
    parser.add_argument("--price", type=float, default=1.0, help="of a replica for an hour; the table's unit of cost")
    parser.add_argument("--largest-surge", type=float, default=100, help="up to this rate the surge is simulated, too")
    return parser


def main() -> None:
    settings = parser().parse_args()
    table: list[dict[str, Any]] = []
    for rate in RATES if settings.only != "runs" else ():
        table.append(sized(assumed(settings), rate, settings))
        print(json.dumps(table[-1]), flush=True)
    report: dict[str, Any] = {"ratios": {}, "spread": {}, "table": table, "validation": []}
    if settings.only != "table":
        asked = scenes(LLAVA.name, settings.items, settings.tokens)
        report["measured"], report["validation"] = validate(asked, settings)
        print(json.dumps(report["measured"]))
        for figure in report["validation"][0]["error"]:
            errors = [abs(row["error"][figure]) for row in report["validation"]]
            report["ratios"][f"error_{figure}"] = round(statistics.median(errors), 3)
            report["spread"][f"error_{figure}"] = [min(errors), max(errors)]
    report["manifest"] = describe_run({name: str(value) for name, value in vars(settings).items()})
    report["manifest"]["cpus"] = os.cpu_count()
    print(json.dumps({"ratios": report["ratios"], "spread": report["spread"]}))
    if settings.json:
        settings.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
