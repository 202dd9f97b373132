"""Options that both train stages share, and what a run folder has to say to them. Trains nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from training.command_line import Settings
from training.durable_files import write_json
from training.errors import InvalidTraining
from training.fitting.checkpoint import CHECKPOINT_FOLDER, INDEX_FILE
from training.fitting.fit import Plan, Report
from training.fitting.run_log import read_log
from training.fitting.workers import DeviceChoice
from training.run_folder import CENTRE_FILE, CONFIG_FILE, METRICS_FILE, MODEL_FILE, RunConfig, read_run_config

_NOT_RECORDED = {
    "representations", "layer", "auxiliary", "output", "workers", "ray_address", "device", "checkpoint_every",
}  # fmt: skip
"""Where and how a run goes on; a resumed one may change them. Store and auxiliary are recorded by what they hold."""


class RunOptions(Settings):
    """Where the pairs are, where the run goes, and on what."""

    representations: Path
    """Store written by collect_representations."""
    layer: int | None = None
    """Which of its layers; needed where it holds several."""
    output: Path
    """Run folder: weights, config, metrics, TensorBoard, plots. An interrupted run in it goes on."""
    held_out: int = Field(default=1000, gt=1)
    """Pairs at the store's end that are kept for measuring; at most 4,096 of them are measured."""
    evaluate_every: int | None = Field(default=None, gt=0)
    """Steps between evaluations; an epoch where it is not given."""
    checkpoint_every: int = Field(default=1000, gt=0)
    """Steps between checkpoints."""
    workers: int = Field(default=1, gt=0)
    """Processes that share every batch (Ray Train, DDP), one per GPU where there are any; 1: this process, without
    Ray. All of them must see the store and the output."""
    ray_address: str | None = None
    """A Ray cluster to train on; without it several workers run on a private Ray on this machine."""
    device: DeviceChoice = "auto"
    """auto: a GPU if there is one, here or on the cluster of --ray-address."""


def recorded(settings: RunOptions) -> dict[str, Any]:
    """Settings as a run folder keeps them: what decides its weights and metrics."""
    return settings.model_dump(mode="json", exclude=_NOT_RECORDED)


def begin_run(folder: Path, config: RunConfig) -> bool:
    """Is there anything left to do? Raises InvalidTraining, naming the field, if another run has begun here."""
    if not (folder / CONFIG_FILE).exists() or not _has_begun(folder):
        (folder / CENTRE_FILE).unlink(missing_ok=True)
        write_json(folder / CONFIG_FILE, config.model_dump(mode="json"))
        return True
    before, now = read_run_config(folder).model_dump(mode="json"), config.model_dump(mode="json")
    for prefix, one, other in (
        ("", before, now),
        ("store.", before["store"], now["store"]),
        ("", before["settings"], now["settings"]),
    ):
        _require_equal(folder, prefix, one, other)
    return not (folder / METRICS_FILE).exists()


def _has_begun(folder: Path) -> bool:
    """A run that was refused, or ended before it kept anything, leaves its config alone."""
    kept = (folder / MODEL_FILE, folder / METRICS_FILE, folder / CHECKPOINT_FOLDER / INDEX_FILE)
    return any(file.exists() for file in kept) or bool(read_log(folder))


def _require_equal(folder: Path, prefix: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in sorted(before.keys() | now.keys()):
        if isinstance(before.get(name), dict):
            continue
        if before.get(name) != now.get(name):
            raise InvalidTraining(
                f"{folder / CONFIG_FILE}: the run there was begun with {prefix}{name}={before.get(name)!r}, "
                f"this one has {now.get(name)!r}; go on with the settings it was begun with, or give another --output"
            )


def report_finished(folder: Path, report: Report) -> None:
    """What the run folder of a finished run says."""
    measured = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    report(f"{folder}: finished after {measured['step']} steps; on held-out pairs:")
    for name, value in measured.items():
        report(f"  {name:28s} {value:.4g}")


def make_plan(
    settings: RunOptions, *, steps_per_epoch: int, epochs: int, warmup_share: float, learning_rate: float
) -> Plan:
    """Steps for so many epochs."""
    total_steps = steps_per_epoch * epochs
    return Plan(
        total_steps=total_steps,
        warmup_steps=round(total_steps * warmup_share),
        learning_rate=learning_rate,
        evaluate_every=settings.evaluate_every or steps_per_epoch,
        checkpoint_every=settings.checkpoint_every,
    )
