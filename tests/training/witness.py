"""A respondent whose conduct is known: it tells the truth about drawn scenes except where it is told to invent."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from steering.request import SteeringRequest
from training.evaluation.asking import Question, Reply
from training.evaluation.benchmark import BenchmarkScene
from training.miniature.language import shapes_named
from training.miniature.world import SHAPES

Invents = Callable[[SteeringRequest, int], bool]
"""Whether it invents, given what is asked of steering and the scene's seed."""


class Witness:
    """Says yes to what is not there and names a shape that is not there, where `invents` says so."""

    def __init__(self, scenes: Iterable[BenchmarkScene], invents: Invents) -> None:
        self._scenes = {scene.image.tobytes(): scene for scene in scenes}
        self._invents = invents
        self.asked: list[Question] = []

    def invents(self, question: Question, seed: int) -> bool:
        return self._invents(question.steering, seed)

    def scene_of(self, question: Question) -> BenchmarkScene:
        return self._scenes[question.image.tobytes()]

    def says(self, question: Question) -> str:
        scene = self.scene_of(question)
        invents = self.invents(question, scene.seed)
        if question.text.startswith("Is there"):
            return "Yes" if invents or shapes_named(question.text) & scene.truth else "No"
        invented = sorted(set(SHAPES) - scene.truth)[: int(invents)]
        return f"There is {', '.join(sorted(scene.truth) + invented)}."

    async def reply(self, question: Question) -> Reply:
        self.asked.append(question)
        applied = question.steering.enabled is not False
        return Reply(text=self.says(question), applied=applied, reason=None, positions=1, relative_shift=0.1)
