"""How much faster is the sparse step than a dense one? Forward, backward and optimiser of a VL-SAE.

    python -m tests.benchmarks.training.sae_training --json FILE
    python -m tests.benchmarks.training.sae_training --device cuda

The dense one is the same equations with dense tensors (`dense_vl_sae.py`): cosines and codes [N, K], zeros
elsewhere, two nn.Linear decoders, autograd. Both start from the same weights and see the same batches in float32, made
beforehand; both have the same fused Adam. First they train side by side: their losses must agree to 1e-5, or to 1e-3
with --tf32, which rounds the products of both. Then every round times some steps of each, in alternating order, so that
a machine that slows down slows both; the ratio is of the samples a second in one round. Shapes: S shared width, K
concepts, k active ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steering.sparse_autoencoder import VisionLanguageSAE
from tests.benchmarks.training.dense_vl_sae import DenseVLSAE
from training.evaluation.manifest import describe_run
from training.sparse_step import TrainableVLSAE

MIN_ROUNDS = 7
LEARNING_RATE = 1e-4
LOSS_TOLERANCE, LOSS_TOLERANCE_TF32 = 1e-5, 1e-3
COMPARED_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one comparison."""

    shared_size: int
    num_concepts: int
    active_concepts: int


SHAPES = {
    "cpu": {
        "cpu_512": Shape(shared_size=512, num_concepts=4096, active_concepts=64),
        "cpu_1024": Shape(shared_size=1024, num_concepts=8192, active_concepts=128),
    },
    "cuda": {"cuda_4096": Shape(shared_size=4096, num_concepts=32768, active_concepts=256)},
}
"""By device; the ratios' names."""


class Contestant:
    """A model with its optimiser."""

    def __init__(self, module: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._optimizer = torch.optim.Adam(module.parameters(), lr=LEARNING_RATE, fused=True)
        self._loss = loss

    def step(self, image_NS: Tensor, text_NS: Tensor) -> Tensor:
        loss = self._loss(image_NS, text_NS)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        return loss.detach()


def compare(name: str, shape: Shape, settings: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one shape."""
    contestants, batches = _make_contestants(shape, settings), _make_batches(shape, settings)
    tolerance = LOSS_TOLERANCE_TF32 if settings.tf32 else LOSS_TOLERANCE
    difference = _compare_losses(name, contestants, batches, tolerance)
    samples_per_s: dict[str, list[float]] = {label: [] for label in contestants}
    for number in range(settings.rounds):
        for label in sorted(contestants, reverse=bool(number % 2)):
            _wait(settings.device)
            started = time.perf_counter()
            for index in range(settings.steps):
                contestants[label].step(*batches[(number + index) % len(batches)])
            _wait(settings.device)
            seconds = time.perf_counter() - started
            samples_per_s[label].append(settings.steps * settings.batch_size / seconds)
        print(f"{name}, round {number + 1}: {samples_per_s['sparse'][-1] / samples_per_s['dense'][-1]:.2f}", flush=True)
    return {"name": name, "shape": shape, "samples_per_s": samples_per_s, "largest_loss_difference": difference}


def _make_contestants(shape: Shape, settings: argparse.Namespace) -> dict[str, Contestant]:
    torch.manual_seed(settings.seed)
    sae = VisionLanguageSAE(shape.shared_size, shape.num_concepts, shape.active_concepts).to(settings.device)
    dense, sparse = DenseVLSAE(sae), TrainableVLSAE(sae, bfloat16_product=settings.product == "bfloat16")
    return {
        "dense": Contestant(dense.to(settings.device), dense),
        "sparse": Contestant(sparse, lambda image_NS, text_NS: sparse(image_NS, text_NS).loss),
    }


def _make_batches(shape: Shape, settings: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """Pairs that share content, as images and their texts do."""
    batches = []
    for _ in range(COMPARED_STEPS):
        content, image_noise, text_noise = torch.randn(
            3, settings.batch_size, shape.shared_size, device=settings.device
        )
        batches.append((content + 0.5 * image_noise, content + 0.5 * text_noise))
    return batches


def _compare_losses(
    name: str, contestants: dict[str, Contestant], batches: list[tuple[Tensor, Tensor]], tolerance: float
) -> float:
    """Trains both on all batches; they stay beside each other."""
    differences = []
    for batch in batches:
        dense, sparse = (float(contestants[label].step(*batch)) for label in ("dense", "sparse"))
        differences.append(abs(dense - sparse))
        if differences[-1] > tolerance * max(1.0, abs(dense)):
            raise RuntimeError(f"{name}: the dense loss is {dense}, the sparse one {sparse}")
    print(f"{name}: losses of {len(batches)} steps differ by at most {max(differences):.1e}, the last is {dense:.6f}")
    return max(differences)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def make_report(comparisons: list[dict[str, Any]], settings: argparse.Namespace) -> dict[str, Any]:
    """Medians of the rounds' ratios; the spread is their smallest and largest."""
    ratios = {
        one["name"]: [
            sparse / dense
            for sparse, dense in zip(one["samples_per_s"]["sparse"], one["samples_per_s"]["dense"], strict=True)
        ]
        for one in comparisons
    }
    table = [
        {
            "name": one["name"],
            "step": label,
            **vars(one["shape"]),
            "batch_size": settings.batch_size,
            "samples_per_s": round(statistics.median(values), 1),
            "largest_loss_difference": one["largest_loss_difference"],
        }
        for one in comparisons
        for label, values in one["samples_per_s"].items()
    ]
    machine = {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "load_average": os.getloadavg()}
    return {
        "ratios": {name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "spread": {name: [round(min(values), 3), round(max(values), 3)] for name, values in ratios.items()},
        "table": table,
        "manifest": describe_run({name: str(value) for name, value in vars(settings).items()}) | machine,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--device", choices=sorted(SHAPES), default="cpu", help="cuda: the paper's scale")
    parser.add_argument("--batch-size", type=int, default=512, help="pairs per step")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds; at least 7")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch; one depends least on other load")
    parser.add_argument("--steps", type=int, default=2, help="steps of each in a round")
    parser.add_argument(
        "--product", choices=["float32", "bfloat16"], default="float32", help="the sparse step's product"
    )
    parser.add_argument("--tf32", action="store_true", help="a GPU's float32 products in TF32, on both sides")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch.set_float32_matmul_precision("high" if settings.tf32 else "highest")
    if settings.rounds < MIN_ROUNDS:
        parser.error("--rounds: a median of fewer than 7 rounds says too little")
    report = make_report([compare(name, shape, settings) for name, shape in SHAPES[settings.device].items()], settings)
    for row in report["table"]:
        print(f"{row['name']:>10}, {row['step']:>6}: {row['samples_per_s']:9.1f} samples/s")
    for name, value in report["ratios"].items():
        print(f"{name}: {value} {report['spread'][name]}")
    if settings.json:
        settings.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
