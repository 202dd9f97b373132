"""What do clients of a cluster see when a machine dies, the head dies, or a new version takes over?

    python -m tests.benchmarks.cluster.recovery --json FILE

A Ray cluster of a head and three workers on this machine (`local_cluster.py`), two ingress and two model replicas of
the bundled miniature, a Redis that keeps the head's state. `--clients` clients ask, each again as soon as it is
answered; then, one after the other:

- update: the same application with another copy of the checkpoint, deployed in the running cluster;
- worker: SIGKILL to all processes of one worker, one with a replica of the model, while there is room elsewhere;
- head: SIGKILL to all processes of the head, which stays away for `--away-seconds` and comes back at the same Redis.

Each row counts how every request ended, and says how long it took until a request that was sent afterwards was
answered, and until all was as before. All proxies share one port of loopback, the head's too: a client cannot avoid
it, as it does on Kubernetes where the head serves nobody. The exit status is 1 where a request of the update failed,
an answer was wrong, or something did not come back.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.benchmarks.cluster.cluster_load import now
from tests.benchmarks.cluster.events import Run, arguments, bad_endings, changed, measure, report
from tests.benchmarks.cluster.local_cluster import Node, local_cluster
from training.miniature.paths import LLAVA

PARTS = ("Model", "Ingress", "Ledger", "ProxyActor", "ServeController")


async def update(run: Run, checkpoint: Path) -> dict[str, Any]:
    began = now()
    run.config = changed(run.config, settings={"model": str(checkpoint)})
    await run.redeploy(run.config)
    return {"all_as_before_after_s": round(await run.wait_until_all_run() - began, 1)}


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


def failures(table: list[dict[str, Any]]) -> list[str]:
    found = [f"{row['event']}: {row['endings']['wrong']} wrong" for row in table if row["endings"].get("wrong")]
    for row in table:
        if row["event"] == "update" and (bad := bad_endings(row)):
            found.append(f"update: {bad}")
        if row["event"] == "update" and len(row["versions"]) != 2:
            found.append(f"update: answers came from {row['versions']}")
        if "not_back" in row:
            found.append(f"{row['event']}: not as before {row['not_back']}")
        if row["next_answer_after_s"] is None:
            found.append(f"{row['event']}: no answer afterwards")
    return found


def main() -> int:
    parser = arguments(__doc__, ["update", "worker", "head"])
    parser.add_argument("--away-seconds", type=float, default=5, help="how long nobody starts the head again")
    settings = parser.parse_args()
    os.environ.update(RAY_gcs_rpc_server_reconnect_timeout_s=str(int(settings.patience)))
    with tempfile.TemporaryDirectory() as folder, local_cluster(cpus=(2, 2, 2), with_redis=True) as cluster:
        checkpoint = Path(shutil.copytree(LLAVA, Path(folder) / LLAVA.name))
        (checkpoint / "card.json").write_text('{"version": 2}\n')  # another version, with the same answers
        events = {"update": lambda run: update(run, checkpoint), "worker": kill_worker, "head": kill_head}
        table = asyncio.run(measure(cluster, settings, events))
    return report(table, failures(table), settings)


if __name__ == "__main__":
    sys.exit(main())
