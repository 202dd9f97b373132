"""CHAIR: which objects a caption names that the image does not hold. Knows no world, no model and no HTTP.

A world supplies two things: the true objects of a scene, and a function from a caption to the objects it mentions.

Rohrbach et al. 2018 (arXiv 1809.02156):
    CHAIR_i = invented mentions / all mentions          CHAIR_s = captions with an invented object / captions
CHAIR falls for any caption that says less, so it stands with recall (true objects named / true objects), the length in
words, the numbers of different objects named and of those invented, and of the mentions that only repeat one: a text
pushed towards its picture may say the same thing twice. As in the authors' code CHAIR_i counts mentions, a repeated one
again, and ratios are pooled over all captions. Where captions name no object at all, CHAIR_i is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields
from operator import attrgetter

import numpy as np

from training.evaluation.paired_bootstrap import ratio


@dataclass(frozen=True, kw_only=True)
class CaptionCounts:
    """What one caption adds to the sums that CHAIR is made of; the sums of many captions look the same."""

    captions: int
    """Number of captions counted: 1 for one."""
    with_invention: int
    """Captions that name at least one object the image does not hold."""
    mentions: int
    """Mentions of objects, repeated ones again."""
    invented_mentions: int
    """Those of objects that the image does not hold."""
    true_objects: int
    """Different objects in the image."""
    true_objects_named: int
    """Those that the caption names."""
    objects_named: int
    """Different objects that the caption names, invented ones too."""
    words: int
    """Words separated by white space that hold at least one letter or digit."""
    empty: int
    """Captions without a word: the first thing that too strong an intervention does."""


COUNT_NAMES = tuple(field.name for field in fields(CaptionCounts))
_values = attrgetter(*COUNT_NAMES)


def count_caption(caption: str, mentions: Sequence[str], truth: AbstractSet[str]) -> CaptionCounts:
    """`mentions`: the objects the caption names, in order and with repetition, in the vocabulary of `truth`."""
    named = set(mentions)
    invented = [mention for mention in mentions if mention not in truth]
    words = sum(any(character.isalnum() for character in word) for word in caption.split())
    return CaptionCounts(
        captions=1,
        with_invention=int(bool(invented)),
        mentions=len(mentions),
        invented_mentions=len(invented),
        true_objects=len(truth),
        true_objects_named=len(named & truth),
        objects_named=len(named),
        words=words,
        empty=int(words == 0),
    )


def counts_matrix(counts: Sequence[CaptionCounts]) -> np.ndarray:
    """One row per caption, one column per count: what `chair_metrics` and the bootstrap take."""
    return np.array([_values(row) for row in counts], dtype=np.float64).reshape(len(counts), len(COUNT_NAMES))


def chair_metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """CHAIR and its companions from summed counts [..., counts]; each metric has the shape [...]."""
    total = dict(zip(COUNT_NAMES, np.moveaxis(sums, -1, 0), strict=True))
    return {
        "chair_s": ratio(total["with_invention"], total["captions"]),
        "chair_i": ratio(total["invented_mentions"], total["mentions"]),
        "recall": ratio(total["true_objects_named"], total["true_objects"]),
        "length": ratio(total["words"], total["captions"]),
        "objects": ratio(total["objects_named"], total["captions"]),
        "invented": ratio(total["objects_named"] - total["true_objects_named"], total["captions"]),
        "repeated": ratio(total["mentions"] - total["objects_named"], total["captions"]),
        "empty": ratio(total["empty"], total["captions"]),
    }
