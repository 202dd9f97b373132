"""The files that the VL-SAE's authors publish: names, shapes, reading and writing. Knows no artifact.

    SAE        encoder [K, S]; vision_decoder, text_decoder: weight [S, K], bias [S]
    auxiliary  vision_projection, text_projection: weight [S, D], bias [S]; vision_decoder, text_decoder: [D, S], [D]
    c2d_*.json {"17": {"image_urls", "image_names", "texts", "mean_activation"}, ...}

The only place in this repository that opens `.pth` files: with `weights_only`, so that one with code in it is refused.
Where S = D a transposed weight of the auxiliary autoencoder has the right shape and cannot be told.

Shapes: D hidden size, S shared width, K concepts.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from training.durable_files import in_place_of, write_json
from training.errors import InvalidTraining

SAE_FILE, AUXILIARY_FILE, CONCEPTS_FILE = "sae.pth", "auxiliary.pth", "c2d_concepts.json"
SAE_SHAPES = {
    "encoder": "KS",
    "vision_decoder.weight": "SK",
    "vision_decoder.bias": "S",
    "text_decoder.weight": "SK",
    "text_decoder.bias": "S",
}
AUXILIARY_SHAPES = {
    "vision_projection.weight": "SD",
    "vision_projection.bias": "S",
    "text_projection.weight": "SD",
    "text_projection.bias": "S",
    "vision_decoder.weight": "DS",
    "vision_decoder.bias": "D",
    "text_decoder.weight": "DS",
    "text_decoder.bias": "D",
}
INLINE_IMAGE = "data:image/"
"""How a URL begins that is the picture itself."""


class PublishedWeights(NamedTuple):
    """Both state dicts, float32, with the sizes they agree on."""

    sae: dict[str, Tensor]
    auxiliary: dict[str, Tensor]
    hidden_size: int
    shared_size: int
    num_concepts: int


def _encodable(text: str) -> str:
    text.encode()  # a UnicodeEncodeError is a ValueError, which the field's error tells
    return text


PublishedText = Annotated[str, AfterValidator(_encodable)]
"""Without half a surrogate pair, which no file could hold."""


class PublishedConcept(BaseModel):
    """An entry of `c2d_*.json`; what else it may hold is left out."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    image_urls: list[PublishedText] = Field(default_factory=list)
    image_names: list[PublishedText] = Field(default_factory=list)
    texts: list[PublishedText] = Field(default_factory=list)
    mean_activation: float = Field(ge=0)
    """Over both modalities, zeros included."""
    label: PublishedText | None = None
    """Not in the authors' files; in ours, so that nothing is lost on the way back."""


def read_published_weights(sae: Path, auxiliary: Path) -> PublishedWeights:
    """Raises InvalidTraining that names the file and the tensor which is not as published."""
    sae_tensors, auxiliary_tensors = _read_tensors(sae, SAE_SHAPES), _read_tensors(auxiliary, AUXILIARY_SHAPES)
    sizes = {
        "S": _length(sae, "vision_decoder.bias", sae_tensors),
        "D": _length(auxiliary, "vision_decoder.bias", auxiliary_tensors),
    }
    shared = _length(auxiliary, "vision_projection.bias", auxiliary_tensors)
    if shared != sizes["S"]:
        raise InvalidTraining(
            f"{auxiliary}: vision_projection.bias has {shared} entries (S), but vision_decoder.bias of {sae} has "
            f"{sizes['S']}; give two files of the same training"
        )
    sizes["K"] = sae_tensors["encoder"].numel() // sizes["S"]
    for file, tensors, shapes in ((sae, sae_tensors, SAE_SHAPES), (auxiliary, auxiliary_tensors, AUXILIARY_SHAPES)):
        for name, letters in shapes.items():
            _check_tensor(file, name, tensors[name], letters, sizes)
    return PublishedWeights(
        sae={name: value.float() for name, value in sae_tensors.items()},
        auxiliary={name: value.float() for name, value in auxiliary_tensors.items()},
        hidden_size=sizes["D"],
        shared_size=sizes["S"],
        num_concepts=sizes["K"],
    )


