"""Settings are judged by what they do on dev scenes, in first and in second turns, and only the own image counts."""

from __future__ import annotations

import pytest

from steering.request import SteeringRequest
from steering.settings import Preset
from tests.published_benchmarks import CocoFolders
from tests.training.witness import Invents, Witness
from training.evaluation.asking import Question, Reply
from training.evaluation.benchmark import TURNS
from training.evaluation.conditions import FORMS, OTHER_IMAGES, TASKS
from training.evaluation.miniature_benchmark import miniature_benchmark
from training.evaluation.preset_rules import FOREIGN, FORGETS, harm
from training.evaluation.tuner import (
    FIRST_LOOK,
    SEEDS,
    STARTS,
    Portion,
    SearchSettings,
    Stage,
    Tuner,
    dev_benchmark,
    grid,
    neighbours,
)
from training.miniature.world import SEED_RANGES
from training.tune_presets import choose

QUICK = SearchSettings(
    alphas=(1.0, 2.0, 4.0),
    search_captions=60,
    search_questions=60,
    final_captions=200,
    final_questions=200,
    refined=1,
    finalists=2,
)


STAGES: dict[Stage, int] = {"search": 60, "final": 200}


class DevWitness(Witness):
    """Knows the scenes of both stages."""

    def __init__(self, invents: Invents) -> None:
        benchmarks = (
            miniature_benchmark(captions=captions, questions=0, seed=SEEDS[stage], scene_range="dev")
            for stage, captions in STAGES.items()
        )
        super().__init__((scene for benchmark in benchmarks for scene in benchmark.scenes), invents)


def tuner(invents: Invents) -> Tuner:
    return Tuner(QUICK, DevWitness(invents), report=lambda line: None)


def effect(request: SteeringRequest) -> float:
    """A step of 2 helps most; what is asked of another image does nothing."""
    if not request.strength or request.control == "other_image":
        return 0.0
    return 3 - abs((request.alpha or 0) - 2)


@pytest.mark.parametrize("task", TASKS)
async def test_the_setting_that_helps_most_is_found(task):
    trial = await tuner(lambda request, seed: seed % 10 < 6 - effect(request)).best_of_form("union", task)
    assert trial.preset.alpha == 2
    assert trial.preset.form == "union"
    assert trial.against == ()
    assert trial.preset.dev_scores == trial.scores
    metric = "chair_s" if task == "captions" else "adversarial_second_turn_accuracy"
    assert trial.scores[metric] != trial.scores[f"other_image_{metric}"] == trial.scores[f"plain_{metric}"]


@pytest.mark.parametrize("task", TASKS)
async def test_what_any_image_does_as_well_may_not_become_a_preset(task):
    found = await tuner(lambda request, seed: seed % 10 < (3 if request.strength else 6)).best_of_form("union", task)
    assert found.against == (FOREIGN,)
    assert choose([found]).strength == 0


@pytest.mark.parametrize("task", TASKS)
async def test_other_images_are_several_and_pooled(task):
    """One other scene in four helps as much as the own: that is a quarter of the effect, not all or nothing."""

    def invents(request: SteeringRequest, seed: int) -> bool:
        foreign = request.control == "other_image"
        helped = bool(request.strength) and (not foreign or (request.control_seed or 0) % OTHER_IMAGES == 0)
        return seed % 10 < (0 if helped else 8)

    found = await tuner(invents).best_of_form("union", task)
    assert found.against == ()
    if task == "captions":
        assert found.scores["other_image_chair_s"] == pytest.approx(found.scores["plain_chair_s"] * 3 / 4, abs=1e-4)


@pytest.mark.parametrize("task", TASKS)
async def test_what_does_nothing_may_not_become_a_preset(task):
    found = await tuner(lambda request, seed: seed % 10 < 6).best_of_form("union", task)
    assert any("beyond its interval" in reason for reason in found.against)


async def test_in_a_final_other_images_are_asked_only_where_nothing_else_speaks_against_it():
    witness = DevWitness(lambda request, seed: seed % 10 < 6)
    await Tuner(QUICK, witness, lambda line: None).best_of_form("union", "captions")
    final = {scene.seed for scene in dev_benchmark(QUICK, Portion("captions", "final", "first", 200)).scenes}
    foreign = [asked for asked in witness.asked if asked.steering.control == "other_image"]
    assert foreign
    assert not final & {witness.scene_of(asked).seed for asked in foreign}


async def test_a_gain_in_first_turns_does_not_pay_for_a_loss_in_second_ones():
    class Deaf(DevWitness):
        def invents(self, question: Question, seed: int) -> bool:
            helped = bool(question.steering.strength) and question.steering.control is None
            if question.earlier is not None:
                return seed % 10 < (1 if helped else 0)
            return seed % 10 < (2 if helped else 6)

    witness = Deaf(lambda request, seed: False)
    found = await Tuner(QUICK, witness, lambda line: None).best_of_form("union", "questions")
    assert found.against
    assert all(reason.endswith("WORSE") and "second turn accuracy" in reason for reason in found.against), found.against
    assert choose([found]).strength == 0


async def test_a_preset_that_costs_recall_is_refused():
    class Mumbler(DevWitness):
        def says(self, question: Question) -> str:
            helped = question.steering.strength and question.steering.control is None
            return "nothing" if helped else super().says(question)

    found = await Tuner(QUICK, Mumbler(lambda request, seed: True), lambda line: None).best_of_form("union", "captions")
    assert found.against == (FORGETS,)


