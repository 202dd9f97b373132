"""Is there anything to realign to, and does the VL-SAE hold where it steers? The gate of an artifact.

Without it no preset but `off` may be written. Pure tensor maths and plain numbers: no models, no data.
Shapes: N pairs, S shared width, k active concepts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.sparse_autoencoder import VisionLanguageSAE
from training.errors import InvalidTraining
from training.fitting.quality import overlap_of_pairs, retrieval_of_vectors
from training.losses import unexplained_variance
from training.store.reader import PairBatch

MIN_OVERLAP_RATIO = 1.5
"""Codes of a pair must overlap at least so many times as much as those of strangers."""
MIN_OVERLAP_BEYOND_CHANCE = 0.05
"""And by at least so much more, what few pairs show by chance taken off: three of a thousand concepts in common where
strangers have one are three times as much of nothing."""
MIN_PAIRS = 50
"""Held-out pairs that must have been compared: of a handful of unrelated ones some look alike."""
MAX_UNEXPLAINED = 0.5
"""Share of the states' variance that may be lost while text is generated: beyond, what is added back to the stream is
more the autoencoders' error than the model's own state."""
FAITHFULNESS = ("image_unexplained", "text_unexplained", "text_unexplained_free")
"""What of `training.measure_faithfulness` the gate looks at."""


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Measured on pairs that the autoencoders were not trained on."""

    paired_overlap: float
    """Mean share of active concepts that an image has in common with its text; `quality.overlaps`."""
    stranger_overlap: float
    """The same with another picture's text."""
    overlap_beyond_chance: float
    """Their difference, less two of its standard errors."""
    recall_at_1: float
    """Share of images and texts whose nearest neighbour (cosine, shared space) across the modality is their own.
    A stranger that is as near, for example by the same text, counts as nearer."""
    pairs: float
    """Number of pairs: recall_at_1 is among so many."""
    image_unexplained: float
    """Share of the image states' variance lost on the way through the auxiliary autoencoder and the code."""
    text_unexplained: float
    """The same for text: prefixes and whole ones, where prefixes were collected."""

    def as_dict(self) -> dict[str, float]:
        """For the artifact's config."""
        return asdict(self)


@torch.no_grad()
def measure_alignment(auxiliary: AuxiliaryAutoencoder, sae: VisionLanguageSAE, pairs: PairBatch) -> Alignment:
    """Of pooled states."""
    image_NS, text_NS = auxiliary(pairs.image_ND, pairs.text_ND)
    image_code, text_code = sae.encode(image_NS), sae.encode(text_NS)
    begun_code = sae.encode(auxiliary.text_projection(pairs.begun_ND))
    image_rebuilt, begun_rebuilt = auxiliary.reconstruct(
        sae.decode(image_code, "image"), sae.decode(begun_code, "text")
    )
    overlap = overlap_of_pairs(image_code, text_code, pairs.image_ids_N)
    return Alignment(
        paired_overlap=overlap.paired,
        stranger_overlap=overlap.strangers,
        overlap_beyond_chance=overlap.beyond_chance,
        recall_at_1=retrieval_of_vectors("shared", image_NS, text_NS, pairs.image_ids_N)["retrieval/shared_r1"],
        pairs=float(len(image_NS)),
        image_unexplained=unexplained_variance(image_rebuilt, pairs.image_ND),
        text_unexplained=unexplained_variance(begun_rebuilt, pairs.begun_ND),
    )


def check_finite(figures: Mapping[str, float]) -> None:
    """Raises InvalidTraining, naming it, for a figure that an artifact's config.json cannot hold."""
    for name, value in figures.items():
        if not math.isfinite(value):
            raise InvalidTraining(
                f"{name} is {value}: the states are not finite, or all the same; measure on more varied pairs, or run "
                "the model with another --dtype"
            )


def alignment_gate(alignment: Mapping[str, float], faithfulness: Mapping[str, float]) -> tuple[bool, str]:
    """Whether an artifact's codes tell pairs from strangers and hold while text is generated, and why, in words.

    Raises InvalidTraining where the artifact does not say.
    """
    if not {"paired_overlap", "stranger_overlap", "overlap_beyond_chance", "pairs"} <= alignment.keys():
        raise InvalidTraining(
            "the artifact's config.json records no alignment with other pictures (imported weights have none, earlier "
            "versions had another): presets can be tuned where training.write_artifact made the artifact"
        )
    if missing := set(FAITHFULNESS) - faithfulness.keys():
        raise InvalidTraining(
            f"the artifact's config.json records no faithfulness ({', '.join(sorted(missing))}): run "
            "training.measure_faithfulness on it before training.tune_presets"
        )
    paired, strangers = alignment["paired_overlap"], alignment["stranger_overlap"]
    beyond = alignment["overlap_beyond_chance"]
    needed = {
        f"at least {MIN_OVERLAP_RATIO} times as much is needed": paired >= MIN_OVERLAP_RATIO * strangers,
        f"at least {MIN_OVERLAP_BEYOND_CHANCE} beyond chance is needed": beyond >= MIN_OVERLAP_BEYOND_CHANCE,
        f"at most {MAX_UNEXPLAINED} may be unexplained": all(faithfulness[n] <= MAX_UNEXPLAINED for n in FAITHFULNESS),
        f"at least {MIN_PAIRS} held-out pairs are needed, not {alignment['pairs']:.0f}": alignment["pairs"]
        >= MIN_PAIRS,
    }  # what is not a number fails
    figures = (
        f"codes of a pair overlap {paired:.3f}, of strangers {strangers:.3f}, {beyond:.3f} beyond chance; unexplained "
        f"while generating: image {faithfulness['image_unexplained']:.3f}, text "
        f"{faithfulness['text_unexplained']:.3f} (free-running {faithfulness['text_unexplained_free']:.3f}); "
        f"cross-modal R@1 {alignment.get('recall_at_1', float('nan')):.3f} of {alignment['pairs']:.0f} pairs"
    )
    failures = [reason for reason, holds in needed.items() if not holds]
    return not failures, "; ".join([figures, *failures])
