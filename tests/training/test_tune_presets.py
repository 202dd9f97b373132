"""Presets are chosen by what settings do on dev scenes, and only where the own image matters."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from steering.artifact import load_artifact
from steering.artifact_config import read_config, write_config
from steering.request import SteeringRequest
from steering.settings import Preset
from training.evaluation.asking import Question, Reply
from training.evaluation.conditions import FORMS, TASKS, form_preset_key
from training.evaluation.miniature_benchmark import miniature_benchmark
from training.evaluation.preset_rules import alignment_gate
from training.miniature.language import shapes_named
from training.miniature.world import SEED_RANGES, SHAPES
from training.tune_presets import SEEDS, Tuner, TuningSettings, choose, choose_default, grid, neighbours, tune

QUICK = TuningSettings(
    search_captions=60, search_questions=60, final_captions=200, final_questions=200, refined=1, finalists=2
)


class Witness:
    """Invents where `invents` says so, given what was asked of steering and the scene's seed."""

    def __init__(self, invents: Callable[[SteeringRequest, int], bool]) -> None:
        self._invents = invents
        self.scene_seeds: set[int] = set()
        self._scenes = {
            scene.image.tobytes(): scene
            for seed, captions in ((SEEDS["search"], 60), (SEEDS["final"], 200))
            for scene in miniature_benchmark(captions=captions, questions=0, seed=seed, scene_range="dev").scenes
        }

    async def reply(self, question: Question) -> Reply:
        scene = self._scenes[question.image.tobytes()]
        self.scene_seeds.add(scene.seed)
        lies = self._invents(question.steering, scene.seed)
        if question.text.startswith("Is there"):
            text = "Yes" if lies or shapes_named(question.text) & scene.truth else "No"
        else:
            text = " ".join(sorted(scene.truth) + sorted(set(SHAPES) - scene.truth)[: int(lies)])
        return Reply(text=text, applied=True, reason=None, positions=1, relative_shift=0.1)


def tuner(invents: Callable[[SteeringRequest, int], bool]) -> Tuner:
    return Tuner(QUICK, Witness(invents), report=lambda line: None)


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
    metric = "chair_s" if task == "captions" else "adversarial_accuracy"
    assert trial.scores[metric] != trial.scores[f"other_image_{metric}"] == trial.scores[f"plain_{metric}"]


@pytest.mark.parametrize("task", TASKS)
async def test_what_any_image_does_as_well_may_not_become_a_preset(task):
    found = await tuner(lambda request, seed: seed % 10 < (3 if request.strength else 6)).best_of_form("union", task)
    assert found.against == ("another scene's image does as well: not alignment",)
    assert choose([found]).strength == 0


@pytest.mark.parametrize("task", TASKS)
async def test_what_does_nothing_may_not_become_a_preset(task):
    found = await tuner(lambda request, seed: seed % 10 < 6).best_of_form("union", task)
    assert any("beyond its interval" in reason for reason in found.against)


async def test_a_preset_that_costs_recall_is_refused():
    class Mumbler(Witness):
        async def reply(self, question: Question) -> Reply:
            reply = await super().reply(question)
            helped = question.steering.strength and question.steering.control is None
            return Reply(text="nothing", applied=True, reason=None, positions=1, relative_shift=0) if helped else reply

    found = await Tuner(QUICK, Mumbler(lambda request, seed: True), lambda line: None).best_of_form("union", "captions")
    assert found.against == ("recall may drop by more than 0.02",)


async def test_where_only_recall_suffers_the_step_is_made_smaller():
    class Forgetful(Witness):
        """Above a step of 0.8 it loses a true shape in every fourth scene."""

        async def reply(self, question: Question) -> Reply:
            reply = await super().reply(question)
            steered = question.steering.strength and question.steering.control is None
            forgets = self._scenes[question.image.tobytes()].seed % 4 == 0
            if forgets and steered and (question.steering.alpha or 0) > 0.8:
                return Reply(text=reply.text.split()[0], applied=True, reason=None, positions=1, relative_shift=0)
            return reply

    witness = Forgetful(lambda request, seed: seed % 10 < (0 if request.strength and not request.control else 6))
    settings = QUICK.model_copy(update={"alphas": (1.0,), "refined": 0})
    found = await Tuner(settings, witness, lambda line: None).best_of_form("union", "captions")
    assert found.preset.alpha == pytest.approx(0.85 * 0.85, abs=1e-3)
    assert found.against == ()


