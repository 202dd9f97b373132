"""The folder that training hands to serving: reading and writing it (design, section 3).

Knows files, not engines: whether the canary agrees with the model is for the engine to find out (`canary.py`).
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from steering.artifact_config import (
    CANARY_FOLDER,
    CONFIG_FILE,
    WEIGHTS_FILE,
    ArtifactConfig,
    compute_fingerprint,
    read_config,
    write_config,
)
from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.concepts import Concept, StoredConcepts, write_concepts
from steering.errors import BadArtifact
from steering.sparse_autoencoder import VisionLanguageSAE

CONTROL_KEY = "control.image_representations"


class _Prompts(BaseModel):
    """`canary/prompts.json`."""

    model_config = ConfigDict(extra="forbid")

    token_ids: tuple[tuple[NonNegativeInt, ...], ...] = Field(min_length=1)


@dataclass(frozen=True, kw_only=True)
class Canary:
    """A few prompts with the pooled states that the trained-on model gives for them."""

    images: tuple[Image.Image, ...]
    """RGB, one per prompt."""
    token_ids: tuple[tuple[int, ...], ...]
    """Prompts with one image token each."""
    image_ND: Tensor
    """Pooled v [N, D] float32."""
    text_ND: Tensor
    """Pooled t [N, D] float32."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A VL-SAE with everything needed to serve it."""

    config: ArtifactConfig
    auxiliary: AuxiliaryAutoencoder
    sae: VisionLanguageSAE
    canary: Canary
    control_image_MD: Tensor
    """Pooled image states [M, D] of scenes foreign to any request, for the `other_image` control."""
    concepts: Iterable[Concept] = ()
    """In order. Those of a folder are read anew each time they are gone through; no engine does."""


def load_artifact(path: str | Path) -> Artifact:
    """Read an artifact folder. Raises BadArtifact, naming the file at fault, if anything in it is wrong."""
    folder = Path(path)
    config = read_config(folder)
    expected = compute_fingerprint(folder, config)
    if config.fingerprint != expected:
        raise BadArtifact(
            f"{folder / CONFIG_FILE} records fingerprint {config.fingerprint[:12]}, its files give {expected[:12]}: "
            "the artifact was changed or damaged; copy it again from where it was made",
            field="artifact",
        )
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    auxiliary = AuxiliaryAutoencoder(config.hidden_size, config.shared_size)
    sae = VisionLanguageSAE(config.shared_size, config.num_concepts, config.active_concepts)
    _load_into(auxiliary, tensors, "auxiliary.", folder)
    _load_into(sae, tensors, "sae.", folder)
    control_MD = tensors.get(CONTROL_KEY, torch.zeros(0, config.hidden_size)).float()
    return Artifact(
        config=config,
        auxiliary=auxiliary.eval(),
        sae=sae.eval(),
        canary=_read_canary(folder / CANARY_FOLDER),
        control_image_MD=control_MD,
        concepts=StoredConcepts(folder),
    )


def check_fits(artifact: Artifact, *, family: str, hidden_size: int, num_layers: int) -> None:
    """Raise BadArtifact unless the artifact was made for a model of this family and shape."""
    config = artifact.config
    of_artifact = {"family": config.family, "hidden_size": config.hidden_size, "num_layers": config.num_layers}
    of_model = {"family": family, "hidden_size": hidden_size, "num_layers": num_layers}
    if of_artifact != of_model:
        raise BadArtifact(
            f"the artifact was made for another model ({config.base_model.name}: {of_artifact}), "
            f"this one has {of_model}; use the artifact trained on this model",
            field="artifact",
        )
    if config.hook_layer >= num_layers - 1:
        raise BadArtifact(f"hook_layer {config.hook_layer} leaves no tail layer after it", field="hook_layer")
    if config.pooling != "text_after_last_image":
        raise BadArtifact(f"pooling {config.pooling!r} is not supported by this engine", field="pooling")


