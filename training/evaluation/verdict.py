"""What the numbers mean, in sentences. Knows scores only.

A difference counts where its whole interval lies on one side of zero. The rule that matters most (design, section 8):
an effect that `other_image` also has is not alignment.
"""

from __future__ import annotations

from collections.abc import Mapping

from training.evaluation.conditions import CONTROLS, FORMS
from training.evaluation.paired_bootstrap import Interval
from training.evaluation.scores import Scoreboard

MAX_RECALL_DROP = 0.02
"""Share of the true objects that a steered caption may lose."""
NOTHING = Interval(0.0, 0.0, 0.0)
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
    if board.scores("plain").pope:
        if "default" in board:
            lines += _default_questions(board)
        if "steered" in board:
            lines += _steered_questions(board)
    return lines


def _captions(board: Scoreboard, name: str) -> list[str]:
    plain, own = board.scores("plain").chair["chair_s"], board.scores(name).chair["chair_s"]
    change = board.difference(name, "plain").chair
    if all(interval == NOTHING for interval in change.values()):
        return [f"{name}: captions score exactly as plain's do (CHAIR_s {plain.value:.3f}): nothing was steered."]
    if not change["chair_s"].below():
        grown = " It RAISES it." if change["chair_s"].above() else ""
        return [
            f"{name}: CHAIR_s {own.value:.3f} is NOT below plain's {plain.value:.3f} "
            f"(difference {_show(change['chair_s'])}).{grown}"
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
    kept = "within" if change.value >= -MAX_RECALL_DROP else "MORE THAN"
    return f"{name}: recall changes by {_show(change)}, {kept} the allowed drop of {MAX_RECALL_DROP}."


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
    change = board.difference("default", "plain").pope
    if _is_nothing(change):
        return ["default: no POPE split is worse than plain: every score is plain's own, since no answer was changed."]
    worse = [split for split in change if change[split]["accuracy"].below()]
    if worse:
        told = "; ".join(f"{split} {_show(change[split]['accuracy'])}" for split in worse)
        return [f"default: HARMS questions beyond its interval: accuracy {told}."]
    told = "; ".join(f"{split} {_show(change[split]['accuracy'])}" for split in change)
    return [f"default: no POPE split is worse than plain beyond its interval (accuracy {told})."]


def _steered_questions(board: Scoreboard) -> list[str]:
    change = board.difference("steered", "plain").pope
    if _is_nothing(change):
        return [
            "steered: questions score exactly as plain's do: the preset is off, or they end before steering begins."
        ]
    lines = []
    for split, metrics in change.items():
        accuracy = metrics["accuracy"]
        effect = "better" if accuracy.above() else "WORSE" if accuracy.below() else "not different from plain"
        lines.append(f"steered, {split} questions: accuracy {effect} ({_show(accuracy)}).")
    gain = change["adversarial"]["accuracy"] if "adversarial" in change else NOTHING
    if gain.above() and "other_image" in board:
        gap = board.difference("steered", "other_image").pope["adversarial"]["accuracy"]
        beyond = "is beyond" if gap.above() else "is NOT beyond"
        tail = "" if gap.above() else f" {NOT_ALIGNMENT}."
        lines.append(f"steered, adversarial questions: the gain {beyond} other_image ({_show(gap)}).{tail}")
    return lines


def _is_nothing(by_split: Mapping[str, Mapping[str, Interval]]) -> bool:
    return all(interval == NOTHING for change in by_split.values() for interval in change.values())


def _show(change: Interval) -> str:
    return f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
