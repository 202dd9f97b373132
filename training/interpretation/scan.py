"""One pass over a store: every concept's mean activation, its strongest rows, and the corpus its label is held against.

Memory is for K x T rows and for one batch, however long the store is. Knows no pictures and no labels.

Shapes: N rows of a batch, S shared width, K concepts, k active concepts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from time import monotonic
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.sparse_autoencoder import Modality, SparseCode, VisionLanguageSAE
from training.baseline_autoencoders import SparseAutoencoder, encode
from training.interpretation.phrases import PhraseCounts
from training.interpretation.strongest_rows import NO_ROW, StrongestRows
from training.run_folder import Centre, shared_representations
from training.store.reader import PairBatch, RepresentationStore

MODALITIES: tuple[Modality, ...] = ("image", "text")
SECONDS_BETWEEN_REPORTS = 10.0


@dataclass(frozen=True, kw_only=True)
class ConceptEncoder:
    """From a batch of a store to codes, on whatever device the autoencoders are."""

    sae: SparseAutoencoder
    auxiliary: AuxiliaryAutoencoder | None = None
    """None for CLIP."""
    centre: Centre | None = None

    @property
    def num_concepts(self) -> int:
        """K."""
        return num_concepts(self.sae)

    @torch.no_grad()
    def codes(self, batch: PairBatch) -> dict[Modality, SparseCode]:
        """Of the images and of the whole texts."""
        device = next(self.sae.parameters()).device
        shared = shared_representations(
            batch.image_ND.to(device), batch.text_ND.to(device), self.auxiliary, self.centre
        )
        return {name: encode(self.sae, part, name) for name, part in zip(MODALITIES, shared, strict=True)}


def num_concepts(sae: SparseAutoencoder) -> int:
    """K, whatever the kind."""
    return len(sae.encoder) if isinstance(sae, VisionLanguageSAE) else sae.num_concepts


class Scan(NamedTuple):
    """What one pass leaves."""

    mean_K: dict[Modality, np.ndarray]
    """Mean activation over all rows, zeros included."""
    strongest: dict[Modality, StrongestRows]
    corpus: PhraseCounts
    rows: int


class ChosenPairs(NamedTuple):
    """What the strongest rows stand for, by row."""

    texts: dict[int, str]
    references: dict[int, str]


def scan_store(
    store: RepresentationStore,
    encoder: ConceptEncoder,
    *,
    top_texts: int,
    top_images: int,
    batch_size: int,
    report: Callable[[str], None],
) -> Scan:
    """Raises InvalidTraining, naming the file, where the store is damaged."""
    count = encoder.num_concepts
    sums_K = {name: torch.zeros(count, dtype=torch.float64) for name in MODALITIES}
    strongest: dict[Modality, StrongestRows] = {
        "image": StrongestRows(count, top_images),
        "text": StrongestRows(count, top_texts),
    }
    corpus, pairs, progress = PhraseCounts(), store.pairs(), Progress("interpreted", len(store), report)
    for rows, batch in store.batches(batch_size):
        described = list(islice(pairs, len(rows)))
        corpus.add([pair.text for pair in described])
        keys = {
            "image": batch.image_ids_N.numpy(),
            "text": batch.text_ids_N.numpy(),
        }
        for name, code in encoder.codes(batch).items():
            sums_K[name] += _sum_by_concept(code, count)
            strongest[name].add(code, rows.start, keys[name])
        progress.reached(rows.stop)
    return Scan(
        mean_K={name: (sums_K[name] / len(store)).numpy() for name in MODALITIES},
        strongest=strongest,
        corpus=corpus,
        rows=len(store),
    )


def read_chosen(store: RepresentationStore, scan: Scan, most_characters: int) -> ChosenPairs:
    """Texts and picture references of the strongest rows alone; a longer text is cut off."""
    wanted = {name: set(np.unique(scan.strongest[name].rows_KT).tolist()) - {NO_ROW} for name in MODALITIES}
    chosen = ChosenPairs(texts={}, references={})
    for pair in store.pairs():
        if pair.row in wanted["text"]:
            chosen.texts[pair.row] = (
                pair.text if len(pair.text) <= most_characters else pair.text[:most_characters] + "…"
            )
        if pair.row in wanted["image"]:
            chosen.references[pair.row] = pair.image
    return chosen


class Progress:
    """Says now and then how far a pass is, how fast, and how long it still takes."""

    def __init__(self, verb: str, total: int, report: Callable[[str], None]) -> None:
        self._verb, self._total, self._report = verb, total, report
        self._begun = self._said = monotonic()

    def reached(self, done: int) -> None:
        now = monotonic()
        if now - self._said < SECONDS_BETWEEN_REPORTS and done < self._total:
            return
        self._said = now
        rate = done / max(now - self._begun, 1e-9)
        left = (self._total - done) / rate if rate else 0.0
        self._report(f"{self._verb} {done} of {self._total}, {rate:.0f} a second, {left:.0f} s left")


def _sum_by_concept(code: SparseCode, count: int) -> Tensor:
    ids, activations = code.concept_ids.flatten().cpu(), code.activations.detach().flatten().cpu()
    return torch.zeros(count, dtype=torch.float64).index_add_(0, ids, activations.double())


def rows_of(strongest: StrongestRows, concept: int, count: int) -> Iterator[tuple[int, float]]:
    """(row, activation) of a concept's strongest, at most `count`."""
    for row, activation in zip(
        strongest.rows_KT[concept, :count].tolist(), strongest.activations_KT[concept, :count].tolist(), strict=True
    ):
        if row != NO_ROW:
            yield row, activation
