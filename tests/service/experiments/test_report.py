"""A report on a log as the service writes it: who is compared, what is withheld, what it says of an arm that fails."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from service.experiments import report
from service.experiments.arms import Experiment
from service.experiments.assignment import assign
from service.experiments.exposures import read_exposures
from service.experiments.statistics import difference
from service.metrics.logs import JsonLine
from service.metrics.request_record import RequestRecord, requests
from tests.service.examples import receipt

ARMS = [{"name": "whole", "weight": 0.5}, {"name": "half", "weight": 0.5, "steering": {"strength": 0.5}}]
EXPERIMENT = Experiment.model_validate({"name": "strength", "arms": ARMS})
UNITS = 400
CLIENTS = ("invalid_value", "invalid_steering")
"""Errors that the log has as a client's own."""


def log_of(
    experiment: Experiment = EXPERIMENT,
    *,
    failing: str | None = None,
    error: tuple[str, int] = ("engine_unavailable", 503),
    lost: str | None = None,
    seed: int = 0,
    own: int = 0,
    strength: float | None = None,
) -> list[str]:
    """Of so many units, one to three requests each. `failing`: an arm that errs half of the time; `lost`: one of which
    half of the units never reaches the log."""
    chance, lines = random.Random(seed), []
    for number in range(UNITS):
        for asked in range(chance.randint(1, 3)):
            assignment = assign(experiment, unit=f"key:{number}", own_steering=False)
            if assignment.label == lost and number % 2 == 0:
                continue
            record = RequestRecord(request_id="r", method="POST", route="/v1/chat/completions", assignment=assignment)
            record.status, record.duration_s, record.completion_id = 200, chance.uniform(0.1, 0.2), f"{number}-{asked}"
            if assignment.label == failing and chance.random() < 0.5:
                record.error_code, record.status = error
            else:
                record.choices, record.empty_choices = 1, 0
                record.completion_tokens = chance.randint(10, 30)
                record.time_to_first_token_s, record.finish = chance.uniform(0.01, 0.02), "stop"
                record.receipt = receipt(strength=strength or (0.5 if assignment.label == "half" else 1.0))
            lines.append(written(record.facts()))
    for _ in range(own):
        apart = assign(experiment, unit="key:own", own_steering=True)
        lines.append(written(RequestRecord(request_id="r", method="POST", status=200, assignment=apart).facts()))
    return lines


def written(facts: dict[str, object], message: str = "request") -> str:
    level = 20 if "error_code" not in facts or facts["error_code"] in CLIENTS else 30
    made = requests.makeRecord("service.requests", level, "file", 1, message, (), None, extra={"facts": facts})
    return JsonLine().format(made)


def told(lines: list[str]) -> dict:
    (one,) = read_exposures(lines)
    return report.report_on(one)


def test_two_arms_that_are_alike() -> None:
    found = told(log_of(own=7))
    assert not found["sample_ratio"]["red"]
    assert found["default"] == "whole"
    assert sum(arm["units"] for arm in found["arms"].values()) == UNITS
    assert found["units_in_two_arms"] == 0
    assert found["counted_apart"] == {"own": 7}
    assert found["arms"]["half"]["treatments"] == ["captions 0.5 of aaaaaaaaaaaa"]
    verdicts = {name: one["verdict"] for name, one in found["differences"]["half"].items()}
    assert set(verdicts.values()) <= {"not told apart", "too few units"}
    assert verdicts["feedback"] == "too few units"


def test_an_arm_that_fails_is_found() -> None:
    found = told(log_of(failing="half"))
    errors = found["differences"]["half"]["errors"]
    assert errors["verdict"] == "higher"
    assert errors["anytime"]["low"] > 0.3
    assert found["arms"]["half"]["measures"]["errors"]["value"] == pytest.approx(0.5, abs=0.06)
    assert found["arms"]["whole"]["measures"]["errors"]["value"] == 0
    assert "higher" in report.table(found)


def test_what_a_client_does_wrong_is_no_error_of_its_arm() -> None:
    own = told(log_of(failing="half", error=("invalid_value", 400)))
    assert own["arms"]["half"]["measures"]["errors"]["value"] == 0
    of_the_arm = told(log_of(failing="half", error=("invalid_steering", 400)))
    assert of_the_arm["differences"]["half"]["errors"]["verdict"] == "higher", "nobody in an arm asks for steering"


