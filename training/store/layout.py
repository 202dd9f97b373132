"""What a store of representations looks like on disk.

    STORE/.lock                         empty; locked while a collection writes
    STORE/manifest.json                 what was collected, from which model and how; counts at the end
    STORE/shards/000012.safetensors     `layer_30.image`, `layer_30.text` [n, D]; where N prefixes of each text
                                        were collected `layer_30.prefixes` [n * N, D]; `text_hash`, `image_hash` [n]
    STORE/shards/000012.jsonl           n lines: pair (index in the source), text, image (its reference)
    STORE/shards/000012.skipped.jsonl   pairs of this portion that could not be used: pair, image, reason
    STORE/shards/000012.json            written last: the counts and checksums of the other three

A shard holds one portion of the source, whoever collected it and when, so that a store which was interrupted ends with
the bytes of one that was not. Knows no tensors and no model.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.collection.placing import TextPlace
from training.errors import InvalidTraining

FORMAT_VERSION = 2
MANIFEST_FILE, SHARD_FOLDER, LOCK_FILE = "manifest.json", "shards", ".lock"
EMBEDDING = "embedding"
"""Name of the states of a model that has no decoder layers (CLIP)."""
PREFIXES = "prefixes"
TEXT_HASH, IMAGE_HASH = "text_hash", "image_hash"

StoredDtype = Literal["float32", "bfloat16", "float16"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Collected(_Strict):
    """How the representations came about.

    Two runs may share a store only if all of this is equal, but for the places: `model` and `spec` of the source are
    those it was begun with.
    """

    model: str
    """Name or path of the checkpoint, as it was given."""
    model_sha256: str
    """Digest of its weights; what identifies it."""
    processor_sha256: str = ""
    """Digest of its tokenizer's and its image processor's files."""
    family: str
    """`model_type` of an LVLM; `open_clip` for CLIP."""
    names: tuple[str, ...]
    """The kinds of states that each pair has: `layer_30`, or `embedding` for CLIP."""
    width: int = Field(gt=0)
    """D: entries of a state."""
    num_layers: int | None
    """Decoder layers of an LVLM."""
    point: Literal["output", "input"] = "output"
    """Side of the layer that was read."""
    pooling: str
    """How tokens became one state per modality."""
    text_in: TextPlace | None = None
    """Where the texts stood; None where there is no prompt (CLIP)."""
    prompts: tuple[str, ...] = ()
    """What they were put into, `{text}` in their place, one drawn for each pair."""
    prefixes: int = 0
    """Prefixes of each text, of random length, that were pooled besides the whole."""
    shortest_prefix: int = 1
    """Tokens of the text in the shortest of them."""
    model_dtype: str
    """Number format that the model ran in."""
    stored_dtype: StoredDtype
    """Number format of the states on disk; pooling itself is float32."""
    batch_size: int
    """Pairs per forward pass: another size rounds sums in another order."""
    portion_size: int
    """Pairs of the source per shard, at most."""
    skip_not_finite: bool = False
    """Pairs whose states are not finite were left out; otherwise they end a collection."""
    device: str = "cpu"
    """Kind of device that the model ran on: each rounds in its own way."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Of the packages that compute the states."""
    source: dict[str, Any]
    """Where the pairs are from, as `training.pairs` describes it."""


class ShardRecord(_Strict):
    """What was made of one portion."""

    shard: int
    """Number of the portion."""
    pairs: int
    """Rows in it."""
    skipped: int
    """Pairs of the portion that could not be used."""
    sha256: dict[str, str]
    """By file name."""


class Manifest(_Strict):
    """`manifest.json`."""

    format_version: Literal[2] = FORMAT_VERSION
    collected: Collected
    portions: int
    """Shards that a finished store has."""
    complete: bool = False
    pairs: int = 0
    """All rows, once complete."""
    skipped: int = 0
    """Pairs that could not be used, once complete."""
    shards: tuple[ShardRecord, ...] = ()
    """In order, once complete."""


def layer_name(layer: int) -> str:
    """Name of the states at a decoder layer."""
    return f"layer_{layer}"


def hash_text(text: str) -> int:
    """A signed 64-bit number; equal texts have equal ones."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big", signed=True)


def shard_file(folder: Path, shard: int, ending: str) -> Path:
    """A file of a shard; endings: safetensors, jsonl, skipped.jsonl, json."""
    return folder / SHARD_FOLDER / f"{shard:06d}.{ending}"


def read_manifest(folder: Path) -> Manifest:
    """Raises InvalidTraining where the folder is no store."""
    file = folder / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidTraining(f"{file} cannot be read ({error.strerror}): {folder} is no collection") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise InvalidTraining(
            f"{file} is not a manifest of a collection of format {FORMAT_VERSION}; collect again where an earlier "
            f"version collected: {error}"
        ) from error
