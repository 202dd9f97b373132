"""Turns the weights that the VL-SAE's authors publish into an artifact.

    python -m training.import_published_weights --sae sae.pth --auxiliary auxiliary.pth --concepts c2d_cc3m.json \\
        --active-concepts 256 --output ARTIFACT

What the files do not hold is asked for; the defaults are the published LLaVA-1.5-7B run. No model is needed, and so
nothing is measured: the canary is synthetic (no engine can tell by it whether the weights belong to a model), there are
no alignment values, and the default preset is `off`. `paper_pope` and `paper_chair` are the authors' settings, there
for whoever names them.
"""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from steering.artifact import Artifact, Canary, save_artifact
from steering.artifact_config import ArtifactConfig, BaseModelInfo
from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.lvlm.families import FAMILIES
from steering.settings import Preset
from steering.sparse_autoencoder import VisionLanguageSAE
from training.command_line import Settings, parse_settings, run_stage
from training.errors import InvalidTraining
from training.interpretation.labels import label_texts
from training.miniature.drawing import draw_scene
from training.miniature.world import scene_from_seed
from training.published_files import (
    INLINE_IMAGE,
    PublishedConcept,
    PublishedWeights,
    read_published_concepts,
    read_published_weights,
)
from training.tune_presets import OFF, PAPER_PRESETS

CANARY_IMAGES = 4
LLAMA_BOS, LLAMA_BYTES = 1, 3
"""In every vocabulary of Llama's: <s>, and the first of the 256 tokens that stand for single bytes."""


class ImportSettings(Settings):
    """What the published files do not hold. Defaults: the published LLaVA-1.5-7B run."""

    active_concepts: int = Field(default=256, gt=0)
    """k, concepts in a code."""
    base_model: str = "llava-hf/llava-1.5-7b-hf"
    """Checkpoint that the representations were read from."""
    base_revision: str | None = None
    """Its revision."""
    family: str = "llava"
    """`model_type` of that checkpoint."""
    num_layers: int = Field(default=32, gt=1)
    """Its decoder layers."""
    hook_layer: int = Field(default=30, ge=0)
    """Zero-based decoder layer to read and change."""
    collection_point: Literal["input", "output"] = "input"
    """Side of that layer that the training representations were read at; a record."""
    intervention_point: Literal["output"] = "output"
    """Side of that layer that is changed."""
    pooling: Literal["text_after_last_image", "non_special_text"] = "text_after_last_image"
    """Which text tokens were averaged; an engine refuses what it lacks."""
    similarity: Literal["cosine", "dot"] = "dot"
    """What the contrastive loss compared with (the authors' code: dot); a record."""
    min_text_tokens: int = Field(default=1, ge=1)
    """Positions are steered once so many text tokens are in the mean."""
    image_token_id: int = Field(default=32000, ge=0)
    """Token that stands for an image in the checkpoint's prompts."""


class CommandLine(ImportSettings):
    """From published files to an artifact."""

    sae: Path
    """State dict of the VL-SAE, .pth or .safetensors."""
    auxiliary: Path
    """State dict of the auxiliary autoencoder."""
    concepts: Path | None = None
    """Their c2d_*.json."""
    output: Path
    """Folder of the artifact."""


def import_artifact(
    weights: PublishedWeights, concepts: dict[int, PublishedConcept], settings: ImportSettings
) -> Artifact:
    """An artifact; raises InvalidTraining that names the setting which does not fit."""
    _check_settings(weights, settings)
    auxiliary = AuxiliaryAutoencoder(weights.hidden_size, weights.shared_size)
    sae = VisionLanguageSAE(weights.shared_size, weights.num_concepts, settings.active_concepts)
    auxiliary.load_state_dict(weights.auxiliary)
    sae.load_state_dict(weights.sae)
    return Artifact(
        config=_config(weights, settings),
        auxiliary=auxiliary.eval(),
        sae=sae.eval(),
        canary=synthetic_canary(weights.hidden_size, settings.image_token_id),
        control_image_MD=torch.zeros(0, weights.hidden_size),
        concepts=_records(weights.num_concepts, concepts),
    )


def synthetic_canary(hidden_size: int, image_token_id: int) -> Canary:
    """Drawn pictures, a prompt in Llama's byte tokens, and zeros where states of the model would stand."""
    before, after = (tuple(LLAMA_BYTES + byte for byte in part) for part in (b"USER: ", b"\nA picture. ASSISTANT:"))
    prompt = (LLAMA_BOS, *before, image_token_id, *after)
    return Canary(
        images=tuple(draw_scene(scene_from_seed(seed)) for seed in range(CANARY_IMAGES)),
        token_ids=(prompt,) * CANARY_IMAGES,
        image_ND=torch.zeros(CANARY_IMAGES, hidden_size),
        text_ND=torch.zeros(CANARY_IMAGES, hidden_size),
    )


