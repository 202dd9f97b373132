"""The demo: what it shows, and the whole of it against a real service."""

import subprocess
import sys
from pathlib import Path

import pytest

from steering.settings import Preset
from training.evaluation.conditions import TunedPresets
from training.miniature.demo import ROOT, mark_invented, questions_about, steering_on
from training.miniature.world import scenes


def test_invented_shapes_are_marked():
    scene = next(scenes("demo", absent_partner=True))
    there, invented = scene.objects[0].shape, scene.absent_partners[0]
    marked = mark_invented(f"There is a {there} in red, a {invented} in blue.", scene)
    assert marked == f"There is a {there} in red, a >>{invented.upper()}<< in blue."


def test_questions_ask_for_something_there_something_not_and_a_partner():
    scene = next(scenes("demo", absent_partner=True))
    there, absent, partner = questions_about(scene)
    assert there in scene.shapes
    assert absent not in scene.shapes
    assert partner in scene.absent_partners


def test_steering_on_is_never_a_preset_that_is_off():
    on, off = Preset(alpha=2), Preset(strength=0)
    both, one, none = (
        TunedPresets(presets={"captions": first, "questions": second})
        for first, second in ((on, on), (on, off), (off, off))
    )
    assert steering_on(both, "questions")[0] == {"enabled": True, "preset": "questions"}
    assert steering_on(one, "questions")[0] == {"enabled": True, "preset": "captions"}
    assert steering_on(none, "questions")[0]["strength"] == 1


@pytest.mark.service
@pytest.mark.slow
def test_the_whole_demo(tiny_llava: Path, tiny_artifact: Path):
    command = [sys.executable, "-m", "training.miniature.demo", "--pictures", "1"]
    command += ["--model", str(tiny_llava), "--artifact", str(tiny_artifact)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert '"applied": true' in done.stdout
    assert "invented objects   off" in done.stdout


@pytest.mark.service
def test_a_service_that_cannot_start_is_a_failure(tmp_path: Path, tiny_artifact: Path):
    command = [
        sys.executable,
        "-m",
        "training.miniature.demo",
        "--model",
        str(tmp_path),
        "--artifact",
        str(tiny_artifact),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "is not a checkpoint folder" in done.stderr
    assert "FAILED: the service ended with status 2" in done.stderr
