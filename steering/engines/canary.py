"""Whether recomputed canary states are those that an artifact was trained on (design, section 3). Runs no model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from steering.artifact import Artifact
from steering.errors import BadArtifact

MIN_COSINE, MIN_COSINE_HALF = 0.999, 0.99
"""Smallest cosine with the recorded states, in float32 and in half precision."""


def judge_canary(
    artifact: Artifact, states: Sequence[tuple[Tensor, Tensor]], *, half_precision: bool
) -> dict[str, float]:
    """`states` are v and t [D] of each canary prompt; returns smallest cosine and largest unexplained share.

    Raises BadArtifact when they are not the recorded ones, or the autoencoder does not reconstruct them.
    """
    canary, cosines, unexplained = artifact.canary, [], []
    for index, (image_D, text_D) in enumerate((v.cpu(), t.cpu()) for v, t in states):
        cosines += [
            float(F.cosine_similarity(image_D, canary.image_ND[index], dim=0)),
            float(F.cosine_similarity(text_D, canary.text_ND[index], dim=0)),
        ]
        unexplained.append(_unexplained(artifact, image_D, text_D))
    report = {"min_cosine": min(cosines, default=1.0), "max_unexplained": max(unexplained, default=0.0)}
    if artifact.config.canary_synthetic:
        return report
    floor = MIN_COSINE_HALF if half_precision else MIN_COSINE
    if not report["min_cosine"] >= floor:
        raise BadArtifact(
            f"the model's states differ from those the artifact was trained on (cosine {report['min_cosine']:.4f}, "
            f"at least {floor} needed): use the checkpoint it names, {artifact.config.base_model.name}",
            field="artifact",
        )
    if not report["max_unexplained"] < 1:
        raise BadArtifact(
            f"the artifact does not reconstruct the model's states (unexplained {report['max_unexplained']:.2f})",
            field="artifact",
        )
    return report


@torch.inference_mode()
def _unexplained(artifact: Artifact, image_D: Tensor, text_D: Tensor) -> float:
    """Share of squared length that auxiliary and sparse autoencoder together lose, the larger of the modalities."""
    shared = artifact.auxiliary(image_D[None], text_D[None])
    rebuilt = artifact.auxiliary.reconstruct(*artifact.sae(*shared))
    pairs = zip((image_D, text_D), rebuilt, strict=True)
    return max(float((state - again[0]).square().sum() / state.square().sum()) for state, again in pairs)
