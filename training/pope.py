"""POPE: balanced yes/no questions about objects, and how answers count. Knows no wording, no world and no model.

Li et al. 2023 (arXiv 2305.10355): half of the questions of a split ask for an object that is there; the splits differ
in how the absent one is chosen.
    random       any absent object
    popular      the absent object that is most frequent over all scenes
    adversarial  the absent partner of a present object where the world has partners, else the absent object that most
                 often stands beside the present ones
All splits ask the same questions about present objects, as in the published sets, so their answers differ only where
the absent objects do.

An answer that says neither yes nor no (`training.yes_or_no`) is wrong and is reported as unparsed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields
from itertools import permutations
from operator import attrgetter
from random import Random
from typing import Literal

import numpy as np

from training.evaluation.paired_bootstrap import ratio

Split = Literal["random", "popular", "adversarial"]
SPLITS: tuple[Split, ...] = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class ObjectQuestion:
    """Is `object` in scene number `scene`?"""

    split: Split
    scene: int
    """Index into the scenes that the questions were built from."""
    object: str
    truth: bool


def build_questions(
    scenes: Sequence[AbstractSet[str]],
    vocabulary: Sequence[str],
    *,
    partners: Mapping[str, str] | None = None,
    seed: int,
) -> list[ObjectQuestion]:
    """For each scene and split one question about a present object and one about an absent one.

    `scenes`: the objects in each. `partners`: object to the one it is confused with (both directions as needed).
    """
    popularity = Counter(name for scene in scenes for name in scene)
    together = Counter(pair for scene in scenes for pair in permutations(sorted(scene), 2))
    questions = []
    for number, scene in enumerate(scenes):
        random = Random(f"{seed}:{number}")  # by scene, so that more scenes leave the first ones' questions alone
        present = sorted(scene)
        absent = random.sample(sorted(set(vocabulary) - set(scene)), k=len(set(vocabulary) - set(scene)))
        if not present or not absent:
            raise ValueError(f"scene {number} needs a present and an absent object, it has {present}")
        rivals = [partner for name in present if (partner := (partners or {}).get(name)) in absent]
        chosen: dict[Split, str] = {
            "random": absent[0],
            "popular": max(absent, key=lambda name: popularity[name]),
            "adversarial": random.choice(rivals)
            if rivals
            else max(absent, key=lambda name: sum(together[name, other] for other in present)),
        }
        asked = random.choice(present)
        for split in SPLITS:
            questions.append(ObjectQuestion(split, number, asked, True))
            questions.append(ObjectQuestion(split, number, chosen[split], False))
    return questions


@dataclass(frozen=True, kw_only=True)
class AnswerCounts:
    """What one answer adds to the sums that POPE is made of; the sums of many answers look the same."""

    questions: int
    """Number of answers counted: 1 for one."""
    present: int
    """Questions whose true answer is yes."""
    said_yes: int
    said_yes_rightly: int
    right: int
    unparsed: int
    """Answers that say neither yes nor no; never right."""


COUNT_NAMES = tuple(field.name for field in fields(AnswerCounts))
_values = attrgetter(*COUNT_NAMES)


def count_answer(answer: bool | None, truth: bool) -> AnswerCounts:
    """`answer`: None where it says neither yes nor no."""
    return AnswerCounts(
        questions=1,
        present=int(truth),
        said_yes=int(answer is True),
        said_yes_rightly=int(answer is True and truth),
        right=int(answer is truth),
        unparsed=int(answer is None),
    )


def counts_matrix(counts: Sequence[AnswerCounts], scenes: Sequence[int], *, number_of_scenes: int) -> np.ndarray:
    """[scenes, counts]: answers summed by the scene they are about, since a bootstrap draws whole scenes."""
    matrix = np.zeros((number_of_scenes, len(COUNT_NAMES)))
    for row, scene in zip(counts, scenes, strict=True):
        matrix[scene] += _values(row)
    return matrix


def pope_metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """POPE's metrics from summed counts [..., counts]; each has the shape [...]. 'Positive' is a yes."""
    total = dict(zip(COUNT_NAMES, np.moveaxis(sums, -1, 0), strict=True))
    return {
        "accuracy": ratio(total["right"], total["questions"]),
        "precision": ratio(total["said_yes_rightly"], total["said_yes"]),
        "recall": ratio(total["said_yes_rightly"], total["present"]),
        "f1": ratio(2 * total["said_yes_rightly"], total["said_yes"] + total["present"]),
        "yes_rate": ratio(total["said_yes"], total["questions"]),
        "unparsed": ratio(total["unparsed"], total["questions"]),
    }
