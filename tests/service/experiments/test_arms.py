"""What an operator may write, and that a wrong experiment is refused whole, by name, with the old one in force."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from service.experiments.arms import Experiment, over_default
from service.live_settings import LiveSettings
from service.settings import BUNDLED_ARTIFACT, BUNDLED_MODEL, EngineSettings, Settings, SettingsError
from steering.request import SteeringRequest

BUNDLED = Settings(model=str(BUNDLED_MODEL), artifact=str(BUNDLED_ARTIFACT), allow_anonymous=True)
ONE_BRANCH = EngineSettings(name="vllm", device="cpu", branches=1)
TWO_ARMS = [
    {"name": "control", "weight": 0.5},
    {"name": "half", "weight": 0.5, "steering": {"preset": "captions", "strength": 0.5}},
]
GOOD = {"name": "strength", "salt": "1", "coverage": 0.5, "arms": TWO_ARMS}


def arms(*weights: float, **of_last) -> dict[str, Any]:
    """GOOD with other arms."""
    made: list[dict[str, Any]] = [{"name": f"arm{index}", "weight": weight} for index, weight in enumerate(weights)]
    made[-1] |= of_last
    return {**GOOD, "arms": made}


@pytest.mark.parametrize(
    ("experiment", "says"),
    [
        (arms(0.5, 0.6), "arms: the weights sum to 1.1; they must sum to 1"),
        (arms(0.33, 0.33, 0.33), "the weights sum to 0.99"),
        (arms(0.5, 0.5, name="arm0"), "the name 'arm0' stands twice"),
        (arms(1.0), "two are needed"),
        (arms(1.0, 0.0), "arms.1.weight: .*greater than 0"),
        (arms(0.5, 0.5, weight=float("nan")), "arms.1.weight"),
        (arms(0.5, 0.5, name="own"), "arms.1.name: .*means something else"),
        (arms(0.5, 0.5, name="a b"), "arms.1.name: .*pattern"),
        (arms(0.5, 0.5, artifact="/other"), "arms.1.artifact: .*pattern"),
        (arms(0.5, 0.5, artifact="next"), "arms: arm1: candidate 'next': no application .*; loaded: main"),
        ({**GOOD, "shadow": {"artifact": "next", "share": 0.1}}, "shadow: candidate 'next': no application"),
        (arms(0.5, 0.5, steering={"preset": "captoins"}), "arms: arm1: .*preset 'captoins' is unknown; known: "),
        (arms(0.5, 0.5, steering={"strength": 2}), "arms.1.steering.strength: .*less than or equal to 1"),
        (arms(0.5, 0.5, steering={"strenght": 1}), "arms.1.steering.strenght"),
        (arms(0.5, 0.5, steering={"control": "random"}), "control: is not for arms"),
        (arms(0.5, 0.5, steering={"explain": True}), "explain: is not for arms"),
        (arms(*[1 / 11] * 11), "arms: .*at most 10"),
        ({**GOOD, "coverage": 1.5}, "coverage: .*less than or equal to 1"),
        ({**GOOD, "salt": "s" * 65}, "salt: .*at most 64"),
        ({**GOOD, "shadow": {"steering": {"preset": "nowhere"}, "share": 0.1}}, "shadow: .*preset 'nowhere'"),
        ({**GOOD, "shadow": {"steering": {}, "share": 0}}, "shadow.share: .*greater than 0"),
        ({"arms": TWO_ARMS}, "name: .*required"),
        ("strength", "must be a JSON object"),
        ({**GOOD, "arms": TWO_ARMS[::-1]}, "name or salt must change"),
        ({**GOOD, "arms": arms(0.9, 0.1)["arms"]}, "changed weights or arms are a new experiment: name or salt must"),
    ],
)
def test_a_wrong_experiment_leaves_the_one_before_in_force(
    experiment: Any, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    live = LiveSettings(BUNDLED)
    live.change({"experiment": GOOD})
    before = live.current
    assert before.experiment is not None
    with caplog.at_level(logging.ERROR, "service.live_settings"):
        live.change({"experiment": experiment, "max_choices": 2})
    assert live.current is before
    told = live.describe()
    assert told["changed"] == {"experiment": GOOD}, "the one in force"
    assert re.search(says, told["refused"]), told["refused"]
    assert told["refused"].startswith("experiment")
    assert told["refused"] in caplog.text


@pytest.mark.parametrize("steering", [{"gamma": 0.5}, {"plausibility": 0.1}, {"preset": "questions", "gamma": 0.5}])
def test_an_arm_that_needs_two_branches_is_refused_by_an_engine_with_one(steering: dict) -> None:
    wrong = arms(0.5, 0.5, steering={"preset": "captions", **steering, "strength": 1.0, "alpha": 1.0})
    live = LiveSettings(BUNDLED.model_copy(update={"engine": ONE_BRANCH}))
    live.change({"experiment": wrong})
    assert "arms: arm1: gamma and plausibility need two branches" in live.describe()["refused"]
    assert live.current.experiment is None
    both = LiveSettings(BUNDLED)
    both.change({"experiment": wrong})
    assert both.describe()["refused"] is None


def test_an_arm_needs_a_mode_that_the_engine_has() -> None:
    live = LiveSettings(BUNDLED.model_copy(update={"engine": ONE_BRANCH}))
    live.change({"experiment": arms(0.5, 0.5, steering={"preset": "captions", "mode": "exact"})})
    assert "mode 'exact' is not vllm's" in live.describe()["refused"]


def test_without_an_artifact_there_is_no_experiment() -> None:
    live = LiveSettings(BUNDLED.model_copy(update={"steering": "off"}))
    live.change({"experiment": GOOD})
    assert "experiment: arms: control: steering is off" in live.describe()["refused"]


def test_what_may_change_under_one_name() -> None:
    """Coverage and steering may; weights not even after the experiment has been away."""
    live = LiveSettings(BUNDLED)
    live.change({"experiment": GOOD})
    live.change({"experiment": {**GOOD, "coverage": 0.9}})
    assert live.current.experiment is not None
    assert live.current.experiment.coverage == 0.9
    live.change({})
    assert live.current.experiment is None
    live.change({"experiment": arms(0.9, 0.1)})
    assert "name or salt must change" in live.describe()["refused"]
    live.change({"experiment": {**arms(0.9, 0.1), "salt": "2"}})
    assert live.describe()["refused"] is None
    assert live.current.experiment is not None
    assert live.current.experiment.seed == "2"


def test_one_of_the_start_is_held_to_the_same() -> None:
    text = json.dumps({**GOOD, "arms": arms(0.5, 0.5, steering={"preset": "nowhere"})["arms"]})
    wrong = Settings.model_validate({**BUNDLED.model_dump(), "experiment": text})
    with pytest.raises(SettingsError, match=r"experiment: arms: arm1: .*preset 'nowhere'"):
        LiveSettings(wrong)


def test_an_arm_stands_over_the_server_s_default() -> None:
    default = SteeringRequest(preset="questions", strength=0.75)
    asked = over_default(SteeringRequest(alpha=1.5), default, arm="a")
    assert (asked.settings.preset, asked.settings.strength, asked.settings.alpha) == ("questions", 0.75, 1.5)
    named = over_default(SteeringRequest(preset="captions"), default, arm="a")
    assert (named.settings.preset, named.settings.strength) == ("captions", None), (
        "that strength was for another preset"
    )
    assert (named.arm, named.explicit) == ("a", False), "nobody insists: without an image the answer is plain"


def test_it_survives_its_own_json() -> None:
    found = Experiment.model_validate(GOOD)
    assert Experiment.model_validate(found.model_dump()) == found
    assert Experiment.model_validate_json(found.model_dump_json()) == found


def test_the_experiment_on_the_page_is_one() -> None:
    page = (Path(__file__).parents[3] / "service/README.md").read_text()
    (block,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    live = LiveSettings(BUNDLED)
    live.change(json.loads(block))
    assert live.describe()["refused"] is None
    assert live.current.experiment is not None
