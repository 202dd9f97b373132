"""Is there anything to realign to? How far the codes of an image and of its text agree, against strangers.

The gate: without alignment no preset but `off` may be written. Pure tensor maths: no models, no data.
Shapes: N pairs, S shared width, k active concepts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.sparse_autoencoder import VisionLanguageSAE
from training.fitting.quality import overlap_of_pairs, retrieval_of_vectors
from training.losses import unexplained_variance

MIN_OVERLAP_RATIO = 1.5
"""Paired codes must overlap at least so many times as much as shuffled ones."""


def agrees(paired_overlap: float, shuffled_overlap: float) -> bool:
    """Codes that have nothing in common with anything do not."""
    return paired_overlap > shuffled_overlap and paired_overlap >= MIN_OVERLAP_RATIO * shuffled_overlap


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Measured on pairs that the autoencoders were not trained on."""

    paired_overlap: float
    """Mean share of active concepts that an image has in common with its text; `quality.overlap`."""
    shuffled_overlap: float
    """The same with another image's text."""
    recall_at_1: float
    """Share of images and texts whose nearest neighbour (cosine, shared space) across the modality is their own.
    A stranger that is as near, for example by the same text, counts as nearer."""
    pairs: float
    """Number of pairs: recall_at_1 is among so many."""
    image_unexplained: float
    """Share of the image states' variance lost on the way through the auxiliary autoencoder and the code."""
    text_unexplained: float
    """The same for text."""

    @property
    def passes(self) -> bool:
        """May a preset other than `off` be written?"""
        return agrees(self.paired_overlap, self.shuffled_overlap)

    def as_dict(self) -> dict[str, float]:
        """For the artifact's config."""
        return asdict(self)


@torch.no_grad()
def measure_alignment(
    auxiliary: AuxiliaryAutoencoder, sae: VisionLanguageSAE, image_ND: Tensor, text_ND: Tensor
) -> Alignment:
    """Of pooled states; row i of both is one pair."""
    image_NS, text_NS = auxiliary(image_ND, text_ND)
    image_code, text_code = sae.encode(image_NS), sae.encode(text_NS)
    image_rebuilt, text_rebuilt = auxiliary.reconstruct(sae.decode(image_code, "image"), sae.decode(text_code, "text"))
    overlaps = overlap_of_pairs(image_code, text_code)
    return Alignment(
        paired_overlap=overlaps["overlap/paired"],
        shuffled_overlap=overlaps["overlap/shuffled"],
        recall_at_1=retrieval_of_vectors("shared", image_NS, text_NS)["retrieval/shared_r1"],
        pairs=float(len(image_ND)),
        image_unexplained=unexplained_variance(image_rebuilt, image_ND),
        text_unexplained=unexplained_variance(text_rebuilt, text_ND),
    )
