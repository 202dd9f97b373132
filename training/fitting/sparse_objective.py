"""Loss and measures of a sparse autoencoder of any kind, on pooled states. Knows no store and no files.

Shapes: N pairs, H held-out pairs, D width of the states, S shared width, K concepts, k active concepts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.sparse_autoencoder import Modality, SparseCode
from training.baseline_autoencoders import TrainableBaseline
from training.fitting.concept_use import ConceptUse
from training.fitting.fit import Objective
from training.fitting.quality import (
    overlap_of_pairs,
    reconstruction_quality,
    retrieval_of_codes,
    retrieval_of_vectors,
)
from training.fitting.resampling import resample_dead
from training.fitting.workers import Worker
from training.losses import unexplained_variance
from training.run_folder import Centre, shared_representations
from training.sparse_step import TrainableVLSAE
from training.store.reader import PairBatch

_ROWS = 512
"""Pairs that are encoded at once when measuring."""


class SparseObjective(Objective):
    """A sparse autoencoder behind a frozen auxiliary one."""

    centre_2S: Tensor

    def __init__(
        self,
        trained: TrainableVLSAE | TrainableBaseline,
        *,
        auxiliary: AuxiliaryAutoencoder | None,
        centre: Centre | None,
        num_concepts: int,
        steps_per_epoch: int,
        resample_steps: range = range(0),
    ) -> None:
        """`resample_steps`: steps among which the ends of epochs give dead concepts a new start."""
        super().__init__()
        self.trained, self.auxiliary = trained, auxiliary
        self._num_concepts, self._centred, self._resample_steps = num_concepts, centre is not None, resample_steps
        self.use = ConceptUse(num_concepts, steps_per_epoch)
        self.register_buffer("centre_2S", torch.stack(centre) if centre else torch.zeros(2, 1), persistent=False)

    def forward(self, batch: PairBatch) -> Tensor:
        step = self.trained(*self._shared(batch.image_ND, batch.begun_ND))
        self.use.add(step.counts_2K.view(-1, 2), len(batch.image_ND))
        return step.loss

    def gather_statistics(self, worker: Worker) -> None:
        self.use.gather(worker)

    def start_window(self) -> None:
        self.use.start_window()

    @torch.no_grad()
    def evaluate(self, held_out: PairBatch) -> dict[str, float]:
        """Reconstruction is of what is steered, unfinished texts among them; agreement is with whole texts."""
        shared = dict(zip(("image", "text"), self._shared(held_out.image_ND, held_out.begun_ND), strict=True))
        whole_HS = self._shared(held_out.image_ND, held_out.text_ND)[1]
        whole_code, _ = self._through_code(whole_HS, "text")
        codes: dict[str, SparseCode] = {}
        rebuilt: dict[str, Tensor] = {}
        found = {"loss/held_out": 0.0}
        modalities: tuple[Modality, ...] = ("image", "text")
        for modality in modalities:
            codes[modality], rebuilt[modality] = self._through_code(shared[modality], modality)
            found |= reconstruction_quality(modality, rebuilt[modality], shared[modality])
            found[f"{modality}/l0"] = float((codes[modality].activations > 0).sum(1).float().mean())
            found["loss/held_out"] += found[f"{modality}/mse"]
        return {
            **found,
            **self._states_lost(rebuilt["image"], rebuilt["text"], held_out),
            **self.use.measures(),
            **retrieval_of_vectors("shared", shared["image"], whole_HS, held_out.image_ids_N),
            **retrieval_of_codes("codes", codes["image"], whole_code, self._num_concepts, held_out.image_ids_N),
            "retrieval/pairs": len(whole_HS),
            **overlap_of_pairs(codes["image"], whole_code, held_out.image_ids_N).measures(),
        }

    def histograms(self) -> dict[str, Tensor]:
        """How often each concept is active."""
        modalities: tuple[Modality, ...] = ("image", "text")
        return {f"{modality}/activation_frequency": self.use.frequencies_K(modality) for modality in modalities}

    def after_epoch(
        self, optimizer: torch.optim.Optimizer, worker: Worker, next_batch: Callable[[], PairBatch]
    ) -> None:
        """Dead concepts get a new start, if they are to."""
        if int(self.use.steps) in self._resample_steps:
            assert isinstance(self.trained, TrainableVLSAE)
            dead_K = self.use.dead_K2.all(1)
            batch = next_batch()
            shared = self._shared(batch.image_ND, batch.begun_ND)
            resample_dead(self.trained, dead_K, *shared, optimizer, worker, seed=int(self.use.steps))

    def published(self) -> dict[str, Tensor]:
        return self.trained.published()

    def _shared(self, image_ND: Tensor, text_ND: Tensor) -> tuple[Tensor, Tensor]:
        centre = Centre(*self.centre_2S) if self._centred else None
        return shared_representations(image_ND, text_ND, self.auxiliary, centre)

    def _through_code(self, shared_HS: Tensor, modality: Modality) -> tuple[SparseCode, Tensor]:
        parts = [self.trained.encode(part_NS, modality) for part_NS in shared_HS.split(_ROWS)]
        code = SparseCode(*(torch.cat(pieces) for pieces in zip(*parts, strict=True)))
        return code, self.trained.decode(code, modality)

    def _states_lost(self, image_HS: Tensor, text_HS: Tensor, held_out: PairBatch) -> dict[str, float]:
        """The way to the code and all the way back to the LVLM's states."""
        if self.auxiliary is None:
            return {}
        if self._centred:
            image_HS, text_HS = image_HS + self.centre_2S[0], text_HS + self.centre_2S[1]
        image_HD, text_HD = self.auxiliary.reconstruct(image_HS, text_HS)
        return {
            "image/states_fvu": unexplained_variance(image_HD, held_out.image_ND),
            "text/states_fvu": unexplained_variance(text_HD, held_out.begun_ND),
        }
