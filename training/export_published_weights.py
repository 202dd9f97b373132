"""Writes an artifact's weights and concepts in the format that the VL-SAE's authors publish, for their scripts.

    python -m training.export_published_weights --artifact A --output DIR

leaves sae.pth, auxiliary.pth and c2d_concepts.json. k, layer and the like are not part of that format: the command that
imports the files again is printed. Presets, control images and the canary cannot be kept.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from steering.artifact import Artifact, load_artifact
from steering.artifact_config import ArtifactConfig
from training.command_line import Settings, parse_settings, run_stage
from training.published_files import (
    AUXILIARY_FILE,
    CONCEPTS_FILE,
    SAE_FILE,
    write_published_concepts,
    write_published_weights,
)


class CommandLine(Settings):
    """From an artifact to the published format."""

    artifact: Path
    """Folder of the artifact."""
    output: Path
    """Folder for the three files."""


def export_artifact(artifact: Artifact, output: Path) -> None:
    """The three files."""
    write_published_weights(output, artifact.sae.state_dict(), artifact.auxiliary.state_dict())
    write_published_concepts(output, {concept["id"]: _published(concept) for concept in artifact.concepts})


def _published(concept: dict[str, Any]) -> dict[str, Any]:
    """A picture's URL is where it is, else its thumbnail."""
    images = concept.get("images", [])
    return {
        "image_urls": [image.get("url") or image.get("thumbnail") or "" for image in images],
        "image_names": [image["reference"] for image in images],
        "texts": concept.get("texts", []),
        "mean_activation": concept.get("mean_activation", 0.0),
        "label": concept.get("label", ""),
    }


def main() -> None:
    """The command line."""
    settings = parse_settings(CommandLine, program="python -m training.export_published_weights", description=__doc__)
    artifact = load_artifact(settings.artifact)
    export_artifact(artifact, settings.output)
    config, folder = artifact.config, settings.output
    print(f"wrote {SAE_FILE}, {AUXILIARY_FILE} and {CONCEPTS_FILE} to {folder}; back again:")
    print(_import_command(config, folder))


def _import_command(config: ArtifactConfig, folder: Path) -> str:
    """What the files do not hold, as options. Presets, control images and a canary read from a model are not kept."""
    options = {
        "sae": folder / SAE_FILE,
        "auxiliary": folder / AUXILIARY_FILE,
        "concepts": folder / CONCEPTS_FILE,
        "active-concepts": config.active_concepts,
        "base-model": config.base_model.name,
        "base-revision": config.base_model.revision,
        "family": config.family,
        "num-layers": config.num_layers,
        "hook-layer": config.hook_layer,
        "collection-point": config.collection_point,
        "pooling": config.pooling,
        "min-text-tokens": config.min_text_tokens,
        "similarity": config.similarity,
        "output": "ARTIFACT",
    }
    given = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
    return shlex.join(["python", "-m", "training.import_published_weights", *given])


if __name__ == "__main__":
    run_stage(main)
