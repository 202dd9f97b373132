"""What do clients see when something breaks under load, and how soon is all well again?

    python -m tests.benchmarks.serving.faults --json FILE

The bundled miniature on the Hugging Face engine, behind its gateway. For each fault requests arrive at random times, at
`--share` of the measured capacity; after a fifth of the time the fault strikes. Each row counts how every request
ended: 'right' (the scene's answer when asked alone), 'tie' (left it where two tokens were as good as tied), 'wrong' (a
stream that just stops, but properly as HTTP, too), the error's code with the status, or 'cut' (the connection ended
within the answer, which no client takes for one). Recovery: from the fault until the first request that was sent after
it is answered, and until /readyz says 200 again (null where it did not while the load ran). The exit status is 1 where
something wrong came back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from service.images import worker
from tests.benchmarks.serving.open_loop import (
    Asked,
    Outcome,
    ask,
    ask_alone,
    closed_loop,
    endings,
    open_loop,
    percentiles,
    scenes,
)
from tests.benchmarks.serving.running_service import REPOSITORY, RunningService, running_service
from training.evaluation.manifest import describe_run
from training.miniature.paths import ARTIFACT, LLAVA

WORKER = str(Path(worker.__file__).relative_to(REPOSITORY))
POLL_S = 0.1
CANCELLED = ("vlsae_requests_total", 'finish="cancelled"')
SETTLE_S = 1.0
"""A generation whose client has gone is counted by then."""
Fault = Callable[[RunningService, Asked, argparse.Namespace], Awaitable[str]]
"""Does the harm; returns what was done."""


def killed(service: RunningService, part: str, number: signal.Signals = signal.SIGKILL) -> int:
    """How many; a fault that hits nobody shows nothing."""
    if not (hit := service.kill(part, number)):
        raise RuntimeError(f"no process of {part} is there")
    return hit


async def kill_model(service: RunningService, _asked: Asked, _settings: argparse.Namespace) -> str:
    return f"kill -9 of {killed(service, ':Model')} model replica"


async def kill_ingress(service: RunningService, _asked: Asked, _settings: argparse.Namespace) -> str:
    return f"kill -9 of {killed(service, ':Ingress')} ingress replica"


async def kill_decoders(service: RunningService, _asked: Asked, settings: argparse.Namespace) -> str:
    """Again and again, so that some are hit at work."""
    number, ends = killed(service, WORKER), time.monotonic() + settings.seconds / 5
    while time.monotonic() < ends:
        number += service.kill(WORKER)
        await asyncio.sleep(POLL_S)
    return f"kill -9 of {number} image decoders"


async def cut_clients(service: RunningService, asked: Asked, _settings: argparse.Namespace) -> str:
    """Clients that hang up in the middle of their answers; they are not among those that are counted."""
    before = await asyncio.to_thread(service.metric, CANCELLED)
    leaving = [ask(service.port, asked, number % len(asked.bodies), leave_after_s=0.05) for number in range(60)]
    left = sum(one.ending == "left" for one in await asyncio.gather(*leaving))
    await asyncio.sleep(SETTLE_S)
    cancelled = await asyncio.to_thread(service.metric, CANCELLED) - before
    return f"{left} of 60 clients hung up after their first token; {cancelled:g} generations were cancelled"


async def stall_engine(service: RunningService, _asked: Asked, settings: argparse.Namespace) -> str:
    pause_s = settings.stall_seconds or settings.seconds / 4
    killed(service, ":Model", signal.SIGSTOP)
    await asyncio.sleep(pause_s)
    service.kill(":Model", signal.SIGCONT)
    return f"the model's process stopped for {pause_s:g} s"


async def nothing(_service: RunningService, _asked: Asked, _settings: argparse.Namespace) -> str:
    return "nothing"


FAULTS: dict[str, Fault] = {
    "none": nothing,
    "model_killed": kill_model,
    "ingress_killed": kill_ingress,
    "decoders_killed": kill_decoders,
    "clients_cut": cut_clients,
    "engine_stalled": stall_engine,
}


async def under_fault(
    service: RunningService, asked: Asked, name: str, rate: float, settings: argparse.Namespace
) -> dict[str, Any]:
    """A row of the table."""
    load = asyncio.create_task(open_loop(service.port, asked, rate=rate, seconds=settings.seconds, seed=len(name)))
    await asyncio.sleep(settings.seconds / 5)
    struck = time.monotonic()
    watch = asyncio.create_task(_readiness(service, load))
    done = await FAULTS[name](service, asked, settings)
    outcomes, unsent = await load
    changes = await watch
    row = {
        "fault": name,
        "done": done,
        "sent": len(outcomes),
        "not_sent": unsent,
        "endings": endings(outcomes, asked),
        "first_answer_after_s": _first_answer(outcomes, struck),
        "not_ready_after_s": next((round(at - struck, 1) for at, ready in changes if not ready), None),
        "ready_again_after_s": round(changes[-1][0] - struck, 1) if changes and changes[-1][1] else None,
        "whole_s": percentiles([one.whole_s for one in outcomes if one.ending == "complete"]),
        "whole_s_of_errors": percentiles([one.whole_s for one in outcomes if one.ending != "complete"]),
    }
    await asyncio.to_thread(service.wait_until_ready)
    return row


def _first_answer(outcomes: list[Outcome], struck: float) -> float | None:
    answered = [one.sent + one.whole_s for one in outcomes if one.sent >= struck and one.ending == "complete"]
    return round(min(answered) - struck, 2) if answered else None


async def _readiness(service: RunningService, load: asyncio.Task) -> list[tuple[float, bool]]:
    """When /readyz changed, and to what, while the load runs."""
    changes: list[tuple[float, bool]] = []
    last = True
    while not load.done():
        now = await asyncio.to_thread(service.is_ready)
        if now != last:
            changes.append((time.monotonic(), now))
            last = now
        await asyncio.sleep(POLL_S)
    return changes


async def measure(service: RunningService, settings: argparse.Namespace) -> dict[str, Any]:
    asked = scenes(LLAVA.name, settings.items, settings.tokens)
    await ask_alone(service.port, asked)
    capacity = await closed_loop(service.port, asked, clients=32, seconds=settings.capacity_seconds)
    rate = settings.share * capacity
    print(f"capacity {capacity:.1f} answers/s; {rate:.1f} requests/s arrive", flush=True)
    table = []
    for name in settings.faults:
        row = await under_fault(service, asked, name, rate, settings)
        table.append(row)
        print(
            f"{name}: {row['done']}\n    {row['sent']} sent: {row['endings']}\n"
            f"    first answer to a later request after {row['first_answer_after_s']} s; not ready after "
            f"{row['not_ready_after_s']} s, ready again after {row['ready_again_after_s']} s; "
            f"answers took {row['whole_s']}, errors {row['whole_s_of_errors']}",
            flush=True,
        )
    sent = {row["fault"]: row["sent"] for row in table}
    ratios = {f"right_{row['fault']}": round(row["endings"].get("right", 0) / sent[row["fault"]], 3) for row in table}
    ratios["wrong"] = sum(row["endings"].get("wrong", 0) for row in table) / sum(sent.values())
    manifest = describe_run({name: str(value) for name, value in vars(settings).items()})
    return {
        "ratios": ratios,
        "spread": {},
        "table": table,
        "manifest": manifest | {"capacity_per_s": round(capacity, 2), "cpus": os.cpu_count()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--seconds", type=float, default=40, help="duration of the load around each fault")
    parser.add_argument("--capacity-seconds", type=float, default=15, help="duration of the measured capacity")
    parser.add_argument("--share", type=float, default=0.5, help="arriving requests, as a share of the capacity")
    parser.add_argument("--items", type=int, default=100, help="scenes that are asked about")
    parser.add_argument("--tokens", type=int, default=40, help="largest number of tokens of an answer")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="which, in this order")
    parser.add_argument("--stall-seconds", type=float, help="how long the engine stands still [a quarter of the load]")
    settings = parser.parse_args()
    with running_service("--model", str(LLAVA), "--artifact", str(ARTIFACT), "--gateway", "on") as service:
        report = asyncio.run(measure(service, settings))
    if settings.json:
        settings.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if report["ratios"]["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
