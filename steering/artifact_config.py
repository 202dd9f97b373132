"""`config.json` of an artifact: its schema, reading and writing, and the fingerprint in it (design, section 3)."""

from __future__ import annotations

import hashlib
import json
import secrets
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from steering.concepts import CONCEPTS_FILE
from steering.errors import BadArtifact
from steering.settings import Preset

FORMAT_VERSION = 1
Pooling = Literal["text_after_last_image", "non_special_text"]
"""How text tokens become one state; an engine refuses one that it lacks."""
CONFIG_FILE, WEIGHTS_FILE, CANARY_FOLDER = "config.json", "model.safetensors", "canary"
INFERENCE_KEYS = (
    "format_version", "hook_layer", "intervention_point", "pooling", "hidden_size", "num_layers", "family",
    "shared_size", "num_concepts", "active_concepts", "min_text_tokens", "default_preset", "presets",
    "canary_synthetic",
)  # fmt: skip
"""Keys of config.json that change what comes out of an engine, and so enter the fingerprint."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class BaseModelInfo(_Strict):
    """Which LVLM the artifact was trained on."""

    name: str
    revision: str | None = None


class ArtifactConfig(_Strict):
    """`config.json` of an artifact."""

    format_version: Literal[1] = FORMAT_VERSION
    fingerprint: str = ""
    """sha256 over weights, concepts and the inference-relevant keys; written by `save_artifact`."""
    base_model: BaseModelInfo
    family: str
    """`model_type` of the LVLM ('llava')."""
    hidden_size: int = Field(gt=0)
    """D of the LVLM's language model."""
    num_layers: int = Field(gt=0)
    """Decoder layers of the LVLM."""
    hook_layer: int = Field(ge=0)
    """Zero-based decoder layer whose output is read and changed."""
    collection_point: Literal["output", "input"] = "output"
    """Side of the hook layer the training representations were read at; a record."""
    intervention_point: Literal["output"] = "output"
    pooling: Pooling = "text_after_last_image"
    shared_size: int = Field(gt=0)
    """S."""
    num_concepts: int = Field(gt=0)
    """K."""
    active_concepts: int = Field(gt=0)
    """k."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """What the contrastive loss compared with; matters in training only."""
    min_text_tokens: int = Field(default=1, ge=1)
    """Positions are steered once this many text tokens are in the mean."""
    default_preset: str = "captions"
    """Preset of a request that names none."""
    presets: dict[str, Preset] = Field(default_factory=dict)
    form_presets: dict[str, Preset] = Field(default_factory=dict)
    """The best setting of each form on dev scenes, for comparisons; not served by name."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Data, number of pairs, metrics, versions."""
    text_in: Literal["answer", "user_turn"] = "user_turn"
    """Where the training texts stood in the prompt: in the answer, as when served, or in the user's turn; a record."""
    alignment: dict[str, float] = Field(default_factory=dict)
    """On held-out pairs: how far the codes of a pair agree (paired_overlap, stranger_overlap, overlap_beyond_chance,
    recall_at_1), and the share of the states' variance that is not explained."""
    faithfulness: dict[str, float] = Field(default_factory=dict)
    """While text is generated: what `training.measure_faithfulness` found."""
    card: dict[str, Any] = Field(default_factory=dict)
    """Data, language, licence, where it hurts, memory price."""
    canary_synthetic: bool = False
    """True where the canary was not read from the model (imported weights)."""

    @model_validator(mode="after")
    def _fields_fit_together(self) -> ArtifactConfig:
        if self.active_concepts > self.num_concepts:
            raise ValueError(f"active_concepts {self.active_concepts} is more than num_concepts {self.num_concepts}")
        if self.default_preset not in self.presets:
            raise ValueError(f"default_preset {self.default_preset!r} is not among the presets {sorted(self.presets)}")
        return self


def read_config(folder: Path) -> ArtifactConfig:
    """`config.json` alone. Raises BadArtifact."""
    file = folder / CONFIG_FILE
    try:
        return ArtifactConfig.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadArtifact(f"{file} does not exist; an artifact has one", field="artifact") from None
    except (ValidationError, UnicodeDecodeError, OSError) as error:
        raise BadArtifact(f"{file} is not a valid artifact configuration: {error}", field="artifact") from error


def write_config(folder: Path, config: ArtifactConfig) -> ArtifactConfig:
    """Write `config.json` with the fingerprint that the folder's files and this config now have.

    The old one is there until the new one is whole. Raises BadArtifact where the disk refuses.
    """
    config = config.model_copy(update={"fingerprint": compute_fingerprint(folder, config)})
    made = folder / f".{CONFIG_FILE}.{secrets.token_hex(4)}.part"
    try:
        made.write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
        made.replace(folder / CONFIG_FILE)
    except OSError as error:
        raise BadArtifact(
            f"{folder / CONFIG_FILE} cannot be written: {error}; make room and try again", field="artifact"
        ) from error
    finally:
        made.unlink(missing_ok=True)
    return config


def compute_fingerprint(folder: Path, config: ArtifactConfig) -> str:
    """sha256 (hex) over the bytes of weights, concepts and canary and the inference-relevant keys as canonical JSON."""
    relevant = config.model_dump(include=set(INFERENCE_KEYS))
    for preset in relevant["presets"].values():
        preset.pop("dev_scores")
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True, separators=(",", ":")).encode())
    canary = [path.relative_to(folder).as_posix() for path in sorted((folder / CANARY_FOLDER).glob("*"))]
    for name in (WEIGHTS_FILE, CONCEPTS_FILE, *canary):
        try:
            with (folder / name).open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        except OSError as error:
            raise BadArtifact(f"{folder / name} cannot be read: {error.strerror}", field="artifact") from error
    return digest.hexdigest()
