"""When a setting may become a preset, and which of two is better. Knows scores, not how they came about."""

from __future__ import annotations

from collections.abc import Callable

from training.evaluation.benchmark import Turn
from training.evaluation.conditions import Task
from training.evaluation.non_inferiority import MAX_RECALL_DROP, judge, judge_captions, judge_questions
from training.evaluation.paired_bootstrap import Interval
from training.evaluation.scores import Scoreboard, as_field

FORGETS = f"recall may drop by more than {MAX_RECALL_DROP}"
FOREIGN = "other scenes' images do as well: not alignment"
FREE_RECALL_DROP = 0.25 * MAX_RECALL_DROP
"""Of recall: nobody would notice one object in two hundred."""
FOREIGN_SHARE = 0.1
"""Of an effect: what other images may have of it before that counts against a setting."""


def caption_fitness(board: Scoreboard) -> float:
    """CHAIR_s; recall that is lost weighs five times as much, an object named again a quarter (four of them are as bad
    as a caption with an invention), and what other images take away without being the picture is no merit."""
    own, plain = board.scores("own").chair, board.scores("plain").chair
    lost = plain["recall"].value - own["recall"].value - FREE_RECALL_DROP
    repeats = own["repeated"].value - plain["repeated"].value
    fitness = own["chair_s"].value + 5 * max(0.0, lost) + 0.25 * max(0.0, repeats)
    if "other_image" in board:
        foreign = plain["chair_s"].value - board.scores("other_image").chair["chair_s"].value
        gained = plain["chair_s"].value - own["chair_s"].value
        fitness += max(0.0, foreign - FOREIGN_SHARE * gained)
    return fitness


def question_fitness(board: Scoreboard) -> float:
    """Wrong answers to adversarial questions, mean over turns; what the other splits lose counts too."""
    own, plain = board.scores("own"), board.scores("plain")
    wrong = []
    for turn, by_split in own.by_turn.items():
        before = plain.by_turn[turn]
        lost = [before[split]["accuracy"].value - by_split[split]["accuracy"].value for split in ("random", "popular")]
        wrong.append(1 - by_split["adversarial"]["accuracy"].value + sum(max(0.0, loss) for loss in lost))
    return sum(wrong) / len(wrong)


FITNESS: dict[Task, Callable[[Scoreboard], float]] = {"captions": caption_fitness, "questions": question_fitness}


def against_captions(board: Scoreboard) -> tuple[str, ...]:
    """What forbids the preset `captions`; the board holds plain, own and, if that is to be judged, other_image."""
    change = board.difference("own", "plain").chair
    found = {
        "CHAIR_s is not below plain beyond its interval": not change["chair_s"].below(),
        FORGETS: not judge(change["recall"], MAX_RECALL_DROP).passed,
        FOREIGN: "other_image" in board and not board.difference("own", "other_image").chair["chair_s"].below(),
    }
    return tuple(reason for reason, holds in found.items() if holds)


def against_questions(board: Scoreboard) -> tuple[str, ...]:
    """What forbids the preset `questions`; the board holds plain, own and, if that is to be judged, other_image.

    It must answer adversarial questions better in some turn, and there better than with other images; and nothing may
    be worse by more than the margin, in no split and no turn.
    """
    asked = list(board.scores("own").by_turn)
    better: list[Turn] = [turn for turn in asked if _adversarial(board, "plain", turn).above()]
    found = {
        "adversarial accuracy is not above plain beyond its interval": not better,
        FOREIGN: "other_image" in board
        and not any(_adversarial(board, "other_image", turn).above() for turn in better or asked),
    }
    return (*(reason for reason, holds in found.items() if holds), *harm(board, "own", "questions"))


def _adversarial(board: Scoreboard, other: str, turn: Turn) -> Interval:
    """What the own condition gains on another in accuracy."""
    return board.difference("own", other).by_turn[turn]["adversarial"]["accuracy"]


def harm(board: Scoreboard, name: str, task: Task) -> tuple[str, ...]:
    """What a preset that everybody gets is not shown to leave unharmed."""
    change = board.difference(name, "plain")
    judged = judge_questions(change.questions) if task == "questions" else judge_captions(change.chair)
    subject = " accuracy" if task == "questions" else ""
    return tuple(f"{what}{subject}: {judgement.told}" for what, judgement in judged.items() if not judgement.passed)


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
            values = {metric: scores.chair[metric].value for metric in ("chair_s", "recall", "length", "repeated")}
        else:
            values = {
                f"{as_field(asked)}_accuracy": metrics["accuracy"].value for asked, metrics in scores.questions.items()
            }
        figures |= {f"{prefix}{metric}": round(value, 4) for metric, value in values.items()}
    return figures
