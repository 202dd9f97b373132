"""Embeddings of an open_clip model, as its encoders give them: aligned by training, not normalised here.

Knows no store and no autoencoder.

Shapes: B pairs, D width of an embedding.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.collection.representer import Described, ModelDtype, Prepared, States, require_weights, special_token_in
from training.command_line import Settings
from training.errors import InvalidTraining
from training.evaluation.manifest import processor_digest, weights_digest
from training.pairs import Pair
from training.store.layout import EMBEDDING

CONFIG_FILE = "open_clip_config.json"


class ClipSettings(Settings):
    """Which open_clip model."""

    model: Path
    """Folder with open_clip_config.json and safetensors weights."""
    dtype: ModelDtype = "float32"
    """Number format of the model."""
    device: str = "cpu"

    def describe(self) -> Described:
        require_weights(self.model)
        try:
            width = json.loads((self.model / CONFIG_FILE).read_text())["model_cfg"]["embed_dim"]
        except (OSError, ValueError, KeyError) as error:
            raise InvalidTraining(f"{self.model / CONFIG_FILE} describes no open_clip model: {error!r}") from error
        return Described(
            model=str(self.model),
            model_sha256=weights_digest(self.model),
            processor_sha256=processor_digest(self.model),
            family="open_clip",
            names=(EMBEDDING,),
            width=width,
            num_layers=None,
            pooling=EMBEDDING,
            model_dtype=self.dtype,
        )

    def load(self) -> ClipRepresenter:
        import open_clip

        name = f"local-dir:{self.model}"
        precision = {"float32": "fp32", "bfloat16": "pure_bf16", "float16": "pure_fp16"}[self.dtype]
        model, _, preprocess = open_clip.create_model_and_transforms(name, precision=precision, device=self.device)
        return ClipRepresenter(model.eval(), preprocess, open_clip.get_tokenizer(name), self.dtype)


class ClipInputs(NamedTuple):
    """A pair as the model takes it."""

    pixels_CHW: Tensor
    token_ids_T: Tensor


class ClipRepresenter:
    """A loaded open_clip model with its preprocessing and its tokenizer."""

    def __init__(self, model: Any, preprocess: Any, tokenizer: Any, dtype: ModelDtype) -> None:
        self._model, self._preprocess, self._tokenizer = model, preprocess, tokenizer
        self._dtype = getattr(torch, dtype)
        self._device = next(model.parameters()).device
        self._special_tokens = _special_tokens(tokenizer)
        self._tokenizing = threading.Lock()  # fast tokenizers are not for several threads

    def prepare(self, pair: Pair) -> Prepared | str:
        """Pixels and token ids, or why the pair cannot be used."""
        if (fault := special_token_in(pair.text, self._special_tokens)) is not None:
            return fault
        limit = self._tokenizer.context_length
        with self._tokenizing:
            ids_T = self._tokenizer([pair.text])[0]
            with_room_T = self._tokenizer([pair.text], context_length=limit + 1)[0]
        if not torch.equal(with_room_T[:limit], ids_T):
            return f"the caption has more than the {limit} tokens of the model's context"
        return Prepared(length=0, inputs=ClipInputs(self._preprocess(pair.image), ids_T))

    @torch.inference_mode()
    def represent(self, batch: Sequence[Prepared]) -> Mapping[str, States]:
        """The embeddings of both encoders."""
        pixels_BCHW = torch.stack([one.inputs.pixels_CHW for one in batch]).to(self._device, self._dtype)
        ids_BT = torch.stack([one.inputs.token_ids_T for one in batch]).to(self._device)
        image_BD, text_BD = self._model.encode_image(pixels_BCHW), self._model.encode_text(ids_BT)
        return {EMBEDDING: States.of([image_BD.float().cpu(), text_BD.float().cpu()])}


def _special_tokens(tokenizer: Any) -> list[str]:
    """Of a Hugging Face tokenizer inside open_clip's, or of CLIP's own."""
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is not None and hasattr(inner, "all_special_tokens"):
        return list(inner.all_special_tokens)
    return [tokenizer.decoder[index] for index in getattr(tokenizer, "all_special_ids", [])]
