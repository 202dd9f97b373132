"""The concept atlas: static pages that open from disk, ask no server, and stay quick with 32,768 concepts.

    DIR/index.html, atlas.css, atlas.js, search.js    the page, always the same
    DIR/data/summary.js                               label, activations and scores of every concept, strongest first
    DIR/data/chunk_0000.js ...                        texts and pictures of 256 concepts each, loaded when looked at
    DIR/thumbnails/ab/*.jpg                           written by `pictures.py`

Data are scripts, as a page opened from disk may not fetch files; in them `<` is escaped, and the page puts texts in as
text, never as markup. Knows records, no store and no autoencoder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from training.durable_files import write_bytes

PAGE = Path(__file__).parent / "atlas_page"
CHUNK = 256
"""Concepts per file."""
THUMBNAILS = "thumbnails"


class AtlasConcept(NamedTuple):
    """What one concept's page shows beside its figures."""

    texts: Sequence[str]
    images: Sequence[Mapping[str, str | None]]
    """reference, and thumbnail as a path below the atlas."""


class AtlasColumns(NamedTuple):
    """Figures of all concepts, by id."""

    labels: Sequence[str]
    mean_K: np.ndarray
    image_K: np.ndarray
    """Mean activation by images."""
    text_K: np.ndarray
    scores_K: Mapping[str, np.ndarray]
    """intra_image, intra_text, cross; empty where they were not measured."""


def strongest_first(mean_K: np.ndarray) -> np.ndarray:
    """Ids in the order of the atlas's files."""
    return np.argsort(-mean_K, kind="stable")


def write_atlas(folder: Path, about: str, columns: AtlasColumns, concepts: Iterable[AtlasConcept]) -> None:
    """`concepts` come in the order of `strongest_first`, one at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(PAGE.iterdir()):
        shutil.copyfile(file, folder / file.name)
    data, remaining, silent = folder / "data", iter(concepts), []
    number = 0
    while chunk := list(islice(remaining, CHUNK)):
        silent += [int(not concept.texts and not concept.images) for concept in chunk]
        entries = [{"texts": list(concept.texts), "images": list(concept.images)} for concept in chunk]
        _write_script(data / f"chunk_{number:04d}.js", f"atlasChunk({number}, ", entries)
        number += 1
    _write_script(data / "summary.js", "atlasSummary(", _summary(about, columns, silent))


def _summary(about: str, columns: AtlasColumns, silent: list[int]) -> dict[str, Any]:
    order = strongest_first(columns.mean_K)
    figures = {"mean": columns.mean_K, "image": columns.image_K, "text": columns.text_K, **columns.scores_K}
    return {
        "about": about,
        "chunk": CHUNK,
        "columns": {
            "id": order.tolist(),
            "label": [columns.labels[concept] for concept in order],
            "silent": silent,
            **{name: [_figure(value) for value in values_K[order].tolist()] for name, values_K in figures.items()},
        },
    }


def _figure(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 6)


def _write_script(file: Path, call: str, value: Any) -> None:
    """JSON in which nothing can end a script or a line of one."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    write_bytes(file, f"{call}{text});\n".encode("utf-8", "backslashreplace"))
