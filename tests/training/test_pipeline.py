"""`training/pipeline.sh --miniature`: every stage, up to an artifact that steers the committed LLaVA.

One run for all tests here; it takes minutes. It tunes and evaluates on fewer captions and questions than a user's does.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from steering.artifact import load_artifact
from steering.artifact_config import read_config
from training.alignment import alignment_gate
from training.evaluation.conditions import FORMS, TASKS, form_preset_key
from training.miniature.label_quality import label_quality

REPOSITORY = Path(__file__).parents[2]
PIPELINE = REPOSITORY / "training" / "pipeline.sh"

SHORTER = {
    "TUNE": "--alphas 2.5 --search-captions 40 --search-questions 30 --refined 0 --finalists 1 --final-captions 100"
    " --final-questions 100",
    "EVALUATE": "--captions 200 --questions 60 --conditions steered default other_image",
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run_pipeline(*options: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **variables}
    return subprocess.run([str(PIPELINE), *options], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    finished = run_pipeline("--miniature", "--output", str(folder), **SHORTER)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return folder


def test_the_artifact_is_whole_aligned_and_faithful(output: Path) -> None:
    artifact = load_artifact(output / "artifact")
    passed, figures = alignment_gate(artifact.config.alignment, artifact.config.faithfulness)
    assert passed, figures
    assert artifact.config.faithfulness["cross_entropy_recovered"] > 0.9
    assert len(artifact.canary.images) == 4
    assert sum(bool(concept["label"]) for concept in artifact.concepts) > 100


def test_it_has_a_preset_for_each_task_and_form_and_those_of_the_paper(output: Path) -> None:
    config = read_config(output / "artifact")
    assert set(config.presets) == {"captions", "questions", "off", "paper_pope", "paper_chair"}
    assert set(config.form_presets) == {form_preset_key(task, form) for task in TASKS for form in FORMS}


def test_it_steers_this_miniature_away_from_inventions_and_leaves_answers_alone(output: Path) -> None:
    report = json.loads((output / "evaluation.json").read_text())
    assert read_config(output / "artifact").default_preset == "captions"
    changed = report["differences"]["default_minus_plain"]
    assert changed["chair_s"]["high"] < 0, changed["chair_s"]
    for turn in ("pope", "pope_second_turn"):
        assert {split["accuracy"]["value"] for split in changed[turn].values()} == {0.0}
    assert report["differences"]["steered_minus_other_image"]["chair_s"]["high"] < 0


def test_the_concepts_are_named_after_what_is_in_the_pictures(output: Path) -> None:
    lines = (output / "concepts" / "concepts.jsonl").read_text(encoding="utf-8").split("\n")
    scores = label_quality([json.loads(line) for line in lines if line])
    assert scores["difference"]["shown"].low > 0.1, scores
    assert scores["difference"]["told"].low > 0.1, scores


def test_what_is_made_is_not_made_again(output: Path) -> None:
    """Going on from a finished collection and finished trainings: nothing is written."""
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors") if "artifact" not in path.parts}
    again = run_pipeline("--miniature", "--output", str(output), TUNE="", EVALUATE="", INTERPRET="--pairs none")
    assert "is complete: 6,000 pairs" in again.stdout, again.stdout + again.stderr
    assert "--clip judges pictures" in again.stderr, "it got past both trainings, to a stage that refuses its options"
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--pairs", "x"], "--model"),
        (["--miniature", "--layer"], "--layer needs a value"),
        (["--minature"], "unknown option --minature"),
    ],
)
def test_a_mistake_is_named(options: list[str], named: str) -> None:
    finished = run_pipeline(*options)
    assert finished.returncode == 2
    assert named in finished.stderr
