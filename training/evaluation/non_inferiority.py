"""'Harms nothing' as a claim that a measurement can fail to support: not worse by more than a margin.

That an interval holds zero shows nothing: the interval of a few answers holds it whatever is done to them. A change is
called harmless only where the whole interval lies on the near side of the margin; where it does not, either harm is
shown or too little was asked. Knows intervals only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from training.evaluation.paired_bootstrap import Interval

ACCURACY_MARGIN = 0.01
"""One answer in a hundred: well below the several points that a preset is to gain. Half of it would take four times as
many questions."""
CHAIR_S_MARGIN = 0.02
"""Two captions in a hundred: small beside what the preset `captions` is to take away, which is half of them. 500
captions show it where one in fifty changes; where more do, more are to be asked for."""
RECALL_MARGIN = 0.01
"""Share of the true objects that captions may lose for a preset that is not for them."""
MAX_RECALL_DROP = 0.02
"""The same for a preset that is for captions: it gives something for it."""
WORSE = "WORSE"


class Judgement(NamedTuple):
    """What a change is called."""

    passed: bool
    """Whether it is shown to be harmless."""
    told: str


def judge(change: Interval, margin: float, *, less_is_better: bool = False, ask_more: str = "questions") -> Judgement:
    """`change`: a paired difference to plain. One that is exactly 0, since no answer changed, passes."""
    gain = change.negated() if less_is_better else change
    if gain.above(-margin):
        return Judgement(True, f"not worse by more than {100 * margin:g} point{'' if margin == 0.01 else 's'}")
    if gain.below():
        return Judgement(False, WORSE)
    reached = change.high if less_is_better else change.low
    return Judgement(False, f"NOT SHOWN: the interval reaches {reached:+.3f}: ask more {ask_more}")


def judge_captions(change: Mapping[str, Interval]) -> dict[str, Judgement]:
    """`change`: CHAIR's metrics minus plain's."""
    return {
        "CHAIR_s": judge(change["chair_s"], CHAIR_S_MARGIN, less_is_better=True, ask_more="captions"),
        "recall": judge(change["recall"], RECALL_MARGIN, ask_more="captions"),
    }


def judge_questions(change: Mapping[str, Mapping[str, Interval]]) -> dict[str, Judgement]:
    """`change`: POPE's metrics minus plain's by split and turn; accuracy is what is judged."""
    return {name: judge(metrics["accuracy"], ACCURACY_MARGIN) for name, metrics in change.items()}