def _check_settings(weights: PublishedWeights, settings: ImportSettings) -> None:
    if settings.active_concepts > weights.num_concepts:
        raise InvalidTraining(
            f"--active-concepts is {settings.active_concepts}, but the weights have {weights.num_concepts} concepts; "
            "give the k they were trained with"
        )
    if settings.hook_layer >= settings.num_layers - 1:
        raise InvalidTraining(
            f"--hook-layer {settings.hook_layer} leaves no layer after it in a model of --num-layers "
            f"{settings.num_layers}; it must be at most {settings.num_layers - 2}"
        )
    if settings.family not in FAMILIES:
        raise InvalidTraining(f"--family {settings.family!r} is not supported; known: {', '.join(sorted(FAMILIES))}")


def _config(weights: PublishedWeights, settings: ImportSettings) -> ArtifactConfig:
    shapes = {name: getattr(weights, name) for name in ("hidden_size", "shared_size", "num_concepts")}
    presets: dict[str, Preset] = {"off": OFF} | {name: preset for name, (preset, _) in PAPER_PRESETS.items()}
    numbers = sum(value.numel() for part in (weights.sae, weights.auxiliary) for value in part.values())
    return ArtifactConfig(
        base_model=BaseModelInfo(name=settings.base_model, revision=settings.base_revision),
        **settings.model_dump(
            include=ImportSettings.model_fields.keys() & ArtifactConfig.model_fields.keys() - {"base_model"}
        ),
        **shapes,
        presets=presets,
        default_preset="off",
        canary_synthetic=True,
        training={"imported": True},
        card={
            "data": "what its authors trained on; nothing about it was checked here",
            "language": "that of the published texts",
            "licence": "that of the published files",
            "where_it_hurts": "not measured",
            "canary": (
                "synthetic: no state of the base model is recorded, so an engine compares family, width and layers "
                "only, and cannot tell whether the weights belong to the checkpoint it runs"
            ),
            "presets": (
                "No alignment was measured on import and no preset was tuned, so the default is off. paper_pope and "
                "paper_chair are the settings of the paper (at temperature 1), for whoever names them; measure them "
                "against other_image with training.evaluate_hallucination before relying on them."
            ),
            "control": "there are no image states of other scenes: the control other_image is refused",
            "labels": "made here, from the concepts' published texts",
            "memory": f"{numbers * 4 / 2**20:.0f} MiB on disk as float32",
        },
    )


def _records(num_concepts: int, concepts: dict[int, PublishedConcept]) -> tuple[dict[str, Any], ...]:
    """One for each concept; without a c2d file there is nothing to say about any."""
    if not concepts:
        return ()
    entries = [concepts.get(number, PublishedConcept(mean_activation=0.0)) for number in range(num_concepts)]
    made = label_texts([entry.texts for entry in entries], [entry.mean_activation for entry in entries])
    return tuple(
        {
            "id": number,
            "label": made[number] if entry.label is None else entry.label,
            "mean_activation": entry.mean_activation,
            "texts": entry.texts,
            "images": _images(entry),
        }
        for number, entry in enumerate(entries)
    )


def _images(entry: PublishedConcept) -> list[dict[str, str | None]]:
    """References with thumbnails, where the URL is the picture itself; any other URL is kept and never fetched."""
    images: list[dict[str, str | None]] = []
    for name, url in zip_longest(entry.image_names, entry.image_urls, fillvalue=""):
        inline = url.startswith(INLINE_IMAGE)
        image: dict[str, str | None] = {"reference": name or url, "thumbnail": url if inline else None}
        images.append(image | ({"url": url} if url and not inline else {}))
    return images


def check_output(folder: Path) -> None:
    """Raises InvalidTraining for a folder that holds something else than an artifact: it would be replaced."""
    if folder.exists() and not (folder / "config.json").exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidTraining(f"{folder} is there and is no artifact; give --output another folder")


def main() -> None:
    """The command line."""
    settings = parse_settings(CommandLine, program="python -m training.import_published_weights", description=__doc__)
    check_output(settings.output)
    weights = read_published_weights(settings.sae, settings.auxiliary)
    concepts = read_published_concepts(settings.concepts, weights.num_concepts) if settings.concepts else {}
    config = save_artifact(settings.output, import_artifact(weights, concepts, settings))
    print(
        f"wrote {settings.output}: D {weights.hidden_size}, S {weights.shared_size}, K {weights.num_concepts}, "
        f"k {settings.active_concepts}, layer {config.hook_layer} of {config.num_layers} ({config.family}); canary "
        f"synthetic; alignment not measured, default preset off; fingerprint {config.fingerprint[:12]}"
    )


if __name__ == "__main__":
    run_stage(main)
