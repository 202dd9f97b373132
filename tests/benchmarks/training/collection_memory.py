"""Peak memory of collection at 20,000 and at 200,000 pairs of width 1024: it must not grow with the pairs.

    python -m tests.benchmarks.training.collection_memory --json FILE           ratio: collection_memory

Everything is as in a real collection (pairs from JSON lines, decoding ahead, shards, resuming, the finished store; a
Ray actor with --workers 1), but for the model: its representations are random. Each size runs in a process of its own,
whose peak resident memory, with that of the actor, is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).parents[3]
sys.path.insert(0, str(REPOSITORY))

from steering.cluster.local_ray import descendants  # noqa: E402
from tests.tiny_models import drawn_image  # noqa: E402
from training.collection.representer import Described, Prepared, States  # noqa: E402
from training.collection.run import CollectionOptions, collect_store  # noqa: E402
from training.evaluation.manifest import describe_run  # noqa: E402
from training.pairs import Pair  # noqa: E402

WIDTH = 1024
SIZES = (20_000, 200_000)
NAME = "layer_0"


@dataclass(frozen=True)
class RandomStates:
    """In place of a model: settings and representer in one."""

    def describe(self) -> Described:
        return Described(
            model="random", model_sha256="", family="random", names=(NAME,), width=WIDTH, num_layers=1, pooling="none",
            model_dtype="float32",
        )  # fmt: skip

    def load(self) -> RandomStates:
        return self

    def prepare(self, pair: Pair) -> Prepared | str:
        return Prepared(length=len(pair.text), inputs=pair.image.size)

    def represent(self, batch: Sequence[Prepared]) -> Mapping[str, States]:
        return {NAME: States.of([torch.randn(len(batch), WIDTH), torch.randn(len(batch), WIDTH)])}


def collect(pairs: int, workers: int) -> dict[str, Any]:
    """One collection, and the largest sum of its processes' memory."""
    with tempfile.TemporaryDirectory() as folder:
        drawn_image(0).save(Path(folder, "a.png"))
        with Path(folder, "pairs.jsonl").open("w") as lines:
            for index in range(pairs):
                lines.write(json.dumps({"image": "a.png", "text": f"caption {index}"}) + "\n")
        options = CollectionOptions(workers=(workers,), threads=1, stored_dtype="float16")
        with _Peak() as peak:
            spec, output = f"jsonl:{folder}/pairs.jsonl", Path(folder, "store")
            manifest = collect_store(output, spec, RandomStates(), options, lambda line: print(line, file=sys.stderr))
        assert manifest.pairs == pairs
        return {"pairs": pairs, "peak_mib": peak.mib, "driver_peak_mib": _high_water_mib("self")}


class _Peak:
    """Watches this process and the actors below it."""

    mib = 0.0

    def __enter__(self) -> _Peak:
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._watcher.join()

    def _watch(self) -> None:
        import os

        while not self._ended.wait(0.2):
            actors = [pid for pid in descendants(os.getpid()) if "ShardActor" in _command_line(pid)]
            self.mib = max(self.mib, _high_water_mib("self") + sum(_high_water_mib(pid) for pid in actors))


def _high_water_mib(pid: int | str) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def main() -> None:
    """Both sizes, then their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="Ray actors; 0: all in one process")
    parser.add_argument("--sizes", type=int, nargs=2, default=SIZES)
    parser.add_argument("--pairs", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    if settings.pairs:
        print(json.dumps(collect(settings.pairs, settings.workers)))
        return
    table = []
    for pairs in settings.sizes:
        command = [sys.executable, __file__, "--pairs", str(pairs), "--workers", str(settings.workers)]
        shown = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
        table.append(json.loads(shown.stdout.splitlines()[-1]))
        print(f"{pairs:>8,} pairs: {table[-1]['peak_mib']:,.0f} MiB at most", flush=True)
    ratio = table[1]["peak_mib"] / table[0]["peak_mib"]
    print(f"ratio {ratio:.3f} (wanted: at most 1.15)")
    report = {
        "ratios": {"collection_memory": ratio},
        "spread": {"collection_memory": [ratio, ratio]},
        "table": table,
        "manifest": describe_run({name: str(value) for name, value in vars(settings).items()}),
    }
    if settings.json:
        settings.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
