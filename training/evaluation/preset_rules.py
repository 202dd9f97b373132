"""When a setting may become a preset, and which of two is better. Knows scores, not how they came about."""

from __future__ import annotations

from collections.abc import Callable

from training.evaluation.conditions import Task
from training.evaluation.scores import Scoreboard, Scores
from training.evaluation.verdict import MAX_RECALL_DROP
from training.pope import SPLITS

FORGETS = f"recall may drop by more than {MAX_RECALL_DROP}"


def caption_fitness(own: Scores, plain: Scores) -> float:
    """CHAIR_s; what recall drops beyond three quarters of the allowed weighs five times as much."""
    excess = plain.chair["recall"].value - own.chair["recall"].value - 0.75 * MAX_RECALL_DROP
    return own.chair["chair_s"].value + 5 * max(0.0, excess)


def question_fitness(own: Scores, plain: Scores) -> float:
    """Wrong answers to adversarial questions; what the other splits lose counts too."""
    accuracy = {split: own.pope[split]["accuracy"].value for split in SPLITS}
    lost = sum(max(0.0, plain.pope[split]["accuracy"].value - accuracy[split]) for split in ("random", "popular"))
    return 1 - accuracy["adversarial"] + lost


FITNESS: dict[Task, Callable[[Scores, Scores], float]] = {"captions": caption_fitness, "questions": question_fitness}


def against_captions(board: Scoreboard) -> tuple[str, ...]:
    """What forbids the preset `captions`; the board holds plain, own and other_image."""
    change, gap = board.difference("own", "plain").chair, board.difference("own", "other_image").chair
    found = {
        "CHAIR_s is not below plain beyond its interval": not change["chair_s"].below(),
        FORGETS: change["recall"].low < -MAX_RECALL_DROP,
        "another scene's image does as well: not alignment": not gap["chair_s"].below(),
    }
    return tuple(reason for reason, holds in found.items() if holds)


def against_questions(board: Scoreboard) -> tuple[str, ...]:
    """What forbids the preset `questions`; the board holds plain, own and other_image."""
    change, gap = board.difference("own", "plain").pope, board.difference("own", "other_image").pope
    found = {
        "adversarial accuracy is not above plain beyond its interval": not change["adversarial"]["accuracy"].above(),
        "another scene's image does as well: not alignment": not gap["adversarial"]["accuracy"].above(),
    }
    found |= {f"{split} questions suffer": change[split]["accuracy"].below() for split in SPLITS}
    return tuple(reason for reason, holds in found.items() if holds)


def harm(board: Scoreboard, name: str, task: Task) -> tuple[str, ...]:
    """What a preset that everybody gets would do to this task beyond its interval."""
    change = board.difference(name, "plain")
    if task == "questions":
        return tuple(f"{split} accuracy falls" for split in SPLITS if change.pope[split]["accuracy"].below())
    found = {
        "CHAIR_s rises": change.chair["chair_s"].above(),
        f"recall falls by more than {MAX_RECALL_DROP}": change.chair["recall"].value < -MAX_RECALL_DROP,
    }
    return tuple(reason for reason, holds in found.items() if holds)


AGAINST: dict[Task, Callable[[Scoreboard], tuple[str, ...]]] = {
    "captions": against_captions,
    "questions": against_questions,
}


def dev_scores(board: Scoreboard, task: Task) -> dict[str, float]:
    """The figures that a preset carries into the artifact."""
    figures: dict[str, float] = {}
    for name, prefix in (("own", ""), ("plain", "plain_"), ("other_image", "other_image_")):
        if name not in board:
            continue
        scores = board.scores(name)
        if task == "captions":
            values = {metric: scores.chair[metric].value for metric in ("chair_s", "recall", "length")}
        else:
            values = {f"{split}_accuracy": scores.pope[split]["accuracy"].value for split in SPLITS}
        figures |= {f"{prefix}{metric}": round(value, 4) for metric, value in values.items()}
    return figures
