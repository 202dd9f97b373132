"""An open_clip model out of a local folder: pictures and texts to vectors of one space. Knows no autoencoder.

The folder is what open_clip loads as `local-dir:FOLDER`: open_clip_config.json, weights, and a tokenizer of its own
where the architecture needs one.

Shapes: N rows, E width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor

from training.errors import InvalidTraining

PREFIX = "local-dir:"


class ClipModel:
    """A CLIP in eval mode, float32."""

    def __init__(self, model: Any, preprocess: Any, tokenize: Any) -> None:
        self._model, self._preprocess, self._tokenize = model.eval().requires_grad_(False), preprocess, tokenize

    @property
    def device(self) -> torch.device:
        return next(self._model.parameters()).device

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image], *, unit: bool = True) -> Tensor:
        """[N, E] on the CPU; of unit length, or as the encoder gives them, which is what a store holds."""
        pixels = torch.stack([self._preprocess(image.convert("RGB")) for image in images]).to(self.device)
        return self._model.encode_image(pixels, normalize=unit).float().cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], *, unit: bool = True) -> Tensor:
        """[N, E] on the CPU, likewise; a text longer than the model's context is cut off."""
        tokens = self._tokenize(list(texts)).to(self.device)
        return self._model.encode_text(tokens, normalize=unit).float().cpu()


def load_clip(folder: str | Path, device: str = "cpu") -> ClipModel:
    """From a folder, with or without `local-dir:` before it. Raises InvalidTraining where there is no such model."""
    path = Path(str(folder).removeprefix(PREFIX))
    if not (path / "open_clip_config.json").exists():
        raise InvalidTraining(f"--clip {path}: open_clip_config.json is not there; give a folder that open_clip saved")
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(f"{PREFIX}{path}", device=device)
        tokenize = open_clip.get_tokenizer(f"{PREFIX}{path}")
    except Exception as error:  # open_clip raises what its many loaders raise
        raise InvalidTraining(f"--clip {path} cannot be loaded by open_clip: {error}") from error
    return ClipModel(model, preprocess, tokenize)
