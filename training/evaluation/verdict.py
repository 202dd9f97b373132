"""What the numbers mean, in sentences. Knows scores only.

An effect counts where its whole interval lies on one side of zero, and 'no harm' where it lies on one side of a margin
(`training.evaluation.non_inferiority`). The rule that matters most (design, section 8):
an effect that `other_image` also has is not alignment.
"""

from __future__ import annotations

from collections.abc import Mapping

from training.evaluation.conditions import CONTROLS, FORMS
from training.evaluation.non_inferiority import MAX_RECALL_DROP, WORSE, judge, judge_captions, judge_questions
from training.evaluation.paired_bootstrap import Interval
from training.evaluation.scores import Scoreboard, is_zero

NOT_ALIGNMENT = "An effect that other_image also has is not alignment"


def verdict(board: Scoreboard) -> list[str]:
    """One sentence or two per question that a reader should ask; conditions that were not run are passed over."""
    if "plain" not in board:
        return ["Nothing can be said without the condition plain."]
    lines: list[str] = []
    if board.scores("plain").chair:
        for name in ("steered", "default"):
            if name in board:
                lines += _captions(board, name)
        lines += _forms(board)
    if board.scores("plain").questions:
        if "default" in board:
            lines += _default_questions(board)
        if "steered" in board:
            lines += _steered_questions(board)
    return lines


def _captions(board: Scoreboard, name: str) -> list[str]:
    plain, own = board.scores("plain").chair["chair_s"], board.scores(name).chair["chair_s"]
    change = board.difference(name, "plain").chair
    if is_zero(change):
        return [f"{name}: captions score exactly as plain's do (CHAIR_s {plain.value:.3f}): nothing was steered."]
    if not change["chair_s"].below():
        grown = " It RAISES it." if change["chair_s"].above() else ""
        judged = "; ".join(f"{what} {found.told}" for what, found in judge_captions(change).items())
        return [
            f"{name}: CHAIR_s {own.value:.3f} is NOT below plain's {plain.value:.3f} "
            f"(difference {_show(change['chair_s'])}).{grown} {judged}."
        ]
    cut = 1 - own.value / plain.value
    lines = [
        f"{name}: lowers CHAIR_s from {plain.value:.3f} to {own.value:.3f}, by {cut:.0%} "
        f"(difference {_show(change['chair_s'])}); that is {'at least' if cut >= 0.5 else 'LESS THAN'} half."
    ]
    lines.append(_recall(name, change["recall"]))
    lines.append(_length(name, change))
    if name == "steered":
        lines += [_beyond(board, control) for control in CONTROLS if control in board]
        lines += _reversed_and_foreign(board)
    return lines


def _recall(name: str, change: Interval) -> str:
    kept = judge(change, MAX_RECALL_DROP, ask_more="captions")
    return f"{name}: recall changes by {_show(change)}, allowed is a drop of {MAX_RECALL_DROP}: {kept.told}."


def _length(name: str, change: Mapping[str, Interval]) -> str:
    if not change["length"].below():
        return f"{name}: captions are not shorter ({_show(change['length'])} words)."
    said = f"{name}: captions are {-change['length'].value:.1f} words shorter"
    fewer, fewer_invented = -change["objects"].value, -change["invented"].value
    if fewer <= 0:
        return f"{said}, yet name no fewer objects."
    share = min(1.0, max(0.0, fewer_invented / fewer))
    said += f" and name {fewer:.2f} objects fewer, of which {share:.0%} were invented"
    return said + (
        ": the shortening is the missing inventions." if share >= 0.8 else ": part of the effect is MERELY SAYING LESS."
    )


def _beyond(board: Scoreboard, control: str) -> str:
    gap = board.difference("steered", control).chair["chair_s"]
    if gap.below():
        return f"steered: the effect is beyond {control} (difference {_show(gap)})."
    tail = f" {NOT_ALIGNMENT}." if control == "other_image" else ""
    return f"steered: the effect is NOT beyond {control} (difference {_show(gap)}).{tail}"


def _reversed_and_foreign(board: Scoreboard) -> list[str]:
    lines = []
    if "reversed" in board:
        change = board.difference("reversed", "plain").chair["chair_s"]
        worse = "is worse than plain, as it should be" if change.above() else "is NOT worse than plain"
        lines.append(f"reversed: {worse} ({_show(change)}).")
    if "other_image" in board:
        foreign = board.difference("other_image", "plain").chair["chair_s"]
        own = board.difference("steered", "plain").chair["chair_s"]
        if foreign.below():
            lines.append(
                f"other_image: lowers CHAIR_s too ({_show(foreign)}), {foreign.value / own.value:.0%} of what the own "
                f"image does. {NOT_ALIGNMENT}: only the rest is."
            )
        else:
            lines.append(f"other_image: does not lower CHAIR_s ({_show(foreign)}): the effect needs the own image.")
    return lines


def _forms(board: Scoreboard) -> list[str]:
    """The forms by CHAIR_s at an allowed recall."""
    lines = []
    for form in FORMS:
        if form in board:
            change = board.difference(form, "plain").chair
            lines.append(f"{form}: CHAIR_s {_show(change['chair_s'])}, recall {_show(change['recall'])} against plain.")
    return lines


def _default_questions(board: Scoreboard) -> list[str]:
    """What everybody gets must be shown to harm nothing."""
    change = board.difference("default", "plain").questions
    if all(is_zero(metrics) for metrics in change.values()):
        return ["default: no question is answered worse: every score is plain's own, since no answer was changed."]
    judged = judge_questions(change)
    told = [f"{what} {_show(change[what]['accuracy'])} {found.told}" for what, found in judged.items()]
    harmless = all(found.passed for found in judged.values())
    claim = "harms no question" if harmless else "is NOT SHOWN to harm no question"
    if any(found.told == WORSE for found in judged.values()):
        claim = "HARMS questions"
    return [f"default: {claim}: accuracy {'; '.join(told)}."]


def _steered_questions(board: Scoreboard) -> list[str]:
    change = board.difference("steered", "plain")
    if all(is_zero(metrics) for metrics in change.questions.values()):
        return [
            "steered: questions score exactly as plain's do: the preset is off, or they end before steering begins."
        ]
    lines = []
    for what, found in judge_questions(change.questions).items():
        accuracy = change.questions[what]["accuracy"]
        effect = "better" if accuracy.above() else found.told
        lines.append(f"steered, {what} questions: accuracy {effect} ({_show(accuracy)}).")
    return lines + _beyond_other_images(board)


def _beyond_other_images(board: Scoreboard) -> list[str]:
    if "other_image" not in board:
        return []
    gained, gaps = (board.difference("steered", other).questions for other in ("plain", "other_image"))
    lines = []
    for what in (what for what in gained if what.startswith("adversarial") and gained[what]["accuracy"].above()):
        gap = gaps[what]["accuracy"]
        beyond = "is beyond" if gap.above() else "is NOT beyond"
        tail = "" if gap.above() else f" {NOT_ALIGNMENT}."
        lines.append(f"steered, {what} questions: the gain {beyond} other_image ({_show(gap)}).{tail}")
    return lines


def _show(change: Interval) -> str:
    return f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