async def test_only_dev_scenes_are_seen():
    witness = Witness(lambda request, seed: False)
    await Tuner(QUICK, witness, lambda line: None).best_of_form("difference", "captions")
    assert witness.scene_seeds
    assert witness.scene_seeds <= set(SEED_RANGES["dev"])


@pytest.mark.parametrize(
    ("harmed", "default"), [((), "captions"), (("captions",), "questions"), (("captions", "questions"), "off")]
)
async def test_the_default_harms_nothing(harmed: tuple[str, ...], default: str):
    presets = {"captions": Preset(alpha=2.0), "questions": Preset(alpha=3.0), "off": Preset(strength=0)}
    steps = {presets[name].alpha for name in harmed}
    deaf = tuner(lambda request, seed: bool(request.strength) and request.alpha in steps)
    assert await choose_default(deaf, presets, lambda line: None) == default


async def test_a_preset_that_is_off_is_never_the_default():
    presets = {"captions": Preset(strength=0), "questions": Preset(strength=0)}
    assert await choose_default(tuner(lambda request, seed: False), presets, lambda line: None) == "off"


def test_every_form_gets_the_same_budget():
    budgets = {form: [preset.model_dump(exclude={"form"}) for preset in grid(form, (1.0, 2.0))] for form in FORMS}
    assert budgets["published"] == budgets["difference"] == budgets["union"]


def test_neighbours_stay_in_range():
    for preset in (Preset(alpha=4, beta_up=0, beta_down=0), Preset(alpha=0.1, beta_up=1, beta_down=1)):
        assert all(Preset.model_validate(near.model_dump()) for near in neighbours(preset))


@pytest.mark.parametrize(("paired", "passed"), [(0.31, True), (0.29, False)])
def test_the_gate(paired: float, passed: bool):
    assert alignment_gate({"paired_overlap": paired, "shuffled_overlap": 0.2, "recall_at_1": 0.3})[0] is passed


def test_the_gate_needs_figures():
    with pytest.raises(ValueError, match="records no alignment"):
        alignment_gate({})


async def test_without_alignment_every_preset_is_off(tiny_artifact: Path, tiny_llava: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    config = read_config(folder)
    write_config(folder, config.model_copy(update={"alignment": {"paired_overlap": 0.2, "shuffled_overlap": 0.2}}))
    written, trials = await tune(TuningSettings(model=tiny_llava, artifact=folder), report=lambda line: None)
    assert {name: preset.strength for name, preset in written.presets.items()} == {
        "off": 0,
        "captions": 0,
        "questions": 0,
    }
    assert (written.default_preset, trials) == ("off", [])
    assert load_artifact(folder).config == written


@pytest.mark.slow
async def test_a_real_tiny_model_is_tuned_and_its_artifact_still_loads(
    tiny_artifact: Path, tiny_llava: Path, tmp_path: Path
):
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    settings = TuningSettings(
        model=tiny_llava, artifact=folder, alphas=(1.0,), refined=0, finalists=1,
        search_captions=2, search_questions=2, final_captions=3, final_questions=2,
    )  # fmt: skip
    written, trials = await tune(settings, report=lambda line: None)
    assert load_artifact(folder).config == written
    assert set(written.presets) == {"captions", "questions", "off", "paper_pope", "paper_chair"}
    assert set(written.form_presets) == {form_preset_key(task, form) for task in TASKS for form in FORMS}
    assert written.presets["captions"].strength == 0  # random weights invent no shapes: there is nothing to lower
    assert sum(trial["stage"] == "final" for trial in trials) == len(TASKS) * len(FORMS)
