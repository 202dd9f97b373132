"""Is there anything to realign to? How far the codes of an image and of its text agree, against strangers.

The gate: without alignment no preset but `off` may be written. Pure tensor maths: no models, no data.
Shapes: N pairs, S shared width, k active concepts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.sparse_autoencoder import SparseCode, VisionLanguageSAE
from training.losses import unexplained_variance

MIN_OVERLAP_RATIO = 1.5
"""Paired codes must overlap at least so many times as much as shuffled ones."""


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Measured on pairs that the autoencoders were not trained on."""

    paired_overlap: float
    """Mean share of active concepts that an image has in common with its text."""
    shuffled_overlap: float
    """The same with another image's text."""
    recall_at_1: float
    """Share of images and texts whose nearest neighbour (cosine, shared space) across the modality is their own."""
    pairs: float
    """Number of pairs: recall_at_1 is among so many."""
    image_unexplained: float
    """Share of the image states' variance lost on the way through the auxiliary autoencoder and the code."""
    text_unexplained: float
    """The same for text."""

    @property
    def passes(self) -> bool:
        """May a preset other than `off` be written?"""
        return self.paired_overlap >= MIN_OVERLAP_RATIO * self.shuffled_overlap

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
    return Alignment(
        paired_overlap=code_overlap(image_code, text_code),
        shuffled_overlap=code_overlap(image_code, SparseCode(*(part.roll(1, 0) for part in text_code))),
        recall_at_1=recall_at_1(image_NS, text_NS),
        pairs=float(len(image_ND)),
        image_unexplained=unexplained_variance(image_rebuilt, image_ND),
        text_unexplained=unexplained_variance(text_rebuilt, text_ND),
    )


def code_overlap(first: SparseCode, second: SparseCode) -> float:
    """Mean share of active concepts that two codes have in common, row by row."""
    common_Nkk = first.concept_ids[:, :, None] == second.concept_ids[:, None, :]
    return float(common_Nkk.any(-1).float().mean())


def recall_at_1(image_NS: Tensor, text_NS: Tensor) -> float:
    """Mean of both directions of cross-modal retrieval by cosine."""
    cosines_NN = F.normalize(image_NS, dim=-1) @ F.normalize(text_NS, dim=-1).T
    own_N = torch.arange(len(cosines_NN), device=cosines_NN.device)
    hits = (cosines_NN.argmax(0) == own_N).float().mean() + (cosines_NN.argmax(1) == own_N).float().mean()
    return float(hits / 2)