def test_verdicts_are_adjusted_for_all_that_is_compared() -> None:
    found = told(log_of(failing="half"))["differences"]["half"]
    ps = {name: one["p"] for name, one in found.items() if one["p"] is not None}
    assert len(ps) > 4
    assert all((found[name]["verdict"] in ("higher", "lower")) == (p <= 0.05) for name, p in ps.items())
    (errors,) = read_exposures(log_of(failing="half"))
    alone = difference(*(report.sample_of([one for one in errors.requests if one.arm == arm], "duration_s") for arm in
                         ("whole", "half")))  # fmt: skip
    assert alone.p is not None
    assert ps["duration_s"] == 1.0 or ps["duration_s"] > alone.p


def test_weights_that_changed_under_one_name_withhold_every_verdict() -> None:
    """An ingress that was started anew does not know of the earlier ones."""
    heavier = [{**ARMS[0], "weight": 0.6}, {**ARMS[1], "weight": 0.4}]
    found = told([*log_of(), *log_of(Experiment.model_validate({"name": "strength", "arms": heavier}), seed=1)])
    assert found["weights_changed"] == ["half", "whole"]
    verdicts = {one["verdict"] for one in found["differences"]["half"].values()}
    assert verdicts in ({report.REWEIGHTED}, {report.WITHHELD})
    assert "WEIGHT CHANGED" in report.table(found)


def test_a_red_ratio_withholds_every_verdict() -> None:
    found = told(log_of(failing="half", lost="half"))
    assert found["sample_ratio"]["red"]
    assert {one["verdict"] for one in found["differences"]["half"].values()} == {report.WITHHELD}
    assert "RED" in report.table(found)


def test_an_arm_that_nobody_saw_is_red() -> None:
    found = told([line for line in log_of() if '"half"' not in line])
    assert found["sample_ratio"]["red"]


def test_units_in_two_arms_are_counted() -> None:
    lines = log_of()
    moved = [json.loads(line) for line in lines[:5]]
    for line in moved:
        line["experiment"]["arm"] = "half" if line["experiment"]["arm"] == "whole" else "whole"
    units = {line["experiment"]["unit"] for line in moved}
    assert told([*lines, *map(json.dumps, moved)])["units_in_two_arms"] == len(units)


def test_a_new_salt_is_a_new_experiment() -> None:
    turned = Experiment.model_validate({"name": "strength", "salt": "2", "arms": ARMS})
    found = read_exposures([*log_of(), *log_of(turned)])
    assert [(one.name, one.salt) for one in found] == [("strength", "strength"), ("strength", "2")]


def test_feedback_is_joined_by_the_answer() -> None:
    lines = log_of()
    ids = [line["completion_id"] for line in map(json.loads, lines)][:9]
    scores = [written({"completion_id": one, "score": 0.25}, "feedback") for one in ids]
    (found,) = read_exposures([*lines, *scores, "not json", "[]", '{"message": "live settings"}'])
    assert [one.values["feedback"] for one in found.requests if "feedback" in one.values] == [0.25] * 9


def test_shadows_are_summed_up() -> None:
    known = {"name": "strength", "salt": "strength", "arm": "whole"}
    facts = {"experiment": known, "greedy": True, "shown_tokens": 10}
    seen = [
        written({**facts, "same": True, "similarity": 1.0, "shadow_tokens": 10}, "shadow"),
        written({**facts, "same": False, "similarity": 0.5, "shadow_tokens": 20}, "shadow"),
    ]
    found = told([*log_of(), *seen])
    assert found["shadow"] == {
        "answers": 2, "same": 0.5, "greedy": 1, "similarity": 0.75, "shown_tokens": 10, "shadow_tokens": 15,
    }  # fmt: skip
    assert "shadow: answers 2, same 0.5" in report.table(found)


def test_a_treatment_that_changed_on_the_way_is_said() -> None:
    found = told([*log_of(), *log_of(strength=0.25, seed=1)])
    assert len(found["arms"]["half"]["treatments"]) == 2
    assert "CHANGED" in report.table(found)


@pytest.mark.slow
def test_the_command_prints_writes_and_draws(tmp_path: Path) -> None:
    log, out, picture = tmp_path / "service.log", tmp_path / "report.json", tmp_path / "report.png"
    log.write_text("\n".join(log_of(failing="half")) + "\n")
    command = [sys.executable, "-m", "service.experiments.report", str(log), "--json", str(out), "--plot", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "half minus whole" in done.stdout
    assert json.loads(out.read_text())[0]["differences"]["half"]["errors"]["verdict"] == "higher"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_log_without_any_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "service.log"
    log.write_text("nothing\n")
    assert report.main([str(log)]) == 2
    assert report.main([str(tmp_path / "missing")]) == 2
    told_ = capsys.readouterr().err.splitlines()
    assert "no request of such an experiment" in told_[0]
    assert "missing" in told_[1]
