"""A run folder: everything one training run leaves, and how later stages read it. Trains nothing.

    RUN/config.json         what was trained, on what, with which settings; there from the first step
    RUN/model.safetensors   the weights, named as in the published files; there when the run is finished
    RUN/centre.safetensors  `image`, `text` [S]: what was taken off the shared representations (only with --centre)
    RUN/metrics.jsonl       one line for each evaluation;  RUN/metrics.json: the last one, on held-out pairs
    RUN/tensorboard/, RUN/plots/*.png
    RUN/checkpoint/         where an interrupted run goes on; gone once it is finished

Shapes: N rows, D width of the states, S shared width.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.sparse_autoencoder import VisionLanguageSAE
from training.baseline_autoencoders import SAED, SAEV, SparseAutoencoder
from training.collection.placing import TextPlace
from training.errors import InvalidTraining
from training.store.layout import MANIFEST_FILE
from training.store.reader import RepresentationStore

CONFIG_FILE, MODEL_FILE, CENTRE_FILE = "config.json", "model.safetensors", "centre.safetensors"
METRICS_FILE, METRICS_LOG_FILE = "metrics.json", "metrics.jsonl"

Kind = Literal["auxiliary", "vl_sae", "sae_d", "sae_v"]
SparseKind = Literal["vl_sae", "sae_d", "sae_v"]
SPARSE_KINDS: dict[SparseKind, type[VisionLanguageSAE] | type[SAED] | type[SAEV]] = {
    "vl_sae": VisionLanguageSAE,
    "sae_d": SAED,
    "sae_v": SAEV,
}

M = TypeVar("M", bound=nn.Module)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class StoreIdentity(_Strict):
    """Which representations a run was trained on."""

    model: str
    """Checkpoint they were collected from, as it was given."""
    model_sha256: str
    """Digest of its weights."""
    family: str
    name: str
    """`layer_30`, or `embedding`."""
    point: str
    """Side of the layer that was read."""
    pooling: str
    text_in: TextPlace | None
    """Where the texts stood; None for CLIP."""
    width: int
    """D."""
    pairs: int
    """Rows of the store, held-out ones included."""
    data_sha256: str
    """Digest of how they were collected and of every shard's bytes."""

    @model_validator(mode="before")
    @classmethod
    def _before_text_in_was_recorded(cls, given: Any) -> Any:
        """Texts of an LVLM stood in the user's turn, those of CLIP in no prompt."""
        if isinstance(given, dict) and "text_in" not in given:
            return given | {"text_in": None if given.get("family") == "open_clip" else "user_turn"}
        return given


class RunConfig(_Strict):
    """`config.json`."""

    format_version: Literal[1] = 1
    kind: Kind
    settings: dict[str, Any]
    """All that was asked for; paths are not in it."""
    shared_size: int
    """S."""
    num_concepts: int | None = None
    """K; None for an auxiliary autoencoder."""
    active_concepts: int | None = None
    """k; None for an auxiliary autoencoder."""
    store: StoreIdentity
    auxiliary_sha256: str | None = None
    """Of the auxiliary autoencoder's weights that gave the shared representations; None where there is none."""


class Centre(NamedTuple):
    """Means of the shared representations over the training pairs, which the sparse autoencoder never sees."""

    image_S: Tensor
    text_S: Tensor


def identify_store(store: RepresentationStore) -> StoreIdentity:
    """What a run records of the store it is trained on."""
    collected = store.manifest.collected
    content = store.manifest.model_dump_json(include={"collected", "shards"})
    return StoreIdentity(
        model=collected.model,
        model_sha256=collected.model_sha256,
        family=collected.family,
        name=store.name,
        point=collected.point,
        pooling=collected.pooling,
        text_in=collected.text_in,
        width=store.width,
        pairs=len(store),
        data_sha256=hashlib.sha256(content.encode()).hexdigest(),
    )


