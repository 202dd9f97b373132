"""The presets of an artifact: what may be switched on, what everybody gets, and that the artifact stays loadable."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from steering.artifact import load_artifact
from steering.artifact_config import read_config, write_config
from steering.settings import Preset
from tests.training.witness import Invents, Witness
from training.alignment import FAITHFULNESS
from training.evaluation.asking import Question
from training.evaluation.miniature_benchmark import miniature_benchmark
from training.evaluation.tuner import SEEDS, Tuner
from training.tune_presets import TuningSettings, choose_default, tune

QUICK = TuningSettings(final_captions=200, final_questions=200)
FAITHFUL = dict.fromkeys(FAITHFULNESS, 0.1)
PRESETS = {"captions": Preset(alpha=2.0), "questions": Preset(alpha=3.0), "off": Preset(strength=0)}


class FinalWitness(Witness):
    def __init__(self, invents: Invents) -> None:
        super().__init__(
            miniature_benchmark(captions=200, questions=0, seed=SEEDS["final"], scene_range="dev").scenes, invents
        )


def tuner(invents: Invents) -> Tuner:
    return Tuner(QUICK, FinalWitness(invents), report=lambda line: None)


@pytest.mark.parametrize(
    ("harmed", "default"), [((), "captions"), (("captions",), "questions"), (("captions", "questions"), "off")]
)
async def test_the_default_harms_nothing(harmed: tuple[str, ...], default: str):
    steps = {PRESETS[name].alpha for name in harmed}
    deaf = tuner(lambda request, seed: bool(request.strength) and request.alpha in steps)
    assert await choose_default(deaf, PRESETS, lambda line: None) == default


async def test_what_harms_later_turns_only_is_no_default():
    class Tired(FinalWitness):
        def invents(self, question: Question, seed: int) -> bool:
            return question.earlier is not None and question.steering.alpha == 2.0

    told: list[str] = []
    tired = Tuner(QUICK, Tired(lambda request, seed: False), report=lambda line: None)
    assert await choose_default(tired, PRESETS, told.append) == "questions"
    assert told[0].startswith("captions cannot be the default: random, second turn accuracy: WORSE")


async def test_a_loss_that_few_questions_cannot_rule_out_is_no_default():
    """One answer in a hundred is lost: 200 questions do not show that it is not three."""
    told: list[str] = []
    rarely = tuner(lambda request, seed: request.alpha == 2.0 and seed % 50 == 0)
    assert await choose_default(rarely, PRESETS, told.append) == "questions"
    assert "NOT SHOWN: the interval reaches -0." in told[0]
    assert "ask more questions" in told[0]


async def test_a_preset_that_is_off_is_never_the_default():
    presets = {"captions": Preset(strength=0), "questions": Preset(strength=0)}
    assert await choose_default(tuner(lambda request, seed: False), presets, lambda line: None) == "off"


async def test_without_alignment_every_preset_is_off(tiny_artifact: Path, tiny_llava: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    config = read_config(folder)
    unaligned = {"paired_overlap": 0.2, "stranger_overlap": 0.2, "overlap_beyond_chance": 0.0, "pairs": 99.0}
    write_config(folder, config.model_copy(update={"alignment": unaligned, "faithfulness": FAITHFUL}))
    written, trials = await tune(TuningSettings(model=tiny_llava, artifact=folder), report=lambda line: None)
    assert {name: preset.strength for name, preset in written.presets.items()} == {
        "off": 0,
        "captions": 0,
        "questions": 0,
    }
    assert (written.default_preset, trials) == ("off", [])
    assert load_artifact(folder).config == written