def read_published_concepts(file: Path, num_concepts: int) -> dict[int, PublishedConcept]:
    """By id. Raises InvalidTraining, naming the entry, for anything that is not as published."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidTraining(f"{file} is not readable JSON: {error}") from error
    if not isinstance(entries, dict):
        raise InvalidTraining(f"{file} must be an object from concept id to concept, not a {type(entries).__name__}")
    concepts = {}
    for key, entry in entries.items():
        if not (key.isascii() and key.isdigit() and int(key) < num_concepts):
            raise InvalidTraining(f"{file}: {key!r} is no concept id; the weights have the ids 0 to {num_concepts - 1}")
        try:
            concepts[int(key)] = PublishedConcept.model_validate(entry)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, (key, *first["loc"])))
            raise InvalidTraining(f"{file}: {where}: {first['msg']}") from error
    return concepts


def write_published_weights(folder: Path, sae: Mapping[str, Tensor], auxiliary: Mapping[str, Tensor]) -> None:
    """`sae.pth` and `auxiliary.pth`: plain dicts of tensors, as `torch.load(..., weights_only=True)` takes them."""
    for name, tensors, shapes in ((SAE_FILE, sae, SAE_SHAPES), (AUXILIARY_FILE, auxiliary, AUXILIARY_SHAPES)):
        assert tensors.keys() == shapes.keys(), (sorted(tensors), sorted(shapes))
        with in_place_of(folder / name) as made:
            torch.save({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, made)


def write_published_concepts(folder: Path, concepts: Mapping[int, Mapping[str, Any]]) -> None:
    """`c2d_concepts.json`."""
    write_json(folder / CONCEPTS_FILE, {str(number): concept for number, concept in concepts.items()})


def _read_tensors(file: Path, shapes: Mapping[str, str]) -> dict[str, Tensor]:
    tensors = _load(file)
    if not isinstance(tensors, Mapping):
        raise InvalidTraining(f"{file} holds a {type(tensors).__name__}; a plain state dict of tensors is needed")
    missing, unknown = sorted(shapes.keys() - tensors.keys()), sorted(map(str, tensors.keys() - shapes.keys()))
    if missing or unknown:
        raise InvalidTraining(
            f"{file}: {'no tensor ' + missing[0] if missing else 'unknown tensor ' + unknown[0]}; "
            f"a published file of this kind has {', '.join(shapes)}, this one has {', '.join(map(str, tensors))[:500]}"
        )
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or not value.is_floating_point():
            raise InvalidTraining(f"{file}: {name} is no dense tensor of floating-point numbers")
    return dict(tensors)


_BROKEN = (OSError, SafetensorError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError)
"""What reading a damaged file raises, in either format."""


def _load(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise InvalidTraining(
            f"{file} holds more than tensors ({reason}); it is not opened, as that could "
            "run code: ask its maker for a plain state dict"
        ) from error
    except _BROKEN as error:
        raise InvalidTraining(f"{file} is no readable .pth or .safetensors file: {error}") from error


def _length(file: Path, name: str, tensors: Mapping[str, Tensor]) -> int:
    if tensors[name].dim() != 1 or not len(tensors[name]):
        raise InvalidTraining(f"{file}: {name} has shape {tuple(tensors[name].shape)}; one dimension is needed")
    return len(tensors[name])


def _check_tensor(file: Path, name: str, value: Tensor, letters: str, sizes: Mapping[str, int]) -> None:
    shape, expected = tuple(value.shape), tuple(sizes[letter] for letter in letters)
    if shape != expected:
        turned = shape == expected[::-1]
        raise InvalidTraining(
            f"{file}: {name} has shape {shape}, expected {expected} [{', '.join(letters)}]"
            + ("; it is transposed: give the file as it was published" if turned else "")
        )
    if not torch.isfinite(value).all():
        raise InvalidTraining(f"{file}: {name} holds numbers that are not finite; the file is damaged")
