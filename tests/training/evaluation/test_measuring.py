"""What is asked is counted exactly, and few pictures are in memory at once."""

from __future__ import annotations

import asyncio
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from steering.request import SteeringRequest
from tests.published_benchmarks import POPE_ABSENT, CocoFolders, picture_name, write_pope
from training import chair, pope
from training.errors import InvalidTraining
from training.evaluation.asking import Decoding, Question, Reply
from training.evaluation.benchmark import TURNS, Benchmark, BenchmarkScene
from training.evaluation.coco_benchmark import coco_benchmark
from training.evaluation.conditions import TASKS, Condition
from training.evaluation.measuring import Measurement, answers_key, measure
from training.evaluation.pope_benchmark import pope_benchmark

PLAIN = Condition(name="plain", requests=dict.fromkeys(TASKS, SteeringRequest(enabled=False)))


class Answers:
    """Says what it is told to, by the question's text, or one thing to all."""

    def __init__(self, says: dict[str, str] | str) -> None:
        self._says = says
        self.asked: list[Question] = []

    async def reply(self, question: Question) -> Reply:
        self.asked.append(question)
        text = self._says if isinstance(self._says, str) else self._says[question.text]
        return Reply(text=text, applied=False, reason="disabled", positions=0, relative_shift=0.0)


async def measured(benchmark: Benchmark, answers: Any, *, concurrency: int = 4) -> Measurement:
    return await measure(benchmark, PLAIN, answers, concurrency=concurrency, report=lambda line: None)


async def test_pope_counts_are_exact_by_split(coco: CocoFolders, tmp_path: Path):
    says = dict.fromkeys((f"Is there a {name} in the image?" for name in POPE_ABSENT.values()), "No, there is not.")
    says |= {"Is there a dog in the image?": "Yes", "Is there a train in the image?": "I see a wagon."}
    says["Is there a cup in the image?"] = "Yes, a cup."
    answers = Answers(says)
    counts = (await measured(pope_benchmark(write_pope(tmp_path), coco.images), answers)).counts
    assert set(counts) == set(pope.SPLITS)
    right = pope.AnswerCounts(questions=4, present=2, said_yes=1, said_yes_rightly=1, right=3, unparsed=1)
    lured = pope.AnswerCounts(questions=4, present=2, said_yes=3, said_yes_rightly=1, right=1, unparsed=1)
    for split, expected in (("random", right), ("popular", right), ("adversarial", lured)):
        total = dict(zip(pope.COUNT_NAMES, counts[split].sum(axis=0), strict=True))
        assert total == vars(expected)
        assert counts[split].shape == (2, len(pope.COUNT_NAMES))
    assert len(answers.asked) == 8  # four questions about each picture: the splits share those about what is there
    assert {question.image.size for question in answers.asked} == {(32, 24)}


async def test_caption_counts_are_exact(coco: CocoFolders):
    benchmark = coco_benchmark(coco.annotations, coco.images, captions=5)
    answers = Answers("A dog on a chair, and a cat.")
    result = await measured(benchmark, answers)
    assert set(result.counts) == {"captions"}
    total = dict(zip(chair.COUNT_NAMES, result.counts["captions"].sum(axis=0), strict=True))
    assert total == {
        "captions": 5,
        "with_invention": 5,
        "mentions": 15,
        "invented_mentions": 13,
        "true_objects": 10,
        "true_objects_named": 2,
        "objects_named": 15,
        "words": 40,
        "empty": 0,
    }
    assert {question.max_tokens for question in answers.asked} == {512}


async def test_no_more_pictures_are_in_memory_than_questions_are_on_their_way():
    alive = most = 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def read() -> Image.Image:
        nonlocal alive
        image = Image.new("RGB", (4, 4))
        weakref.finalize(image, gone)
        alive += 1
        return image

    class Slow:
        async def reply(self, question: Question) -> Reply:
            nonlocal most
            await asyncio.sleep(0)
            most = max(most, alive)
            return Reply(text="", applied=False, reason=None, positions=0, relative_shift=0.0)

    scenes = tuple(BenchmarkScene(name=str(number), seed=number, read=read) for number in range(60))
    benchmark = Benchmark(name="many", scenes=scenes, captions=60, caption_max_tokens=1, answer_max_tokens=1)
    result = await measured(benchmark, Slow(), concurrency=3)
    assert result.counts["captions"].shape == (60, len(chair.COUNT_NAMES))
    assert 1 <= most <= 5


