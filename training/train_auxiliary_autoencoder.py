"""Stage 2: the auxiliary autoencoder, which brings pooled image and text states into one space (paper, section 3.2).

    loss = contrastive_weight * InfoNCE + MSE of the image states + MSE of the text states

Where prefixes were collected, InfoNCE compares an image with its whole text, and what is reconstructed of the text is a
prefix or the whole in turn: only a finished text says what the image shows, but steering meets unfinished ones.

    python -m training.train_auxiliary_autoencoder --representations STORE --layer 30 --output RUN

Reads a store of `collect_representations`, writes a run folder; knows no model and no sparse autoencoder.
"""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from training.command_line import Settings, parse_settings, run_stage
from training.fitting.batches import ShuffledBatches, read_held_out, sample_batches
from training.fitting.fit import Fit, Objective, Report
from training.fitting.options import RunOptions, begin_run, make_plan, recorded, report_finished
from training.fitting.quality import reconstruction_quality, retrieval_of_vectors
from training.fitting.workers import Worker, run_on_workers
from training.losses import Similarity, info_nce, reconstruction_error
from training.run_folder import RunConfig, identify_store
from training.store.reader import PairBatch, RepresentationStore, open_store

_WARMUP_SHARE = 0.05


class AuxiliaryTraining(Settings):
    """How the auxiliary autoencoder is trained."""

    shared_size: int = Field(default=4096, gt=0)
    """S, width of the shared space."""
    contrastive_weight: float = Field(default=1.0, ge=0)
    """Weight of InfoNCE beside the two reconstruction errors; the paper's is 1, a tenth keeps more of the states."""
    temperature: float = Field(default=0.07, gt=0)
    """Divides similarities in InfoNCE."""
    similarity: Similarity = "cosine"
    """What InfoNCE compares with: cosine in the paper, dot in the authors' code."""
    learning_rate: float = Field(default=5e-5, gt=0)
    """Peak, of AdamW; linear warm-up over a twentieth of the steps, then cosine."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Of AdamW."""
    batch_size: int = Field(default=2048, gt=1)
    """Pairs per step, over all workers; all of them are each other's negatives."""
    epochs: int = Field(default=50, gt=0)
    """Passes over the pairs."""
    seed: int = 0
    """Of initial weights and order."""


class CommandLine(AuxiliaryTraining, RunOptions):
    """Train on a store of representations."""


class AuxiliaryObjective(Objective):
    """Loss and measures of an auxiliary autoencoder."""

    def __init__(self, auxiliary: AuxiliaryAutoencoder, config: AuxiliaryTraining, worker: Worker) -> None:
        super().__init__()
        self.auxiliary, self._config, self._worker = auxiliary, config, worker

    def forward(self, batch: PairBatch) -> Tensor:
        """InfoNCE is over the pairs of all workers: every worker has it whole, so that their mean is it again."""
        image_NS, text_NS = self.auxiliary(batch.image_ND, batch.text_ND)
        image_back_ND, begun_back_ND = self.auxiliary.reconstruct(
            image_NS, self.auxiliary.text_projection(batch.begun_ND)
        )
        contrastive = info_nce(
            *(self._worker.gather_rows(part) for part in (image_NS, text_NS, batch.text_ids_N, batch.image_ids_N)),
            temperature=self._config.temperature,
            similarity=self._config.similarity,
        )
        rebuilt = reconstruction_error(image_back_ND, batch.image_ND)
        rebuilt = rebuilt + reconstruction_error(begun_back_ND, batch.begun_ND)
        return self._config.contrastive_weight * contrastive + rebuilt

    @torch.no_grad()
    def evaluate(self, held_out: PairBatch) -> dict[str, float]:
        image_HS, text_HS = self.auxiliary(held_out.image_ND, held_out.text_ND)
        begun_HS = self.auxiliary.text_projection(held_out.begun_ND)
        image_back_HD, begun_back_HD = self.auxiliary.reconstruct(image_HS, begun_HS)
        return {
            **reconstruction_quality("image", image_back_HD, held_out.image_ND),
            **reconstruction_quality("text", begun_back_HD, held_out.begun_ND),
            **retrieval_of_vectors("shared", image_HS, text_HS, held_out.image_ids_N),
            "retrieval/pairs": len(image_HS),
        }

    def published(self) -> dict[str, Tensor]:
        return self.auxiliary.state_dict()


def train_auxiliary_autoencoder(settings: CommandLine, report: Report = print) -> None:
    """Trains, or goes on training, into the run folder."""
    store = open_store(settings.representations, settings.layer)
    _batches(store, settings, Worker(count=settings.workers))
    config = RunConfig(
        kind="auxiliary",
        settings=recorded(settings),
        shared_size=settings.shared_size,
        store=identify_store(store),
    )
    if begin_run(settings.output, config):
        run_on_workers(
            partial(_train, settings, report),
            workers=settings.workers,
            device=settings.device,
            ray_address=settings.ray_address,
        )
    report_finished(settings.output, report)


def _train(settings: CommandLine, report: Report, worker: Worker) -> None:
    """On each worker."""
    store = open_store(settings.representations, settings.layer, verify=False)
    batches = _batches(store, settings, worker)
    torch.manual_seed(settings.seed)
    auxiliary = AuxiliaryAutoencoder(store.width, settings.shared_size)
    centre_biases(auxiliary, store, held_out=settings.held_out, seed=settings.seed)
    objective = AuxiliaryObjective(auxiliary, settings, worker).to(worker.device)
    optimizer = torch.optim.AdamW(
        objective.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    plan = make_plan(
        settings,
        steps_per_epoch=batches.steps_per_epoch,
        epochs=settings.epochs,
        warmup_share=_WARMUP_SHARE,
        learning_rate=settings.learning_rate,
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


def _batches(store: RepresentationStore, settings: CommandLine, worker: Worker) -> ShuffledBatches:
    return ShuffledBatches(
        store,
        held_out=settings.held_out,
        batch_size=settings.batch_size,
        seed=settings.seed,
        rank=worker.rank,
        workers=worker.count,
    )


@torch.no_grad()
def centre_biases(auxiliary: AuxiliaryAutoencoder, store: RepresentationStore, *, held_out: int, seed: int) -> None:
    """Biases such that the mean state maps to zero and back: both spaces start without their common offset.

    The mean is over the training pairs, or over 65,536 of them drawn at random where there are more.
    """
    count, total_2D = 0, torch.zeros(2, store.width, dtype=torch.float64)
    for batch in sample_batches(store, held_out=held_out, seed=seed):
        count += len(batch.image_ND)
        total_2D += torch.stack([part_ND.sum(0, dtype=torch.float64) for part_ND in (batch.image_ND, batch.begun_ND)])
    for mean_D, projection, decoder in zip(
        (total_2D / count).float(),
        (auxiliary.vision_projection, auxiliary.text_projection),
        (auxiliary.vision_decoder, auxiliary.text_decoder),
        strict=True,
    ):
        projection.bias.copy_(-projection.weight @ mean_D)
        decoder.bias.copy_(mean_D)


def main() -> None:
    """The command line."""
    train_auxiliary_autoencoder(
        parse_settings(CommandLine, program="python -m training.train_auxiliary_autoencoder", description=__doc__)
    )


if __name__ == "__main__":
    run_stage(main)
