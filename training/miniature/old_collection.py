"""Collection into memory, for the miniature's own build until it runs the stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from training.collection.lvlm import LvlmRepresenter
from training.collection.representer import Prepared
from training.command_line import Settings
from training.pairs import Pair
from training.representations import Representations
from training.store.layout import layer_name


class CollectionSettings(Settings):
    """What is collected, and in what portions."""

    layers: tuple[int, ...]
    """Decoder layers whose output is pooled, counted from 0."""
    batch_size: int = Field(default=64, gt=0)
    """Pairs per forward pass."""


def collect(
    model: Any,
    processor: Any,
    pairs: Iterable[Pair],
    settings: CollectionSettings,
    report: Callable[[str], None] = print,
) -> dict[int, Representations]:
    """Representations of all pairs, by layer."""
    representer = LvlmRepresenter(model, processor, settings.layers, "output")
    pooled: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in settings.layers}
    texts, references = [], []
    source = iter(pairs)
    while batch := list(islice(source, settings.batch_size)):
        prepared = [one for pair in batch if isinstance(one := representer.prepare(pair), Prepared)]
        assert len(prepared) == len(batch)
        states = representer.represent(prepared)
        for layer in settings.layers:
            pooled[layer].append(states[layer_name(layer)])
        texts += [pair.text for pair in batch]
        references += [pair.reference for pair in batch]
    report(f"collected {len(texts)} pairs")
    return {
        layer: Representations(
            image_ND=torch.cat([image for image, _ in parts]),
            text_ND=torch.cat([text for _, text in parts]),
            texts=tuple(texts),
            image_references=tuple(references),
        )
        for layer, parts in pooled.items()
    }