async def test_a_picture_that_cannot_be_read_is_named(coco: CocoFolders):
    benchmark = coco_benchmark(coco.annotations, coco.images, captions=5)
    (coco.images / picture_name(285)).write_bytes(b"no picture")
    with pytest.raises(InvalidTraining, match=f"{picture_name(285)}: not a readable picture"):
        await measured(benchmark, Answers("A dog."))


async def test_a_question_is_asked_in_both_turns_and_counted_by_turn(coco: CocoFolders):
    class Tired:
        """Says no once it has described the picture."""

        async def reply(self, question: Question) -> Reply:
            text = "Yes" if question.earlier is None else "No"
            return Reply(text=text, applied=True, reason=None, positions=1, relative_shift=0.1)

    benchmark = coco_benchmark(coco.annotations, coco.images, captions=0, questions=4, turns=TURNS)
    result = await measured(benchmark, Tired())
    assert set(result.counts) == {answers_key(split, turn) for split in pope.SPLITS for turn in TURNS}
    said_yes = pope.COUNT_NAMES.index("said_yes")
    for split in pope.SPLITS:
        assert result.counts[split][:, said_yes].tolist() == [2, 2]
        assert result.counts[f"{split}, second turn"][:, said_yes].tolist() == [0, 0]
    assert result.receipts["questions"] == result.receipts["questions, second turn"]
    part = await measured(benchmark.part(scenes=1, turn="second"), Tired())
    assert {key: len(counts) for key, counts in part.counts.items()} == {
        f"{split}, second turn": 1 for split in pope.SPLITS
    }


async def test_sampling_is_seeded_by_scene_and_alike_under_every_condition(coco: CocoFolders):
    benchmark = coco_benchmark(coco.annotations, coco.images, captions=3, questions=4, turns=TURNS)
    steered = Condition(name="s", requests=dict.fromkeys(TASKS, SteeringRequest(control="random")), seeds=(0, 1))

    async def seeds(condition: Condition, decoding: Decoding) -> list[tuple[bytes, str, int | None]]:
        answers = Answers("Yes")
        await measure(benchmark, condition, answers, concurrency=2, decoding=decoding, report=lambda line: None)
        assert {question.temperature for question in answers.asked} == {decoding.temperature}
        return [(question.image.tobytes(), question.text, question.seed) for question in answers.asked]

    plain = await seeds(PLAIN, Decoding(temperature=1.0, sampling_seed=5))
    assert set(plain) == set(await seeds(steered, Decoding(temperature=1.0, sampling_seed=5)))
    assert len({seed for *_, seed in plain}) == len({(image, text) for image, text, _ in plain})
    other = await seeds(PLAIN, Decoding(temperature=1.0, sampling_seed=6))
    assert not {seed for *_, seed in plain} & {seed for *_, seed in other}
    assert {seed for *_, seed in await seeds(PLAIN, Decoding())} == {None}


async def test_answers_keep_to_their_scene_and_seed(coco: CocoFolders, tmp_path: Path):
    class ByPicture:
        async def reply(self, question: Question) -> Reply:
            red = question.image.getpixel((0, 0))[0]  # type: ignore[index]
            yes = abs(red - 42) < 6 and (question.steering.control_seed or 0) % 2 == 0
            return Reply(text="yes" if yes else "no", applied=True, reason=None, positions=1, relative_shift=0.1)

    steered = SteeringRequest(enabled=True, control="random")
    condition = Condition(name="random", requests=dict.fromkeys(TASKS, steered), seeds=(0, 1, 2))
    benchmark = pope_benchmark(write_pope(tmp_path), coco.images)
    result = await measure(benchmark, condition, ByPicture(), concurrency=2, report=lambda line: None)
    said_yes = result.counts["random"][:, pope.COUNT_NAMES.index("said_yes")]
    of_first = [condition.request("questions", seed=seed, scene_seed=benchmark.scenes[0].seed) for seed in (0, 1, 2)]
    even = sum(request.control_seed % 2 == 0 for request in of_first if request.control_seed is not None)
    assert np.array_equal(said_yes, [2 * even, 0])
    assert even in (1, 2)
