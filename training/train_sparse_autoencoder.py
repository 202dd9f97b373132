"""Stage 3: the VL-SAE, a distance-based encoder shared by the modalities and one decoder each (paper, section 3.3).

    loss = MSE of the shared image representation + MSE of the shared text representation, each through its code

    python -m training.train_sparse_autoencoder --representations STORE --layer 30 --auxiliary RUN --output RUN

SAE-D and SAE-V are trained and measured by the same loop. Reads a store of `collect_representations` and the run of an
auxiliary autoencoder (none for CLIP), writes a run folder; knows no model.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.sparse_autoencoder import VisionLanguageSAE
from training.baseline_autoencoders import TrainableBaseline
from training.command_line import Settings, parse_settings, run_stage
from training.durable_files import sha256_of, write_tensors
from training.errors import InvalidTraining
from training.fitting.batches import ShuffledBatches, read_held_out, sample_batches
from training.fitting.fit import Fit, Report
from training.fitting.options import RunOptions, begin_run, make_plan, recorded, report_finished
from training.fitting.sparse_objective import SparseObjective
from training.fitting.workers import Worker, run_on_workers
from training.run_folder import (
    CENTRE_FILE,
    CONFIG_FILE,
    MODEL_FILE,
    SPARSE_KINDS,
    Centre,
    RunConfig,
    SparseKind,
    identify_store,
    read_auxiliary,
    read_run_config,
    require_states,
    shared_representations,
)
from training.sparse_step import TrainableVLSAE
from training.store.reader import RepresentationStore, open_store

_ADAM_EPSILON = 1e-15
"""The loss is a mean over S, and a concept is in few of a batch's codes: at S 4096 an entry of the encoder's gradient
is about 1e-8 and less, so that Adam's usual epsilon would throttle its steps."""


class SparseTraining(Settings):
    """How the sparse autoencoder is trained."""

    kind: SparseKind = "vl_sae"
    """vl_sae; or to compare with: sae_d (an encoder and a decoder per modality), sae_v (one of each for both)."""
    num_concepts: int = Field(default=32768, gt=0)
    """K; 8 times the shared width in the paper."""
    active_concepts: int = Field(default=256, gt=0)
    """k, concepts in a code."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak, of Adam; linear warm-up, then cosine."""
    batch_size: int = Field(default=512, gt=0)
    """Pairs per step, over all workers."""
    epochs: int = Field(default=10, gt=1)
    """Passes over the pairs."""
    warmup_epochs: int = Field(default=2, ge=0)
    """Of them, with a rising learning rate."""
    seed: int = 0
    """Of initial weights and order."""
    centre: bool = False
    """Take each modality's mean off the shared representations; it is kept in the run folder."""
    resample_dead: bool = False
    """At the end of each epoch of the first half, concepts that nothing used for an epoch start anew (VL-SAE)."""
    product: Literal["float32", "bfloat16"] = "float32"
    """Number format in which a VL-SAE's nearest concepts are found; bfloat16 is for GPUs. Codes stay float32."""


class CommandLine(SparseTraining, RunOptions):
    """Train on a store of representations."""

    auxiliary: Path | None = None
    """Run folder of train_auxiliary_autoencoder; not for CLIP, whose embeddings share a space already."""


def train_sparse_autoencoder(settings: CommandLine, report: Report = print) -> None:
    """Trains, or goes on training, into the run folder."""
    store = open_store(settings.representations, settings.layer)
    _check(settings, store)
    _batches(store, settings, Worker(count=settings.workers))
    auxiliary = settings.auxiliary
    config = RunConfig(
        kind=settings.kind,
        settings=recorded(settings),
        shared_size=read_run_config(auxiliary).shared_size if auxiliary else store.width,
        num_concepts=settings.num_concepts,
        active_concepts=settings.active_concepts,
        store=identify_store(store),
        auxiliary_sha256=sha256_of(auxiliary / MODEL_FILE) if auxiliary else None,
    )
    if begin_run(settings.output, config):
        run_on_workers(
            partial(_train, settings, report),
            workers=settings.workers,
            device=settings.device,
            ray_address=settings.ray_address,
        )
    report_finished(settings.output, report)


