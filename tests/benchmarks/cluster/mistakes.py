"""What does the running version notice of a mistake in the next one? Each is deployed on a cluster, under load.

    python -m tests.benchmarks.cluster.mistakes --json FILE

The cluster of `recovery.py`, two ingress and two model replicas on workers of which only the first has one folder (the
others see an empty one there, in a mount namespace of their own: this needs root). One after the other:

- artifact: one that lies in that folder, so that some machines have it and some do not;
- keys: a file of keys that no Secret brought;
- gpu: an engine for CUDA, where no machine has a GPU;
- replicas: more than there is room for.

Each row has the words by which Serve tells of it, how many replicas answered meanwhile, and how every request ended;
then what ran before is deployed again. The exit status is 1 where a request failed, the words do not name the mistake,
or what ran before is not back.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.cluster.events import Run, arguments, bad_endings, changed, measure, report
from tests.benchmarks.cluster.local_cluster import local_cluster, running
from training.miniature.paths import ARTIFACT

TOO_MANY = 20
TOLD = ("DEPLOY_FAILED", "UNHEALTHY")


class Mistake(NamedTuple):
    """What is changed, and the word by which an operator finds it."""

    settings: dict[str, Any]
    model: dict[str, Any]
    word: str


def mistakes(artifact: Path) -> dict[str, Mistake]:
    keys = artifact.parent / "nowhere.json"
    cuda = {"name": "huggingface", "device": "cuda", "max_batch_size": 4}
    return {
        "artifact": Mistake({"artifact": str(artifact)}, {}, str(artifact)),
        "keys": Mistake({"keys_file": str(keys), "allow_anonymous": False}, {}, str(keys)),
        "gpu": Mistake({"engine": cuda}, {}, "GPU"),
        "replicas": Mistake({}, {"num_replicas": TOO_MANY}, "has 1"),
    }


def told(sample: dict[str, Any]) -> str:
    """What Serve says is wrong; empty where it says nothing yet."""
    words = [one["message"] for one in sample["deployments"].values() if one["status"] in TOLD or lacks(one)]
    return " ".join([sample["message"], *words]) if words or sample["status"] in TOLD else ""


def lacks(deployment: dict[str, Any]) -> bool:
    return "Resources required" in deployment["message"]


async def make(run: Run, mistake: Mistake) -> dict[str, Any]:
    await run.redeploy(changed(run.config, settings=mistake.settings, model=mistake.model))
    took = await asyncio.to_thread(run.watch.wait_for, lambda sample: bool(told(sample)), run.settings.patience)
    sample = run.watch.samples[-1]
    await asyncio.sleep(run.settings.after_seconds)
    run.deploy(run.config)
    await run.wait_until_all_run()
    words = told(sample)
    return {
        "told_after_s": round(took, 1),
        "named": mistake.word in words,
        "words": words[-1500:],
        "still_running": {name: running(sample, name) for name in ("Ingress", "Model")},
    }


def failures(table: list[dict[str, Any]]) -> list[str]:
    found = [f"{row['event']}: {bad}" for row in table if (bad := bad_endings(row))]
    for row in table:
        if not row.get("named"):
            found.append(f"{row['event']}: not named in {row.get('words', row.get('not_back'))}")
    return found


def main() -> int:
    settings = arguments(__doc__, ["artifact", "keys", "gpu", "replicas"]).parse_args()
    with tempfile.TemporaryDirectory() as folder, local_cluster(cpus=(2,)) as cluster:
        artifact = Path(shutil.copytree(ARTIFACT, Path(folder) / ARTIFACT.name))
        for _ in range(2):
            cluster.add_worker(2, without=artifact.parent)
        events = {name: lambda run, mistake=mistake: make(run, mistake) for name, mistake in mistakes(artifact).items()}
        table = asyncio.run(measure(cluster, settings, events))
    return report(table, failures(table), settings)


if __name__ == "__main__":
    sys.exit(main())
