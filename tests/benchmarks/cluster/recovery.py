"""What do clients of a cluster see when a machine dies, the head dies, or a new version takes over?

    python -m tests.benchmarks.cluster.recovery --json FILE

A Ray cluster of a head and three workers on this machine (`local_cluster.py`), two ingress and two model replicas of
the bundled miniature, a Redis that keeps the head's state. `--clients` clients ask, each again as soon as it is
answered; then, one after the other:

- update: the same application with another copy of the checkpoint, deployed in the running cluster;
- too_many: more replicas than the cluster has room for;
- worker: SIGKILL to all processes of one worker, one with a replica of the model, while there is room elsewhere;
- head: SIGKILL to all processes of the head, which stays away for `--away-seconds` and comes back at the same Redis.

Each row counts how every request ended, and says how long it took until a request that was sent afterwards was
answered, and until all was as before. All proxies share one port of loopback, the head's too: a client cannot avoid
it, as it does on Kubernetes where the head serves nobody. The exit status is 1 where a request of the update failed,
an answer was wrong, or something did not come back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.benchmarks.cluster.cluster_load import Clients, configuration, now
from tests.benchmarks.cluster.local_cluster import LocalCluster, Node, ServeWatch, local_cluster, running
from tests.benchmarks.serving.open_loop import Asked, ask_alone, endings, scenes
from training.evaluation.manifest import describe_run
from training.miniature.paths import LLAVA

REPLICAS = 2
TOO_MANY = 20
NOTICED_S = 20.0
"""By then a cluster knows of a node that has died."""
PARTS = ("Model", "Ingress", "Ledger", "ProxyActor", "ServeController")
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
        changing = lambda sample: sample["status"] != "RUNNING"  # noqa: E731
        await asyncio.to_thread(self.watch.wait_for, changing, self.settings.patience)

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


async def update(run: Run, checkpoint: Path) -> dict[str, Any]:
    began = now()
    run.config = changed(run.config, settings={"model": str(checkpoint)})
    await run.redeploy(run.config)
    return {"all_as_before_after_s": round(await run.wait_until_all_run() - began, 1)}


async def too_many(run: Run) -> dict[str, Any]:
    """Serve keeps what runs and says what it lacks; the count before is deployed again."""
    began = now()
    await run.redeploy(changed(run.config, model={"num_replicas": TOO_MANY}))

    def told(sample: dict[str, Any]) -> bool:
        return "Resources required" in sample["deployments"].get("Model", {}).get("message", "")

    await asyncio.to_thread(run.watch.wait_for, told, run.settings.patience)
    sample = run.watch.samples[-1]
    run.deploy(run.config)
    await run.wait_until_all_run()
    words = sample["deployments"]["Model"]["message"]
    took = round(sample["at"] - began, 1)
    return {"reported_after_s": took, "message": words, "still_running": running(sample, "Model")}


async def kill_worker(run: Run) -> dict[str, Any]:
    victim = next(node for node in run.cluster.workers if holds(node, "Model"))
    held = parts_of(victim)
    struck, killed = now(), victim.kill()
    run.cluster.workers.remove(victim)
    await run.watch_anew()
    return {"killed": killed, "held": held, "all_as_before_after_s": round(await run.wait_until_all_run() - struck, 1)}


async def kill_head(run: Run) -> dict[str, Any]:
    held = parts_of(run.cluster.head)
    struck, killed = now(), run.cluster.head.kill()
    await asyncio.sleep(run.settings.away_seconds)
    await asyncio.to_thread(run.cluster.start_head)
    back = now() - struck
    await run.watch_anew()
    took = round(await run.wait_until_all_run() - struck, 1)
    return {"killed": killed, "held": held, "head_started_after_s": round(back, 1), "all_as_before_after_s": took}


def parts_of(node: Node) -> dict[str, int]:
    return {part: number for part in PARTS if (number := holds(node, part))}


def holds(node: Node, part: str) -> int:
    """Processes of a node that are such a part of Serve."""
    found = 0
    for pid in node.pids():
        with suppress(OSError):  # it ended while we looked
            found += part in Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return found


async def measure(cluster: LocalCluster, checkpoint: Path, settings: argparse.Namespace) -> list[dict[str, Any]]:
    run = Run(cluster, scenes(LLAVA.name, settings.items, settings.tokens), settings)
    try:
        run.deploy(run.config)
        await run.wait_until_all_run()
        await ask_alone(run.port, run.asked)
        events: dict[str, Callable[[], Awaitable[dict[str, Any]]]] = {
            "update": lambda: update(run, checkpoint),
            "too_many": lambda: too_many(run),
            "worker": lambda: kill_worker(run),
            "head": lambda: kill_head(run),
        }
        return [await run.under_load(name, events[name]) for name in settings.events]
    finally:
        run.watch.close()


def failures(table: list[dict[str, Any]]) -> list[str]:
    found = [f"{row['event']}: {row['endings']['wrong']} wrong" for row in table if row["endings"].get("wrong")]
    for row in table:
        bad = {name: number for name, number in row["endings"].items() if name not in GOOD and number}
        if row["event"] in ("update", "too_many") and bad:
            found.append(f"{row['event']}: {bad}")
        if row["event"] == "update" and len(row["versions"]) != 2:
            found.append(f"update: answers came from {row['versions']}")
        if "not_back" in row:
            found.append(f"{row['event']}: not as before {row['not_back']}")
        if row["next_answer_after_s"] is None:
            found.append(f"{row['event']}: no answer afterwards")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--events", nargs="+", default=["update", "too_many", "worker", "head"], help="in this order")
    parser.add_argument("--clients", type=int, default=4, help="who ask at a time")
    parser.add_argument("--before-seconds", type=float, default=5, help="load before each event")
    parser.add_argument("--after-seconds", type=float, default=5, help="load after it is over")
    parser.add_argument("--away-seconds", type=float, default=5, help="how long nobody starts the head again")
    parser.add_argument("--items", type=int, default=20, help="scenes that are asked about")
    parser.add_argument("--tokens", type=int, default=40, help="largest number of tokens of an answer")
    parser.add_argument("--patience", type=float, default=300, help="longest wait for replicas, in seconds")
    settings = parser.parse_args()
    os.environ.update(RAY_gcs_rpc_server_reconnect_timeout_s=str(int(settings.patience)))
    with tempfile.TemporaryDirectory() as folder, local_cluster(cpus=(2, 2, 2), with_redis=True) as cluster:
        checkpoint = Path(shutil.copytree(LLAVA, Path(folder) / LLAVA.name))
        (checkpoint / "card.json").write_text('{"version": 2}\n')  # another version, with the same answers
        table = asyncio.run(measure(cluster, checkpoint, settings))
    found = failures(table)
    if settings.json:
        report = {
            "ratios": {f"failed_{row['event']}": failed_share(row) for row in table},
            "spread": {},
            "table": table,
            "manifest": describe_run({name: str(value) for name, value in vars(settings).items()})
            | {"cpus": os.cpu_count()},
        }
        settings.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for failure in found:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if found else 0


def failed_share(row: dict[str, Any]) -> float:
    return round(1 - sum(row["endings"].get(name, 0) for name in ("right", "tie")) / max(1, row["sent"]), 4)


if __name__ == "__main__":
    sys.exit(main())