def save_artifact(path: str | Path, artifact: Artifact, *, dtype: torch.dtype = torch.float32) -> ArtifactConfig:
    """Write an artifact folder, replacing one that is there once the new one is whole.

    Whoever reads meanwhile finds the old folder, the new one or, for the instant between two renames, none; never half
    of one. What a killed process leaves: before that instant the old folder and an unfinished `.NAME.XXXXXXXX.part`; in
    it the new one as `.part` and the old one as `.NAME.XXXXXXXX.old`, both whole, to be renamed by hand; after it the
    new folder and remains of `.old`.

    Returns the config with its fingerprint. Raises BadArtifact where the folder is something else, or the disk refuses.
    """
    folder = Path(path).resolve()  # of a link, what it points to is replaced
    check_replaceable(folder)
    made = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    try:
        config = _write_files(made, artifact, dtype)
        _put_in_place(made, folder)
    except (OSError, SafetensorError) as error:
        raise BadArtifact(
            f"{folder} cannot be written: {error}; make room or give another folder, and try again", field="artifact"
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return config


def _put_in_place(made: Path, folder: Path) -> None:
    """The old folder is there until the new one is, or again if that one cannot come."""
    aside = made.with_suffix(".old")
    if folder.exists():
        folder.rename(aside)
    try:
        made.rename(folder)
    except BaseException:
        if aside.exists():
            _move_back(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _move_back(aside: Path, folder: Path) -> None:
    try:
        aside.rename(folder)
    except OSError as error:
        raise BadArtifact(
            f"{folder} could neither be replaced nor put back: {error}; the one that was there is now {aside}, whole: "
            "move it where you want it",
            field="artifact",
        ) from error


def check_replaceable(folder: Path) -> None:
    """Raises BadArtifact where a folder holds something, and that is no artifact."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        read_config(folder)
    except BadArtifact as error:
        raise BadArtifact(f"{folder} is no artifact and will not be replaced by one: give another folder") from error


def _write_files(folder: Path, artifact: Artifact, dtype: torch.dtype) -> ArtifactConfig:
    (folder / CANARY_FOLDER).mkdir(parents=True)
    tensors = {f"auxiliary.{name}": value for name, value in artifact.auxiliary.state_dict().items()}
    tensors |= {f"sae.{name}": value for name, value in artifact.sae.state_dict().items()}
    tensors[CONTROL_KEY] = artifact.control_image_MD
    save_file({name: value.to(dtype).contiguous() for name, value in tensors.items()}, folder / WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors makes files that nobody else may read
    write_concepts(folder, artifact.concepts)
    _write_canary(folder / CANARY_FOLDER, artifact.canary)
    return write_config(folder, artifact.config)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise BadArtifact(f"{file} is not a readable safetensors file: {error}", field="artifact") from error


def _load_into(module: torch.nn.Module, tensors: dict[str, Tensor], prefix: str, folder: Path) -> None:
    state = {name.removeprefix(prefix): value.float() for name, value in tensors.items() if name.startswith(prefix)}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise BadArtifact(f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE}: {error}", field="artifact") from error


def _write_canary(folder: Path, canary: Canary) -> None:
    for index, image in enumerate(canary.images):
        image.save(folder / f"image_{index}.png")
    (folder / "prompts.json").write_text(json.dumps({"token_ids": canary.token_ids}) + "\n", encoding="utf-8")
    save_file(
        {"image": canary.image_ND.float().contiguous(), "text": canary.text_ND.float().contiguous()},
        folder / "pooled.safetensors",
    )


def _read_canary(folder: Path) -> Canary:
    pooled = _read_tensors(folder / "pooled.safetensors")
    try:
        token_ids = _Prompts.model_validate_json((folder / "prompts.json").read_text(encoding="utf-8")).token_ids
        images = tuple(Image.open(folder / f"image_{index}.png").convert("RGB") for index in range(len(token_ids)))
        return Canary(
            images=images,
            token_ids=token_ids,
            image_ND=pooled["image"].reshape(len(images), -1),
            text_ND=pooled["text"].reshape(len(images), -1),
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise BadArtifact(f"{folder} is not a readable canary: {error}", field="artifact") from error