async def test_where_only_recall_suffers_the_step_is_made_smaller():
    class Forgetful(DevWitness):
        """Above a step of 0.8 it loses a true shape in every fourth scene."""

        def says(self, question: Question) -> str:
            steered = question.steering.strength and question.steering.control is None
            forgets = self.scene_of(question).seed % 4 == 0
            if forgets and steered and (question.steering.alpha or 0) > 0.8:
                return sorted(self.scene_of(question).truth)[0]
            return super().says(question)

    witness = Forgetful(lambda request, seed: seed % 10 < (0 if request.strength and not request.control else 6))
    settings = QUICK.model_copy(update={"alphas": (1.0,), "refined": 0})
    found = await Tuner(settings, witness, lambda line: None).best_of_form("union", "captions")
    assert found.preset.alpha == pytest.approx(0.85 * 0.85, abs=1e-3)
    assert found.against == ()


async def test_the_final_makes_the_step_larger_while_that_is_fitter():
    wrong_of_ten = {1.0: 3, 1.1: 2, 1.21: 0, 1.331: 1, 1.089: 2}

    def invents(request: SteeringRequest, seed: int) -> bool:
        return seed % 10 < (wrong_of_ten[request.alpha or 0] if request.strength and not request.control else 6)

    settings = QUICK.model_copy(update={"alphas": (1.0,), "refined": 0})
    found = await Tuner(settings, DevWitness(invents), lambda line: None).best_of_form("difference", "captions")
    assert found.preset.alpha == pytest.approx(1.21)
    assert found.against == ()


async def test_only_dev_scenes_are_seen():
    witness = DevWitness(lambda request, seed: False)
    await Tuner(QUICK, witness, lambda line: None).best_of_form("difference", "captions")
    seen = {witness.scene_of(asked).seed for asked in witness.asked}
    assert seen
    assert seen <= set(SEED_RANGES["dev"])


class Counting:
    """Answers as it is told to, by turn, and keeps no pictures."""

    def __init__(self, harmed_turns: tuple[str, ...], share: float) -> None:
        self.harmed_turns, self.share = harmed_turns, share
        self.asked = dict.fromkeys(TURNS, 0)

    async def reply(self, question: Question) -> Reply:
        turn = "first" if question.earlier is None else "second"
        steered = bool(question.steering.strength)
        self.asked[turn] += steered
        harmed = steered and turn in self.harmed_turns and self.asked[turn] % round(1 / self.share) == 0
        text = "Not sure" if harmed else "Yes"
        return Reply(text=text, applied=True, reason=None, positions=1, relative_shift=0.1)


@pytest.mark.parametrize(
    ("harmed_turns", "share", "whole"),
    [((), 1.0, ()), (("second",), 0.004, ("second",)), (("first", "second"), 0.2, ())],
    ids=["no answer changes", "some answers of one turn change", "harm is plain to see"],
)
async def test_a_first_look_spares_what_need_not_be_asked(
    harmed_turns: tuple[str, ...], share: float, whole: tuple[str, ...]
):
    settings = SearchSettings(final_questions=2 * FIRST_LOOK)
    answers = Counting(harmed_turns, share)
    board = await Tuner(settings, answers, lambda line: None).compared(Preset(alpha=1.0), "questions")
    distinct = {
        turn: len({(one.scene, one.text) for one in dev_benchmark(settings, portion).questions})
        for turn in TURNS
        for portion in [Portion("questions", "final", turn, FIRST_LOOK)]
    }
    for turn in TURNS:
        assert (answers.asked[turn] > 1.9 * distinct[turn]) == (turn in whole)
        assert answers.asked[turn] >= distinct[turn]
    assert bool(harm(board, "own", "questions")) == (share == 0.2)


def test_every_form_gets_the_same_budget():
    for task in TASKS:
        published, *others = ([one.model_dump(exclude={"form"}) for one in grid(f, (1.0, 2.0), task)] for f in FORMS)
        assert others == [published, published]
        assert {preset.min_answer_tokens for preset in grid("union", (1.0,), task)} == {STARTS[task][0]}


def test_neighbours_stay_in_range():
    for preset in (Preset(alpha=4, beta_up=0, beta_down=0), Preset(alpha=0.1, beta_up=1, beta_down=1)):
        for task in TASKS:
            near = [Preset.model_validate(one.model_dump()) for one in neighbours(preset, task)]
            assert {one.min_answer_tokens for one in near} == {None, *STARTS[task]}


def test_presets_are_tuned_on_pictures_that_the_final_does_not_share(coco: CocoFolders):
    tuning = SearchSettings(
        benchmark="coco",
        annotations=coco.annotations,
        images=coco.images,
        coco_split="val2014",
        question_suffix="One word.",
        search_captions=2,
        search_questions=4,
        final_captions=3,
        final_questions=6,
    )
    for task in TASKS:
        amounts = {"search": {"captions": 2, "questions": 4}, "final": {"captions": 3, "questions": 6}}
        search, final = (
            dev_benchmark(tuning, Portion(task, stage, "first", amounts[stage][task])) for stage in ("search", "final")
        )
        assert (len(search.scenes), len(final.scenes)) == (2, 3)
        assert not {scene.name for scene in search.scenes} & {scene.name for scene in final.scenes}
        assert (search.captions, bool(search.questions)) == ((2, False) if task == "captions" else (0, True))
        assert all(one.text.endswith("? One word.") for one in final.questions)
