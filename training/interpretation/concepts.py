"""From a store and a sparse autoencoder to all there is to say of each concept, and to what an artifact keeps of it.

Opens no picture; memory is for K concepts times what is kept of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from training.command_line import Settings
from training.interpretation.labels import MOST_TERMS, distinctive_phrases, unique_labels
from training.interpretation.pictures import as_data_url, thumbnail_file
from training.interpretation.scan import ChosenPairs, ConceptEncoder, Scan, read_chosen, rows_of, scan_store
from training.store.reader import RepresentationStore


class InterpretationSettings(Settings):
    """How much is kept of each concept."""

    top_texts: int = Field(default=10, ge=0)
    """Texts that activate it most; equal ones count once."""
    top_images: int = Field(default=10, ge=0)
    """Pictures that activate it most; each counts once, whatever its captions."""
    label_texts: int = Field(default=32, gt=0)
    """Texts that its label is made from."""
    label_phrases: int = Field(default=2, gt=0, le=MOST_TERMS)
    """Phrases in a label; more where that is another concept's already."""
    text_characters: int = Field(default=500, gt=0)
    """A longer text is cut off there."""
    thumbnail_side_px: int = Field(default=64, gt=0)
    """Longest side of the thumbnails."""
    batch_size: int = Field(default=512, gt=0)
    """Pairs encoded at once."""
    seed: int = 0
    """Of the control that deals pictures and texts out to concepts at random."""


@dataclass(frozen=True, kw_only=True)
class Interpretation:
    """All there is to say of K concepts."""

    scan: Scan
    chosen: ChosenPairs
    labels: Sequence[str]

    @property
    def mean_K(self) -> np.ndarray:
        """Mean activation over both modalities, zeros included."""
        return (self.scan.mean_K["image"] + self.scan.mean_K["text"]) / 2

    def texts(self, concept: int, count: int) -> list[str]:
        """Its strongest first."""
        return [self.chosen.texts[row] for row, _ in rows_of(self.scan.strongest["text"], concept, count)]

    def references(self, concept: int, count: int) -> list[str]:
        """Its pictures, strongest first."""
        return [self.chosen.references[row] for row, _ in rows_of(self.scan.strongest["image"], concept, count)]


def interpret(
    store: RepresentationStore,
    encoder: ConceptEncoder,
    settings: InterpretationSettings,
    report: Callable[[str], None] = print,
) -> Interpretation:
    """Top texts and pictures, activations and labels; no picture is opened."""
    scan = scan_store(
        store,
        encoder,
        top_texts=max(settings.top_texts, settings.label_texts),
        top_images=settings.top_images,
        batch_size=settings.batch_size,
        report=report,
    )
    chosen = read_chosen(store, scan, settings.text_characters)
    means_K = (scan.mean_K["image"] + scan.mean_K["text"]) / 2
    phrases = []
    for concept in range(encoder.num_concepts):
        rows = list(rows_of(scan.strongest["text"], concept, settings.label_texts))
        texts, weights = [chosen.texts[row] for row, _ in rows], [activation for _, activation in rows]
        phrases.append(distinctive_phrases(texts, weights, scan.corpus))
    return Interpretation(
        scan=scan, chosen=chosen, labels=unique_labels(phrases, means_K.tolist(), settings.label_phrases)
    )


def concept_records(
    found: Interpretation, settings: InterpretationSettings, thumbnails: Path
) -> Iterator[dict[str, Any]]:
    """As an artifact keeps them: id, label, mean_activation, texts, images."""
    for concept, label in enumerate(found.labels):
        yield {
            "id": concept,
            "label": label,
            "mean_activation": round(float(found.mean_K[concept]), 6),
            "texts": found.texts(concept, settings.top_texts),
            "images": [
                {"reference": reference, "thumbnail": as_data_url(thumbnail_file(thumbnails, reference))}
                for reference in found.references(concept, settings.top_images)
            ],
        }
