"""The seam between collection and a model: what turns pairs into states. Knows no model and no store.

Shapes: B pairs, N prefixes of a text, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from training.collection.placing import TextPlace
from training.errors import InvalidTraining
from training.pairs import Pair

ModelDtype = Literal["float32", "bfloat16", "float16"]


class Described(BaseModel):
    """What a store records of the model and of how it was read; fields as in `training.store.layout.Collected`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    model_sha256: str
    processor_sha256: str = ""
    family: str
    names: tuple[str, ...]
    width: int
    num_layers: int | None
    point: Literal["output", "input"] = "output"
    pooling: str
    text_in: TextPlace | None = None
    prompts: tuple[str, ...] = ()
    prefixes: int = 0
    shortest_prefix: int = 1
    model_dtype: str


class States(NamedTuple):
    """Of one batch, float32 on the CPU."""

    image_BD: Tensor
    text_BD: Tensor
    prefix_BND: Tensor
    """t of N prefixes of each text."""

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> States:
        """From [B, D] of the image, of the text and of each prefix."""
        image_BD, text_BD, *prefixes = parts
        return cls(
            image_BD, text_BD, torch.stack(prefixes, dim=1) if prefixes else text_BD.new_empty(len(text_BD), 0, 0)
        )


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A pair as its model wants it."""

    length: int
    """What it costs: pairs of similar length go into one batch."""
    inputs: Any
    """Of the representer's own."""
    token_ids: Sequence[int] = ()
    """Of an LVLM: the whole prompt, one token for the image."""


class Representer(Protocol):
    """A loaded model."""

    def prepare(self, pair: Pair) -> Prepared | str:
        """Inputs of a pair, or why it cannot be used; called in several threads."""
        ...

    def represent(self, batch: Sequence[Prepared]) -> Mapping[str, States]:
        """The batch's states, by name."""
        ...


class RepresenterSettings(Protocol):
    """What a representer is made of; travels to the processes that load it."""

    def describe(self) -> Described:
        """Without loading the weights. Raises InvalidTraining where the folder holds no such model."""
        ...

    def load(self) -> Representer:
        """In the process that will run it."""
        ...


def require_weights(folder: Path) -> None:
    """Raises InvalidTraining unless the folder has safetensors weights, which identify a model."""
    if not any(folder.glob("*.safetensors")):
        raise InvalidTraining(f"--model {folder}: no model is there: a folder with *.safetensors weights is needed")


def special_token_in(text: str, special_tokens: Sequence[str]) -> str | None:
    """Why a caption that spells a special token cannot be used: the tokenizer would read it as one."""
    found = next((token for token in special_tokens if token in text), None)
    return None if found is None else f"the caption spells the special token {found}"