def _check(settings: CommandLine, store: RepresentationStore) -> None:
    if settings.active_concepts > settings.num_concepts:
        raise InvalidTraining(
            f"active_concepts is {settings.active_concepts}; it must be at most num_concepts={settings.num_concepts}"
        )
    if settings.warmup_epochs >= settings.epochs:
        raise InvalidTraining(
            f"warmup_epochs is {settings.warmup_epochs}; it must be less than epochs={settings.epochs}"
        )
    for field in ("resample_dead", "product"):
        if settings.kind != "vl_sae" and getattr(settings, field) != SparseTraining.model_fields[field].default:
            raise InvalidTraining(
                f"{field} is {getattr(settings, field)!r}, but kind {settings.kind} has no such option"
            )
    if settings.auxiliary is None:
        return
    read_auxiliary(settings.auxiliary)
    require_states(store, settings.auxiliary)
    before = read_run_config(settings.auxiliary)
    held_out = before.settings["held_out"]
    if before.store.data_sha256 == identify_store(store).data_sha256 and settings.held_out > held_out:
        raise InvalidTraining(
            f"held_out is {settings.held_out}, but {settings.auxiliary / CONFIG_FILE} has held_out={held_out}: the "
            "auxiliary autoencoder has seen pairs that would be measured; give the same held_out to both"
        )


def _train(settings: CommandLine, report: Report, worker: Worker) -> None:
    """On each worker."""
    store = open_store(settings.representations, settings.layer, verify=False)
    batches = _batches(store, settings, worker)
    auxiliary = read_auxiliary(settings.auxiliary) if settings.auxiliary else None
    centre = measure_centre(store, auxiliary, settings) if settings.centre else None
    if centre and worker.leads:
        write_tensors(settings.output / CENTRE_FILE, {"image": centre.image_S, "text": centre.text_S})
    plan = make_plan(
        settings,
        steps_per_epoch=batches.steps_per_epoch,
        epochs=settings.epochs,
        warmup_share=settings.warmup_epochs / settings.epochs,
        learning_rate=settings.learning_rate,
    )
    objective = SparseObjective(
        _new_autoencoder(settings, auxiliary.vision_projection.out_features if auxiliary else store.width),
        auxiliary=auxiliary,
        centre=centre,
        num_concepts=settings.num_concepts,
        steps_per_epoch=batches.steps_per_epoch,
        resample_steps=range(1, plan.total_steps // 2 + 1) if settings.resample_dead else range(0),
    ).to(worker.device)
    optimizer = torch.optim.Adam(
        objective.trained.parameters(), lr=settings.learning_rate, eps=_ADAM_EPSILON, fused=True
    )
    fit = Fit(
        run=settings.output,
        objective=objective,
        optimizer=optimizer,
        batches=batches,
        held_out=read_held_out(store, settings.held_out, worker),
        plan=plan,
        worker=worker,
        report=report,
    )
    fit()


def _new_autoencoder(settings: CommandLine, shared_size: int) -> TrainableVLSAE | TrainableBaseline:
    torch.manual_seed(settings.seed)
    sae = SPARSE_KINDS[settings.kind](shared_size, settings.num_concepts, settings.active_concepts)
    if isinstance(sae, VisionLanguageSAE):
        return TrainableVLSAE(sae, bfloat16_product=settings.product == "bfloat16")
    return TrainableBaseline(sae)


def _batches(store: RepresentationStore, settings: CommandLine, worker: Worker) -> ShuffledBatches:
    return ShuffledBatches(
        store,
        held_out=settings.held_out,
        batch_size=settings.batch_size,
        seed=settings.seed,
        rank=worker.rank,
        workers=worker.count,
    )


def measure_centre(store: RepresentationStore, auxiliary: AuxiliaryAutoencoder | None, settings: CommandLine) -> Centre:
    """Means over the training pairs, or over 65,536 of them drawn at random where there are more."""
    count, image_S, text_S = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for batch in sample_batches(store, held_out=settings.held_out, seed=settings.seed):
        image_NS, text_NS = shared_representations(batch.image_ND, batch.begun_ND, auxiliary)
        count += len(image_NS)
        image_S = image_S + image_NS.sum(0, dtype=torch.float64)
        text_S = text_S + text_NS.sum(0, dtype=torch.float64)
    return Centre((image_S / count).float(), (text_S / count).float())


def main() -> None:
    """The command line."""
    train_sparse_autoencoder(
        parse_settings(CommandLine, program="python -m training.train_sparse_autoencoder", description=__doc__)
    )


if __name__ == "__main__":
    run_stage(main)
