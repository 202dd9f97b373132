"""The evaluation end to end: with witnesses whose conduct is known, and with a real tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from steering.artifact_config import read_config, write_config
from steering.request import SteeringRequest
from steering.settings import Preset
from tests.training.witness import Invents, Witness
from training.evaluate_hallucination import EvaluationSettings, evaluate, make_report
from training.evaluation.asking import Question, Reply, ask_all
from training.evaluation.benchmark import TURNS
from training.evaluation.conditions import NAMES, RANDOM_SEEDS, TunedPresets, conditions
from training.evaluation.measuring import measure
from training.evaluation.miniature_benchmark import miniature_benchmark
from training.miniature.paths import ARTIFACT
from training.miniature.world import SEED_RANGES

PRESETS = {
    "captions": Preset(form="difference", alpha=2.0),
    "questions": Preset(form="union", alpha=1.0),
    "off": Preset(strength=0.0),
}


async def report_on(invents: Invents, capsys: pytest.CaptureFixture) -> dict:
    benchmark = miniature_benchmark(captions=200, questions=200, seed=7, turns=TURNS)
    witness = Witness(benchmark.scenes, invents)
    chosen = conditions(TunedPresets(presets=PRESETS))
    measured = {condition.name: await measure(benchmark, condition, witness, concurrency=8) for condition in chosen}
    report = make_report(benchmark, chosen, measured, {}, seed=0, resamples=200)
    capsys.readouterr()
    return report


def sentence(report: dict, start: str) -> str:
    found = [line for line in report["verdict"] if line.startswith(start)]
    assert found, report["verdict"]
    return found[0]


def steers(request: SteeringRequest) -> bool:
    return request.enabled is not False and request.gamma != 0


async def test_an_honest_effect_is_called_one(capsys):
    def invents(request: SteeringRequest, seed: int) -> bool:
        helped = steers(request) and request.control in (None, "none")
        return seed % 10 < (1 if helped else 9 if request.control == "reversed" else 6)

    report = await report_on(invents, capsys)
    plain, steered = report["conditions"]["plain"], report["conditions"]["steered"]
    assert plain["chair_s"]["value"] == pytest.approx(0.6, abs=0.1)
    assert steered["chair_s"]["value"] == pytest.approx(0.1, abs=0.06)
    assert plain["recall"]["value"] == steered["recall"]["value"] == 1
    gap = report["differences"]["steered_minus_plain"]["chair_s"]
    assert gap["low"] < gap["value"] < gap["high"] < 0
    assert gap["value"] == pytest.approx(steered["chair_s"]["value"] - plain["chair_s"]["value"])
    assert "at least half" in sentence(report, "steered: lowers CHAIR_s")
    assert "the shortening is the missing inventions" in sentence(report, "steered: captions are")
    for control in ("random", "reversed", "other_image"):
        assert sentence(report, f"steered: the effect is beyond {control}")
    assert "as it should be" in sentence(report, "reversed:")
    assert "needs the own image" in sentence(report, "other_image:")
    assert sentence(report, "default: harms no question")
    assert {"pope", "pope_second_turn"} < plain.keys()
    assert report["differences"]["steered_minus_plain"]["pope_second_turn"]["adversarial"]["accuracy"]["low"] > 0


async def test_an_effect_that_any_image_has_is_not_called_alignment(capsys):
    report = await report_on(
        lambda request, seed: seed % 10 < (1 if steers(request) and request.control != "reversed" else 6), capsys
    )
    assert "is NOT beyond other_image" in sentence(report, "steered: the effect is NOT beyond other_image")
    assert "An effect that other_image also has is not alignment" in sentence(report, "other_image: lowers")
    assert "100%" in sentence(report, "other_image: lowers")
    assert report["differences"]["steered_minus_other_image"]["chair_s"] == {"value": 0, "low": 0, "high": 0}


async def test_harm_is_called_harm(capsys):
    report = await report_on(lambda request, seed: seed % 10 < (8 if steers(request) else 3), capsys)
    assert "It RAISES it" in sentence(report, "steered: CHAIR_s")
    assert any(line.startswith("default: HARMS questions") for line in report["verdict"])
    assert "WORSE" in sentence(report, "steered, adversarial questions")


async def test_saying_less_is_told_apart(capsys):
    benchmark = miniature_benchmark(captions=200, questions=0, seed=7)

    class Mumbler(Witness):
        def says(self, question: Question) -> str:
            return "A star." if steers(question.steering) else super().says(question)

    witness = Mumbler(benchmark.scenes, lambda request, seed: True)
    chosen = conditions(TunedPresets(presets=PRESETS), names=("plain", "steered"))
    measured = {condition.name: await measure(benchmark, condition, witness, concurrency=8) for condition in chosen}
    report = make_report(benchmark, chosen, measured, {}, seed=0, resamples=200)
    assert "WORSE" in sentence(report, "steered: recall")
    assert "MERELY SAYING LESS" in sentence(report, "steered: captions are")


async def test_the_answers_of_all_seeds_are_pooled_by_scene():
    benchmark = miniature_benchmark(captions=3, questions=4, seed=7)
    lying = Witness(benchmark.scenes, lambda request, seed: (request.control_seed or 0) % 2 == 0)
    (condition,) = conditions(TunedPresets(presets=PRESETS), names=("random",))
    measured = await measure(benchmark, condition, lying, concurrency=4)
    assert measured.counts["captions"][:, 0].tolist() == [RANDOM_SEEDS] * 3
    assert measured.counts["adversarial"][:, 0].tolist() == [2 * RANDOM_SEEDS] * 2
    assert 0 < measured.counts["captions"][:, 1].sum() < 3 * RANDOM_SEEDS


def test_scenes_are_held_out_each_with_an_absent_partner_and_seeds_share_none():
    first, second = (miniature_benchmark(captions=50, questions=60, seed=seed) for seed in (0, 1))
    assert {scene.seed for scene in first.scenes} <= set(SEED_RANGES["held_out"])
    assert not {scene.seed for scene in first.scenes} & {scene.seed for scene in second.scenes}
    absent = {q.scene for q in first.questions if q.split == "adversarial" and not q.truth}
    assert absent == set(range(30))
    with pytest.raises(ValueError, match="must be even"):
        miniature_benchmark(captions=1, questions=3, seed=0)


async def test_the_first_failure_is_not_swallowed():
    class Broken:
        async def reply(self, question: Question) -> Reply:
            raise RuntimeError("no answer")

    benchmark = miniature_benchmark(captions=2, questions=0, seed=0)
    question = Question(
        image=benchmark.scenes[0].image, text="Describe.", max_tokens=1, steering=SteeringRequest(enabled=False)
    )
    with pytest.raises(RuntimeError, match="no answer"):
        await ask_all(Broken(), [question, question, question], total=3, concurrency=1)


@pytest.mark.slow
async def test_a_real_tiny_model_gives_a_whole_report(tiny_llava: Path, tiny_artifact: Path):
    settings = EvaluationSettings(model=tiny_llava, artifact=tiny_artifact, captions=4, questions=4, resamples=100)
    report = json.loads(json.dumps(await evaluate(settings)))
    assert tuple(report["conditions"]) == NAMES
    for name, row in report["conditions"].items():
        assert {"chair_s", "chair_i", "recall", "length", "pope"} <= row.keys()
        assert {"value", "low", "high"} == row["chair_s"].keys()
        assert {"accuracy", "precision", "recall", "f1", "yes_rate"} <= row["pope"]["adversarial"].keys()
        assert {"accuracy", "f1"} <= row["pope_second_turn"]["random"].keys()
        assert row["receipts"]["captions"]["applied"] == (0 if name in ("plain", "decoding_only") else 1)
        assert row["receipts"]["questions, second turn"]["applied"] == row["receipts"]["questions"]["applied"]
    assert report["conditions"]["decoding_only"]["examples"] == report["conditions"]["plain"]["examples"]
    assert {"steered_minus_plain", "steered_minus_other_image", "default_minus_plain"} <= report["differences"].keys()
    assert report["manifest"]["artifact"] == json.loads((tiny_artifact / "config.json").read_text())["fingerprint"]
    assert report["manifest"]["benchmark"]["scenes"] == 4


async def test_a_server_default_that_is_off_is_called_nothing(capsys):
    report = await report_on(lambda request, seed: seed % 10 < 6, capsys)
    assert "exactly as plain" in sentence(report, "default: captions score")
    assert "no answer was changed" in sentence(report, "default: no question is answered worse")
    assert "exactly as plain" in sentence(report, "steered: questions score")


@pytest.mark.slow
async def test_a_sampled_evaluation_is_repeatable_and_says_so(tiny_llava: Path, tiny_artifact: Path):
    async def captions(**changed: Any) -> list[str]:
        settings = EvaluationSettings(
            model=tiny_llava, artifact=tiny_artifact, captions=4, questions=0, resamples=100, conditions=(), **changed
        )
        report = await evaluate(settings)
        decoding = report["manifest"]["decoding"]
        assert decoding == {"temperature": changed.get("temperature", 0.0), "sampling_seed": changed["sampling_seed"]}
        return [row["caption"] for row in report["conditions"]["plain"]["examples"]]

    first = await captions(temperature=1.0, sampling_seed=1)
    assert first == await captions(temperature=1.0, sampling_seed=1)
    assert first != await captions(temperature=1.0, sampling_seed=2)
    assert await captions(sampling_seed=1) == await captions(sampling_seed=2) != first


@pytest.mark.slow
async def test_where_every_preset_is_off_an_evaluation_runs_all_the_same(
    tiny_artifact: Path, tiny_llava: Path, tmp_path: Path
):
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    config = read_config(folder)
    write_config(folder, config.model_copy(update={"presets": dict.fromkeys(config.presets, Preset(strength=0.0))}))
    report = await evaluate(
        EvaluationSettings(model=tiny_llava, artifact=folder, captions=2, questions=2, resamples=100)
    )
    assert tuple(report["conditions"]) == NAMES
    assert report["conditions"]["decoding_only"]["receipts"]["captions"]["applied"] == 0


@pytest.mark.slow
@pytest.mark.skipif(not (ARTIFACT / "config.json").exists(), reason="the miniature has not been built")
async def test_the_bundled_miniature_sees_and_invents():
    settings = EvaluationSettings(
        captions=60, questions=60, seed=9, conditions=("steered", "other_image"), resamples=200
    )
    report = await evaluate(settings)
    plain = report["conditions"]["plain"]
    assert plain["chair_s"]["value"] >= 0.25
    assert plain["recall"]["value"] >= 0.93
    assert plain["pope"]["random"]["accuracy"]["value"] >= 0.85
    assert plain["pope"]["adversarial"]["accuracy"]["value"] <= plain["pope"]["random"]["accuracy"]["value"]
    is_on = read_config(ARTIFACT).presets["captions"].strength > 0
    assert report["conditions"]["steered"]["receipts"]["captions"]["applied"] == int(is_on)
