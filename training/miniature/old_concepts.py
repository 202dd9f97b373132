"""Stage 4: what each concept stands for, read off the pairs that activate it most.

A label is the words that are much more common in a concept's texts than elsewhere: text statistics, no other model.
Knows pooled representations and the two autoencoders; no LVLM.

Shapes: N pairs, S shared width, K concepts, k active concepts.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.sparse_autoencoder import SparseCode, VisionLanguageSAE
from training.command_line import Settings, parse_settings
from training.representations import Representations, read_representations

LoadImage = Callable[[str], Image.Image]
"""From an image reference to the picture."""


class InterpretationSettings(Settings):
    """How much is kept of each concept."""

    top_texts: int = Field(default=10, ge=0)
    """Texts that activate it most."""
    top_images: int = Field(default=10, ge=0)
    """Pictures that activate it most."""
    thumbnail_side_px: int = Field(default=32, ge=0)
    """Longest side of their thumbnails; 0 = none."""
    label_words: int = Field(default=2, gt=0)
    """Words in a label."""


class CommandLine(InterpretationSettings):
    """Interpret a VL-SAE on a folder of representations."""

    representations: Path
    """Folder written by collect_representations."""
    layer: int
    """Which of its layers."""
    auxiliary: Path
    """Weights written by train_auxiliary_autoencoder."""
    sparse: Path
    """Weights written by train_sparse_autoencoder."""
    active_concepts: int
    """k that it was trained with."""
    images: Path
    """Folder that the pairs' image references are relative to."""
    output: Path
    """concepts.jsonl."""


def interpret_concepts(
    auxiliary: AuxiliaryAutoencoder,
    sae: VisionLanguageSAE,
    pairs: Representations,
    load_image: LoadImage,
    settings: InterpretationSettings,
) -> list[dict[str, Any]]:
    """One record per concept: id, label, mean_activation, texts, images."""
    with torch.no_grad():
        image_NS, text_NS = auxiliary(pairs.image_ND, pairs.text_ND)
        image_NK, text_NK = dense_code(sae, sae.encode(image_NS)), dense_code(sae, sae.encode(text_NS))
    mean_K = (image_NK.mean(0) + text_NK.mean(0)) / 2
    words = _Words(pairs.texts)
    thumbnails: dict[str, str] = {}
    records = []
    for concept in range(len(mean_K)):
        references = [pairs.image_references[row] for row in strongest(image_NK[:, concept], settings.top_images)]
        for reference in references:
            if settings.thumbnail_side_px and reference not in thumbnails:
                thumbnails[reference] = thumbnail(load_image(reference), settings.thumbnail_side_px)
        records.append(
            {
                "id": concept,
                "label": words.label(text_NK[:, concept], settings.label_words),
                "mean_activation": round(float(mean_K[concept]), 6),
                "texts": [pairs.texts[row] for row in strongest(text_NK[:, concept], settings.top_texts)],
                "images": [{"reference": name, "thumbnail": thumbnails.get(name)} for name in references],
            }
        )
    return records


def dense_code(sae: VisionLanguageSAE, code: SparseCode) -> Tensor:
    """Activations [N, K], zeros included."""
    zeros_NK = torch.zeros(len(code.concept_ids), len(sae.encoder))
    return zeros_NK.scatter_(1, code.concept_ids, code.activations)


def strongest(activation_N: Tensor, count: int) -> list[int]:
    """Rows with the largest activations, strongest first; never a row that is zero."""
    top = torch.topk(activation_N, min(count, len(activation_N)))
    return [int(row) for row, value in zip(top.indices, top.values, strict=True) if value > 0]


def thumbnail(image: Image.Image, side_px: int) -> str:
    """A small JPEG as a data URL."""
    small = image.convert("RGB")
    small.thumbnail((side_px, side_px))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=70)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


class _Words:
    """Which text holds which word."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        found = [set(re.findall(r"\w{3,}", text.lower())) for text in texts]
        self.vocabulary = sorted(set().union(*found))
        column = {word: number for number, word in enumerate(self.vocabulary)}
        self.presence_NW = torch.zeros(len(texts), len(self.vocabulary))
        for row, words in enumerate(found):
            self.presence_NW[row, [column[word] for word in words]] = 1.0
        self.base_W = self.presence_NW.mean(0)

    def label(self, activation_N: Tensor, count: int) -> str:
        """The words whose share in the activating texts exceeds their share in all texts by most."""
        if not activation_N.any():
            return ""
        share_W = activation_N @ self.presence_NW / activation_N.sum()
        gain_W = (share_W - self.base_W) / (self.base_W * (1 - self.base_W)).sqrt().clamp(min=1e-3)
        top = torch.topk(gain_W, min(count, len(self.vocabulary)))
        chosen = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return " ".join(self.vocabulary[index] for index, gain in chosen if gain > 0)


def write_concepts(file: Path, records: list[dict[str, Any]]) -> None:
    """JSON lines."""
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def main() -> None:
    """The command line."""
    settings = parse_settings(CommandLine, program="python -m training.interpret_concepts", description=__doc__ or "")
    weights = load_file(settings.auxiliary)
    shared_size, hidden_size = weights["vision_projection.weight"].shape
    auxiliary = AuxiliaryAutoencoder(hidden_size, shared_size)
    auxiliary.load_state_dict(weights)
    sparse_weights = load_file(settings.sparse)
    sae = VisionLanguageSAE(shared_size, len(sparse_weights["encoder"]), settings.active_concepts)
    sae.load_state_dict(sparse_weights)
    pairs = read_representations(settings.representations, settings.layer)

    def load_image(reference: str) -> Image.Image:
        return Image.open(settings.images / reference)

    write_concepts(settings.output, interpret_concepts(auxiliary, sae, pairs, load_image, settings))


if __name__ == "__main__":
    main()
