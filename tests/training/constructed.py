"""Artifacts for the bundled LLaVA whose autoencoders rebuild known states to a known degree; all parts are real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering.artifact import Artifact, load_artifact, save_artifact
from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.sparse_autoencoder import VisionLanguageSAE


def rebuilding_artifact(
    folder: Path, known: Path, image_ND: Tensor, text_ND: Tensor, *, share: float, **changed: Any
) -> Path:
    """`known` with other autoencoders: each of the states is a concept of its own, and its modality's decoder gives
    `share` of it, the other nothing.

    A share of 1 rebuilds them (but for the rounding of a cosine of 1), one of 0 gives nothing. The canary is then none
    that could be judged: it is marked as synthetic. `changed`: fields of the config.
    """
    states_ND = torch.cat((image_ND, text_ND))
    count, width = states_ND.shape
    auxiliary, sae = AuxiliaryAutoencoder(width, width), VisionLanguageSAE(width, count, 1)
    with torch.no_grad():
        for layer in auxiliary.children():
            assert isinstance(layer, torch.nn.Linear)
            layer.weight.copy_(torch.eye(width))
            layer.bias.zero_()
        sae.encoder.copy_(states_ND)
        for decoder, own in (
            (sae.vision_decoder, slice(len(image_ND))),
            (sae.text_decoder, slice(len(image_ND), None)),
        ):
            decoder.weight.zero_()
            decoder.weight[:, own] = share * states_ND[own].T / 2  # of a state with itself the activation is 2
            decoder.bias.zero_()
    artifact = load_artifact(known)
    config = artifact.config.model_copy(
        update={
            "shared_size": width, "num_concepts": count, "active_concepts": 1, "canary_synthetic": True, **changed
        }
    )  # fmt: skip
    concepts = tuple({"id": index, "label": ""} for index in range(count))
    made: Artifact = replace(artifact, config=config, auxiliary=auxiliary, sae=sae, concepts=concepts)
    save_artifact(folder, made)
    return folder
