"""Pooled representations on disk: one safetensors file per layer, beside a manifest and the pairs they came from.

Written by `collect_representations`, read by every later stage. Knows no model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST_FILE, PAIRS_FILE = "manifest.json", "pairs.jsonl"


@dataclass(frozen=True, kw_only=True)
class Representations:
    """Row i of everything is one pair."""

    image_ND: Tensor
    """v: mean over the image's tokens, float32."""
    text_ND: Tensor
    """t: mean over the text tokens after the image, float32."""
    texts: tuple[str, ...]
    """The pairs' texts."""
    image_references: tuple[str, ...]
    """Where each picture is from."""

    @property
    def text_ids_N(self) -> Tensor:
        """Equal numbers for equal texts."""
        numbers: dict[str, int] = {}
        return torch.tensor([numbers.setdefault(text, len(numbers)) for text in self.texts])

    def split(self, held_out: int) -> tuple[Representations, Representations]:
        """All but the last `held_out` pairs, and those."""
        return self._rows(slice(None, -held_out)), self._rows(slice(-held_out, None))

    def _rows(self, rows: slice) -> Representations:
        return Representations(
            image_ND=self.image_ND[rows],
            text_ND=self.text_ND[rows],
            texts=self.texts[rows],
            image_references=self.image_references[rows],
        )


def write_representations(folder: Path, layers: dict[int, Representations], manifest: dict[str, Any]) -> None:
    """All layers of one collection; they share texts and references."""
    folder.mkdir(parents=True, exist_ok=True)
    for layer, found in layers.items():
        save_file({"image": found.image_ND, "text": found.text_ND}, folder / f"layer_{layer}.safetensors")
    first = next(iter(layers.values()))
    pairs = zip(first.texts, first.image_references, strict=True)
    lines = [json.dumps({"text": text, "image": image}, ensure_ascii=False) for text, image in pairs]
    (folder / PAIRS_FILE).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    manifest = {**manifest, "layers": sorted(layers), "pairs": len(first.texts)}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What was collected, from which model and how."""
    return json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))


def read_representations(folder: Path, layer: int) -> Representations:
    """One layer of a collection."""
    file = folder / f"layer_{layer}.safetensors"
    if not file.exists():
        raise ValueError(f"{folder} holds the layers {read_manifest(folder)['layers']}, not {layer}")
    tensors = load_file(file)
    pairs = [json.loads(line) for line in (folder / PAIRS_FILE).read_text(encoding="utf-8").splitlines()]
    return Representations(
        image_ND=tensors["image"],
        text_ND=tensors["text"],
        texts=tuple(pair["text"] for pair in pairs),
        image_references=tuple(pair["image"] for pair in pairs),
    )