def require_states(store: RepresentationStore, folder: Path) -> None:
    """Raises InvalidTraining unless the run in `folder` was trained on states of the same model, read the same way."""
    trained, found = read_run_config(folder).store, identify_store(store)
    for field in ("model_sha256", "name", "point", "pooling", "text_in", "width"):
        if getattr(trained, field) != getattr(found, field):
            raise InvalidTraining(
                f"{store.folder / MANIFEST_FILE}: {field} is {getattr(found, field)!r}, but {folder / CONFIG_FILE} was "
                f"trained on {getattr(trained, field)!r}; give a store and a run of the same model, layer and --text-in"
            )


def read_run_config(folder: Path) -> RunConfig:
    """Raises InvalidTraining where the folder is no run."""
    file = folder / CONFIG_FILE
    try:
        return RunConfig.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidTraining(f"{file} cannot be read ({error.strerror}): {folder} is no training run") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise InvalidTraining(f"{file} is not the config of a training run: {error}") from error


def read_auxiliary(folder: Path) -> AuxiliaryAutoencoder:
    """The trained auxiliary autoencoder, in eval mode."""
    config = read_run_config(folder)
    if config.kind != "auxiliary":
        raise InvalidTraining(f"{folder / CONFIG_FILE}: kind is {config.kind!r}, an auxiliary autoencoder is needed")
    return _load(AuxiliaryAutoencoder(config.store.width, config.shared_size), folder)


def read_sparse(folder: Path) -> SparseAutoencoder:
    """The trained sparse autoencoder, in eval mode; `training.baseline_autoencoders.encode` takes any kind."""
    config = read_run_config(folder)
    if config.kind == "auxiliary":
        raise InvalidTraining(f"{folder / CONFIG_FILE}: kind is 'auxiliary', a sparse autoencoder is needed")
    assert config.num_concepts is not None
    assert config.active_concepts is not None
    return _load(SPARSE_KINDS[config.kind](config.shared_size, config.num_concepts, config.active_concepts), folder)


def read_centre(folder: Path) -> Centre | None:
    """What a run with --centre took off; None for one without."""
    file = folder / CENTRE_FILE
    if not file.exists():
        return None
    tensors = _read_tensors(file)
    return Centre(tensors["image"], tensors["text"])


@torch.no_grad()
def shared_representations(
    image_ND: Tensor, text_ND: Tensor, auxiliary: AuxiliaryAutoencoder | None, centre: Centre | None = None
) -> tuple[Tensor, Tensor]:
    """[N, S] of image and of text; without an auxiliary autoencoder (CLIP) the states themselves."""
    image_NS, text_NS = auxiliary(image_ND, text_ND) if auxiliary else (image_ND, text_ND)
    return (image_NS - centre.image_S, text_NS - centre.text_S) if centre else (image_NS, text_NS)


@torch.no_grad()
def fold_centre(auxiliary: AuxiliaryAutoencoder, centre: Centre) -> AuxiliaryAutoencoder:
    """One that gives centred shared representations, and takes them: E x + b - m, and D s + (b + D m)."""
    folded = copy.deepcopy(auxiliary)
    for projection, decoder, mean_S in (
        (folded.vision_projection, folded.vision_decoder, centre.image_S),
        (folded.text_projection, folded.text_decoder, centre.text_S),
    ):
        projection.bias.sub_(mean_S)
        decoder.bias.add_(decoder.weight @ mean_S)
    return folded.eval()


def _load(module: M, folder: Path) -> M:
    file = folder / MODEL_FILE
    try:
        module.load_state_dict(_read_tensors(file))
    except RuntimeError as error:
        raise InvalidTraining(f"{file} does not fit {folder / CONFIG_FILE}: {error}") from error
    return module.eval().requires_grad_(False)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except FileNotFoundError as error:
        raise InvalidTraining(
            f"{file} is not there: the training is not finished; run the same command again to go on"
        ) from error
    except (OSError, SafetensorError) as error:
        raise InvalidTraining(f"{file} cannot be read: {error}; train again") from error
