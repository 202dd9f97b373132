"""Pictures with texts, from the formats they come in: `open_pairs(spec)` gives a source, whatever the format."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from training.errors import InvalidTraining
from training.pairs.huggingface import open_huggingface
from training.pairs.json_lines import JsonLinesPairs
from training.pairs.pair import Pair, PairSource, PortionPlace, Unusable
from training.pairs.webdataset import WebDatasetPairs

__all__ = ["SPECS", "Pair", "PairSource", "PortionPlace", "Unusable", "open_pairs"]

SPECS = (
    "webdataset:/data/cc3m/*.tar, jsonl:/data/pairs.jsonl, "
    "huggingface:/data/saved_dataset[?split=train&image=image&text=caption], miniature:RANGE:COUNT[:START]"
)


def _open_miniature(place: str) -> PairSource:
    from training.pairs.miniature import open_miniature  # brings what trains the miniature's models with it

    return open_miniature(place)


_KINDS: Mapping[str, Callable[[str], PairSource]] = {
    "webdataset": WebDatasetPairs,
    "jsonl": JsonLinesPairs,
    "huggingface": open_huggingface,
    "miniature": _open_miniature,
}


def open_pairs(spec: str) -> PairSource:
    """The source that a spec names; its files are looked into when it is asked for something."""
    kind, colon, place = spec.partition(":")
    if not colon or not place or kind not in _KINDS:
        raise InvalidTraining(f"--pairs {spec!r} is none of {SPECS}")
    return _KINDS[kind](place if kind == "miniature" else os.path.join(os.getcwd(), place))
