"""The loop that both train stages share: steps, checkpoints, evaluations, and the run folder at the end.

A learning rate is a function of the step and a batch one of (seed, step), so that a run that was interrupted anywhere
goes on as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from training.durable_files import remove_unfinished, write_json, write_tensors
from training.fitting.batches import ShuffledBatches
from training.fitting.checkpoint import CHECKPOINT_FOLDER, drop_checkpoints, load_checkpoint, save_checkpoint
from training.fitting.plots import PLOT_FOLDER, draw_plots
from training.fitting.run_log import Row, RunLog, read_log
from training.fitting.workers import Worker
from training.run_folder import METRICS_FILE, MODEL_FILE
from training.store.reader import PairBatch

Report = Callable[[str], None]


class Objective(nn.Module):
    """What is fitted. Checkpoints keep its buffers, which are statistics, and the parameters that have a gradient."""

    def forward(self, batch: PairBatch) -> Tensor:
        """The loss of a worker's share of a batch; the mean over workers is the batch's."""
        raise NotImplementedError

    def gather_statistics(self, worker: Worker) -> None:
        """Buffers become those of all workers, on the one that leads; called on all of them."""

    def evaluate(self, held_out: PairBatch) -> dict[str, float]:
        """Measures of pairs that were not trained on."""
        raise NotImplementedError

    def histograms(self) -> dict[str, Tensor]:
        """What deserves more than a number."""
        return {}

    def start_window(self) -> None:
        """What is counted between evaluations starts anew; called on all workers."""

    def after_epoch(
        self, optimizer: torch.optim.Optimizer, worker: Worker, next_batch: Callable[[], PairBatch]
    ) -> None:
        """Called on all workers, with the same pairs for each, but after the last epoch."""

    def published(self) -> dict[str, Tensor]:
        """Weights under the names that later stages know."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many steps, and what happens between them."""

    total_steps: int
    warmup_steps: int
    """Of them, with a rising learning rate."""
    learning_rate: float
    """At its peak."""
    evaluate_every: int
    """Steps."""
    checkpoint_every: int
    """Steps."""

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up to the peak, then half a cosine to zero."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2


@dataclass(kw_only=True)
class Fit:
    """One run on one worker."""

    run: Path
    """The run folder."""
    objective: Objective
    optimizer: torch.optim.Optimizer
    batches: ShuffledBatches
    held_out: PairBatch | None
    """On the device; None on workers that do not lead."""
    plan: Plan
    worker: Worker
    report: Report

    def __call__(self) -> None:
        """From the last checkpoint, or the start, to the end."""
        self.objective.register_buffer("loss_sum", torch.zeros((), dtype=torch.float64, device=self.worker.device))
        self.objective.register_buffer("loss_steps", torch.zeros((), dtype=torch.int64, device=self.worker.device))
        if self.worker.leads:
            for folder in (self.run, self.run / CHECKPOINT_FOLDER, self.run / PLOT_FOLDER):
                remove_unfinished(folder)
        step = load_checkpoint(self.run, self.objective, self.optimizer)
        if not self.worker.leads:
            self._start_window()  # the checkpoint holds everybody's sums, and the lead goes on with them
            self._steps(step, None)
            return
        self._report_start(step)
        with RunLog(self.run, step) as log:
            self._steps(step, log)
        self._finish()

    def _report_start(self, step: int) -> None:
        if step:
            self.report(f"going on after step {step} of {self.plan.total_steps}")
        if self.batches.batch_size < self.batches.asked_batch_size:
            self.report(
                f"there are fewer training pairs than batch_size={self.batches.asked_batch_size}: "
                f"every batch has all {self.batches.batch_size}"
            )

    def _steps(self, step: int, log: RunLog | None) -> None:
        module = self.worker.share_gradients(self.objective)
        started, started_at = time.perf_counter(), step
        for batch in self.batches.between(step, self.plan.total_steps):
            self._step(module, step, batch)
            step += 1
            if step % self.batches.steps_per_epoch == 0 and step < self.plan.total_steps:
                self._gather()
                self.objective.after_epoch(self.optimizer, self.worker, partial(self._whole_batch, step))
            last = step == self.plan.total_steps
            if last or step % self.plan.evaluate_every == 0:
                rate = (step - started_at) * self.batches.batch_size / (time.perf_counter() - started)
                self._evaluate(step, rate, log)
                started, started_at = time.perf_counter(), step
                if not last:
                    self._start_window()
            if last or step % self.plan.checkpoint_every == 0:
                self._gather()
                if self.worker.leads:
                    save_checkpoint(self.run, step, self.objective, self.optimizer)

    def _step(self, module: nn.Module, step: int, batch: PairBatch) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.learning_rate_at(step)
        loss = module(self._on_device(batch))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self._loss_sum.add_(loss.detach())
        self._loss_steps.add_(1)

    def _evaluate(self, step: int, samples_per_s: float, log: RunLog | None) -> None:
        self._gather()
        if log is not None:
            assert self.held_out is not None
            row: Row = {
                "step": step,
                "epoch": round(step / self.batches.steps_per_epoch, 4),
                "learning_rate": self.plan.learning_rate_at(step - 1),
                "loss/train": float(self._loss_sum / self._loss_steps.clamp(min=1)),
                **self.objective.evaluate(self.held_out),
                "samples_per_s": round(samples_per_s, 1),
            }
            log.write(row, self.objective.histograms())
            self.report(f"step {step} of {self.plan.total_steps}: {_in_a_line(row)}")

    def _start_window(self) -> None:
        self._loss_sum.zero_()
        self._loss_steps.zero_()
        self.objective.start_window()

    def _gather(self) -> None:
        """Sums go to the worker that leads; the others start theirs anew."""
        for total in (self._loss_sum, self._loss_steps):
            self.worker.add_up(total)
            if not self.worker.leads:
                total.zero_()
        self.objective.gather_statistics(self.worker)

    def _finish(self) -> None:
        weights = {name: tensor.detach().cpu() for name, tensor in self.objective.published().items()}
        write_tensors(self.run / MODEL_FILE, weights)
        rows = read_log(self.run)
        draw_plots(self.run, rows, self.objective.histograms())
        write_json(self.run / METRICS_FILE, {k: v for k, v in rows[-1].items() if k != "samples_per_s"})
        drop_checkpoints(self.run)

    def _whole_batch(self, step: int) -> PairBatch:
        return self._on_device(self.batches.whole(step))

    def _on_device(self, batch: PairBatch) -> PairBatch:
        return PairBatch(*(tensor.to(self.worker.device, non_blocking=True) for tensor in batch))

    @property
    def _loss_sum(self) -> Tensor:
        return self.objective.get_buffer("loss_sum")

    @property
    def _loss_steps(self) -> Tensor:
        return self.objective.get_buffer("loss_steps")


def _in_a_line(row: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step")
