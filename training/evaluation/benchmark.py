"""What a benchmark is: pictures, what is asked about them, and how captions are judged. Knows no world and no model.

Pictures are read when they are asked about and not kept: thousands of photographs need not fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from PIL.Image import Image

from training.pope import SPLITS, Split

Turn = Literal["first", "second"]
"""When a question is asked: with the picture, or after a first turn in which the picture was described, truly."""
TURNS: tuple[Turn, ...] = get_args(Turn)


def nothing_mentioned(caption: str) -> list[str]:
    """For a benchmark that asks for no captions."""
    return []


@dataclass(frozen=True, kw_only=True)
class BenchmarkScene:
    """A picture and what is truly on it."""

    name: str
    """What a report calls it: a file's name, or the seed it was drawn from."""
    seed: int
    """Seeds what a control draws for this picture; different pictures should have different ones."""
    read: Callable[[], Image]
    """Gives the RGB picture, the same pixels each time."""
    truth: frozenset[str] = frozenset()
    """The objects on it; needed for captions only."""
    caption: str | None = None
    """A true one, where there is one."""

    @property
    def image(self) -> Image:
        """The picture, read now."""
        return self.read()


@dataclass(frozen=True, kw_only=True)
class BenchmarkQuestion:
    """A yes/no question about a scene, in the words in which it is asked."""

    split: Split
    scene: int
    """Index into the benchmark's scenes."""
    text: str
    truth: bool
    """Whether the true answer is yes."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Everything that is asked, and how answers are judged."""

    name: str
    scenes: tuple[BenchmarkScene, ...]
    captions: int = 0
    """The first so many scenes are captioned."""
    questions: tuple[BenchmarkQuestion, ...] = ()
    caption_prompt: str = ""
    mentions: Callable[[str], list[str]] = nothing_mentioned
    """The objects that a caption names, in order and with repetitions, in the vocabulary of `BenchmarkScene.truth`."""
    caption_max_tokens: int
    answer_max_tokens: int
    turns: tuple[Turn, ...] = ("first",)
    """In which turns each question is asked; a second one needs the scenes' true captions."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """sha256 of each file that the questions and the truth were read from, by its name."""

    def before_question(self, scene: int, turn: Turn) -> tuple[str, str] | None:
        """What is asked and answered before a question about a scene."""
        if turn == "first":
            return None
        caption = self.scenes[scene].caption
        assert caption is not None, "a second turn needs true captions"
        return (self.caption_prompt, caption)

    def with_suffix(self, suffix: str) -> Benchmark:
        """The same with `suffix` after each question, a space before it."""
        return replace(self, questions=tuple(replace(one, text=f"{one.text} {suffix}") for one in self.questions))

    def part(self, *, scenes: int, turn: Turn) -> Benchmark:
        """The questions of one turn about the first so many scenes."""
        asked = tuple(question for question in self.questions if question.scene < scenes)
        return replace(self, captions=0, questions=asked, turns=(turn,))

    @property
    def question_scenes(self) -> int:
        """The first so many scenes are asked about."""
        return 1 + max((question.scene for question in self.questions), default=-1)

    @property
    def splits(self) -> tuple[Split, ...]:
        """The POPE splits of which there are questions."""
        asked = {question.split for question in self.questions}
        return tuple(split for split in SPLITS if split in asked)
