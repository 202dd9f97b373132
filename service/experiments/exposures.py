"""From the service's log to what a report compares: requests by experiment, arm and unit. Knows no statistics."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

Line = dict[str, Any]


class Exposure(NamedTuple):
    """A request that an experiment counts, in an arm or apart from them."""

    arm: str
    """An arm's name, or what it is counted under instead."""
    share: float | None
    """The arm's weight; None where it is in no arm."""
    unit: str | None
    values: dict[str, float]
    """Measure to what this request had of it; a measure that it has nothing to say on is left out."""
    treatment: str
    """Preset, strength and artifact in force, as the receipt says; empty where there is none."""


class Exposures(NamedTuple):
    """All of one experiment, in the log's order."""

    name: str
    salt: str
    default: str
    """The arm that the others are held against."""
    requests: list[Exposure]
    shadows: list[Line]
    """What is known of each second answer that nobody saw."""


MEASURES: dict[str, Callable[[Line], float | None]] = {
    "errors": lambda line: float(_is_our_fault(line)),
    "cancellations": lambda line: float(line.get("finish") == "cancelled" or _left_before(line)),
    "empty_answers": lambda line: _share(line.get("empty_choices"), line.get("choices")),
    "completion_tokens": lambda line: _share(line.get("completion_tokens"), line.get("choices")),
    "time_to_first_token_s": lambda line: line.get("time_to_first_token_s"),
    "inter_token_s": lambda line: line.get("inter_token_s"),
    "duration_s": lambda line: line.get("duration_s") if "choices" in line else None,
    "relative_shift": lambda line: line.get("steering", {}).get("relative_shift"),
    "mismatch": lambda line: line.get("steering", {}).get("mismatch"),
    "feedback": lambda line: line.get("feedback"),
}
"""Rates first; errors are the service's and the arm's, not what a client did wrong. Lengths are per choice, and only of
whole answers; `feedback` is the score, where one was given."""
FAULTS_OF_AN_ARM = frozenset(("invalid_steering",))
RATES = frozenset(("errors", "cancellations", "empty_answers"))


def read_exposures(lines: Iterable[str]) -> list[Exposures]:
    """One for each name and salt, in the order of their first request. Lines that are none of ours are passed over."""
    asked: list[Line] = []
    scores: dict[str, float] = {}
    shadows: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if not isinstance(line, dict):
            continue
        if line.get("message") == "feedback":
            scores[line.get("completion_id", "")] = line["score"]
        elif line.get("message") == "shadow":
            shadows[_key(line)].append(line)
        elif line.get("message") == "request" and isinstance(line.get("experiment"), dict):
            asked.append(line)
    found: dict[tuple[str, str], list[Exposure]] = defaultdict(list)
    for line in asked:
        if line.get("completion_id") in scores:
            line["feedback"] = scores[line["completion_id"]]
        found[_key(line)].append(_exposure(line))
    defaults = {_key(one): one["experiment"]["default"] for one in asked}
    return [Exposures(*key, defaults[key], requests, shadows[key]) for key, requests in found.items()]


def _key(line: Line) -> tuple[str, str]:
    return line["experiment"]["name"], line["experiment"]["salt"]


def _exposure(line: Line) -> Exposure:
    experiment = line["experiment"]
    values = {name: value for name, of in MEASURES.items() if (value := of(line)) is not None}
    return Exposure(
        arm=experiment["arm"],
        share=experiment.get("share"),
        unit=experiment.get("unit"),
        values=values,
        treatment=_treatment(line.get("steering")),
    )


def _treatment(steering: Line | None) -> str:
    if not steering:
        return ""
    artifact = f" of {steering['artifact'][:12]}" if steering.get("artifact") else ""
    return f"{steering['preset']} {steering['strength']}{artifact}"


def _is_our_fault(line: Line) -> bool:
    """The log's level says whose an error is. Whoever is in an arm asked for no steering: a wrong one is the arm's."""
    return "error_code" in line and (line.get("level") != "info" or line["error_code"] in FAULTS_OF_AN_ARM)


def _left_before(line: Line) -> bool:
    """Without a status the client had gone before there was one."""
    return "status" not in line and "error_code" not in line


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
