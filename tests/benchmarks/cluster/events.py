"""Something happens to a cluster under load: who asks meanwhile, how each request ended, what runs afterwards.

Two ingress and two model replicas of the bundled miniature on a Ray cluster of this machine (`local_cluster.py`). What
happens is the business of the scripts that use this.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.benchmarks.cluster.cluster_load import Clients, configuration, now
from tests.benchmarks.cluster.local_cluster import LocalCluster, ServeWatch, running
from tests.benchmarks.serving.open_loop import Asked, ask_alone, endings, scenes
from training.evaluation.manifest import describe_run
from training.miniature.paths import LLAVA

REPLICAS = 2
NOTICED_S = 20.0
"""By then a cluster knows of a node that has died."""
GOOD = ("right", "tie", "duplicated")


class Run:
    """The cluster under load, and what each event asks of it."""

    def __init__(self, cluster: LocalCluster, asked: Asked, settings: argparse.Namespace) -> None:
        self.cluster, self.asked, self.settings = cluster, asked, settings
        self.config = two_of_each(configuration({"num_replicas": REPLICAS}))
        self.port = self.config["http_options"]["port"]
        self.watch = ServeWatch(cluster)

    def all_run(self, sample: dict[str, Any]) -> bool:
        counts = [running(sample, name) == REPLICAS for name in ("Ingress", "Model")]
        others = any(set(one["states"]) - {"RUNNING"} for one in sample["deployments"].values())
        return sample["status"] == "RUNNING" and all(counts) and not others

    async def wait_until_all_run(self) -> float:
        """When, by time.monotonic()."""
        await asyncio.to_thread(self.watch.wait_for, self.all_run, self.settings.patience)
        return self.watch.samples[-1]["at"]

    async def redeploy(self, config: dict[str, Any]) -> None:
        """Returns when Serve is about it."""
        self.deploy(config)
        await asyncio.to_thread(self.watch.wait_for, is_changing, self.settings.patience)

    async def watch_anew(self) -> None:
        """The process that watched may have talked to a node that was killed. Returns when what is left is known."""
        self.watch.close()
        self.watch = ServeWatch(self.cluster)
        with suppress(RuntimeError):
            await asyncio.to_thread(self.watch.wait_for, lambda sample: not self.all_run(sample), NOTICED_S)

    def deploy(self, config: dict[str, Any]) -> None:
        self.watch.samples.clear()
        self.watch.deploy(config)

    async def under_load(self, name: str, event: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        """A row of the table."""
        clients = Clients(self.port, self.asked)
        clients.set(self.settings.clients)
        await asyncio.sleep(self.settings.before_seconds)
        struck = now()
        try:
            found = await event()
        except RuntimeError as error:  # the events before are worth their rows
            found = {"not_back": str(error)}
        await asyncio.sleep(self.settings.after_seconds)
        outcomes = await clients.finish()
        later = [one.sent + one.whole_s - struck for one in outcomes if one.sent > struck and one.ending == "complete"]
        row = {
            "event": name,
            "sent": len(outcomes),
            "endings": endings(outcomes, self.asked),
            "versions": dict(Counter(one.fingerprint for one in outcomes if one.ending == "complete")),
            "next_answer_after_s": round(min(later), 1) if later else None,
            **found,
        }
        print(json.dumps(row), flush=True)
        return row


def is_changing(sample: dict[str, Any]) -> bool:
    return sample["status"] != "RUNNING"


def two_of_each(config: dict[str, Any]) -> dict[str, Any]:
    """On different nodes: Serve's own spreading may put both on one."""
    for deployment in config["applications"][0]["deployments"]:
        deployment |= {"num_replicas": REPLICAS, "max_replicas_per_node": 1}
    return config


def changed(
    config: dict[str, Any], *, settings: dict[str, Any] | None = None, model: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A copy with other settings of the service, or other options of the model's deployment."""
    copy = json.loads(json.dumps(config))
    [application] = copy["applications"]
    application["args"] |= settings or {}
    application["deployments"][1] |= model or {}
    return copy


Event = Callable[[Run], Awaitable[dict[str, Any]]]
"""Makes it happen, and says what was found."""


def bad_endings(row: dict[str, Any]) -> dict[str, int]:
    return {name: number for name, number in row["endings"].items() if name not in GOOD and number}


async def measure(
    cluster: LocalCluster,
    settings: argparse.Namespace,
    events: Mapping[str, Callable[[Run], Awaitable[dict[str, Any]]]],
) -> list[dict[str, Any]]:
    """A row for each event of `settings`, in its order."""
    run = Run(cluster, scenes(LLAVA.name, settings.items, settings.tokens), settings)
    try:
        run.deploy(run.config)
        await run.wait_until_all_run()
        await ask_alone(run.port, run.asked)
        return [await run.under_load(name, lambda event=events[name]: event(run)) for name in settings.events]
    finally:
        run.watch.close()


def arguments(description: str | None, events: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--events", nargs="+", choices=events, default=events, help="in this order")
    parser.add_argument("--clients", type=int, default=4, help="who ask at a time")
    parser.add_argument("--before-seconds", type=float, default=5, help="load before each event")
    parser.add_argument("--after-seconds", type=float, default=5, help="load after it is over")
    parser.add_argument("--items", type=int, default=20, help="scenes that are asked about")
    parser.add_argument("--tokens", type=int, default=40, help="largest number of tokens of an answer")
    parser.add_argument("--patience", type=float, default=300, help="longest wait for replicas, in seconds")
    return parser


def report(table: list[dict[str, Any]], failures: list[str], settings: argparse.Namespace) -> int:
    """Written and said; the exit status."""
    if settings.json:
        whole = {
            "ratios": {f"failed_{row['event']}": failed_share(row) for row in table},
            "spread": {},
            "table": table,
            "manifest": describe_run({name: str(value) for name, value in vars(settings).items()})
            | {"cpus": os.cpu_count()},
        }
        settings.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def failed_share(row: dict[str, Any]) -> float:
    return round(1 - sum(row["endings"].get(name, 0) for name in ("right", "tie")) / max(1, row["sent"]), 4)
