"""The authors' format, written from its description alone: state dicts of plain tensors, and c2d_*.json."""

from __future__ import annotations

import json
from pathlib import Path

import torch

D, S, K, ACTIVE = 32, 24, 96, 8


def published_tensors(seed: int = 0, hidden: int = D) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(SAE, auxiliary autoencoder), random."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    sae = {"encoder": draw(K, S)}
    auxiliary = {}
    for modality in ("vision", "text"):
        sae |= {f"{modality}_decoder.weight": draw(S, K), f"{modality}_decoder.bias": draw(S)}
        auxiliary |= {f"{modality}_projection.weight": draw(S, hidden), f"{modality}_projection.bias": draw(S)}
        auxiliary |= {f"{modality}_decoder.weight": draw(hidden, S), f"{modality}_decoder.bias": draw(hidden)}
    return sae, auxiliary


def published_concepts() -> dict[str, dict]:
    """Two of the K concepts, with ten of everything."""
    concepts = {}
    for number, word in ((3, "harbour"), (17, "bicycle")):
        concepts[str(number)] = {
            "image_urls": [f"http://pictures.invalid/{number}/{place}.jpg" for place in range(10)],
            "image_names": [f"{number:03d}{place:06d}" for place in range(10)],
            "texts": [f"a photo of the {word} on day {place}" for place in range(10)],
            "mean_activation": 0.02 * number,
        }
    return concepts


def write_published(folder: Path, *, hidden: int = D) -> tuple[Path, Path, Path]:
    """Files of the SAE, the auxiliary autoencoder and the concepts."""
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "sae.pth", folder / "auxiliary.pth", folder / "c2d_cc3m.json"
    for file, tensors in zip(files, published_tensors(hidden=hidden), strict=False):
        torch.save(tensors, file)
    files[2].write_text(json.dumps(published_concepts()))
    return files
