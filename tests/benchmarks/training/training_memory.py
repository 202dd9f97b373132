"""Does training need more memory for more pairs? Peak of both stages at 20,000 and at 200,000 pairs of width 1024.

    python -m tests.benchmarks.training.training_memory --json FILE

Random representations are written to a temporary folder (bfloat16: 4 KB a pair, .8 GB for the larger store). Every
stage runs in a process of its own, whose largest resident set is taken; two epochs of the sparse stage, one of the
auxiliary. Each ratio is that of a stage at the larger to the smaller number of pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from training.collection.representer import States
from training.evaluation.manifest import describe_run
from training.store.layout import Collected
from training.store.writer import PairRecord, Portion, begin_store, complete_store, write_shard

STAGES = ("auxiliary", "sparse")
PORTION = 10_000


def write_random_store(folder: Path, pairs: int, width: int) -> None:
    """Images and texts that share half of what they are."""
    collected = Collected(
        model="random", model_sha256="0" * 64, family="llava", names=("layer_1",), width=width, num_layers=4,
        pooling="text_after_last_image", model_dtype="float32", stored_dtype="bfloat16", batch_size=1,
        portion_size=PORTION, source={"kind": "random"},
    )  # fmt: skip
    starts = range(0, pairs, PORTION)
    begin_store(folder, collected, len(starts))
    records = {}
    for shard, start in enumerate(starts):
        rows = range(start, min(start + PORTION, pairs))
        content_ND, image_ND, text_ND = torch.randn(3, len(rows), width)
        portion = Portion(
            states={"layer_1": States.of([content_ND + image_ND, content_ND + text_ND])},
            pairs=[PairRecord(pair=row, text=f"text {row}", image=f"image {row}") for row in rows],
            skipped=[],
        )
        records[shard] = write_shard(folder, shard, portion, collected)
    complete_store(folder, records)


def train(stage: str, folder: Path, settings: argparse.Namespace) -> None:
    """In a process of its own: prints its peak memory in bytes."""
    torch.set_num_threads(settings.threads)
    options: dict[str, Any] = {"representations": folder / "store", "output": folder / f"{stage}-{settings.round}"}
    if stage == "auxiliary":
        from training.train_auxiliary_autoencoder import CommandLine, train_auxiliary_autoencoder

        command = CommandLine(**options, shared_size=settings.width, batch_size=2048, epochs=1)
        train_auxiliary_autoencoder(command, lambda line: None)
    else:
        from training import train_sparse_autoencoder as sparse

        command = sparse.CommandLine(
            **options, auxiliary=folder / "auxiliary-0", num_concepts=2 * settings.width, active_concepts=32, epochs=2,
            warmup_epochs=1,
        )  # fmt: skip
        sparse.train_sparse_autoencoder(command, lambda line: None)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def measure(stage: str, folder: Path, settings: argparse.Namespace, number: int) -> dict[str, float]:
    """Peak memory and seconds of one run."""
    command = [sys.executable, __file__, "--stage", stage, "--folder", str(folder), "--round", str(number)]
    command += ["--width", str(settings.width), "--threads", str(settings.threads)]
    started = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {"peak_bytes": int(done.stdout.split()[-1]), "seconds": time.perf_counter() - started}


def compare(settings: argparse.Namespace) -> dict[str, Any]:
    """All runs; the store of each size is written once."""
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="training_memory_") as made:
        folders = {pairs: Path(made) / str(pairs) for pairs in settings.pairs}
        for pairs, folder in folders.items():
            write_random_store(folder / "store", pairs, settings.width)
        for number in range(settings.rounds):
            for stage in STAGES:
                for pairs, folder in folders.items():
                    one = measure(stage, folder, settings, number)
                    found.setdefault((stage, pairs), []).append(one)
                    peak = one["peak_bytes"] / 2**20
                    print(f"{stage}, {pairs} pairs: {peak:.0f} MiB, {one['seconds']:.0f} s", flush=True)
    return make_report(found, settings)


def make_report(found: dict[tuple[str, int], list[dict[str, float]]], settings: argparse.Namespace) -> dict[str, Any]:
    """Medians of the rounds' ratios; the spread is their smallest and largest."""
    few, many = settings.pairs
    ratios = {
        stage: [
            larger["peak_bytes"] / smaller["peak_bytes"]
            for smaller, larger in zip(found[stage, few], found[stage, many], strict=True)
        ]
        for stage in STAGES
    }
    table = [
        {
            "stage": stage,
            "pairs": pairs,
            "peak_mib": round(statistics.median(one["peak_bytes"] for one in runs) / 2**20, 1),
            "seconds": round(statistics.median(one["seconds"] for one in runs), 1),
        }
        for (stage, pairs), runs in found.items()
    ]
    return {
        "ratios": {stage: round(statistics.median(values), 3) for stage, values in ratios.items()},
        "spread": {stage: [round(min(values), 3), round(max(values), 3)] for stage, values in ratios.items()},
        "table": table,
        "manifest": describe_run({name: str(value) for name, value in vars(settings).items()})
        | {"cpus": os.cpu_count()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--pairs", type=int, nargs=2, default=[20_000, 200_000], help="smaller and larger number")
    parser.add_argument("--width", type=int, default=1024, help="of the representations")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--rounds", type=int, default=1, help="a peak varies little: one is enough")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--round", type=int, default=0, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.stage:
        train(settings.stage, settings.folder, settings)
        return
    report = compare(settings)
    for name, value in report["ratios"].items():
        print(f"{name}: {value} {report['spread'][name]}")
    if settings.json:
        settings.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
