"""An experiment on two ingress replicas: one unit, one arm; live changes reach both; the metrics' sums are right."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.service.examples import encoded, image_part, user
from tests.service.trace_collector import attributes
from tests.service.watched_server import Watched
from tests.tiny_models import drawn_image

pytestmark = [pytest.mark.service, pytest.mark.slow]
CHAT = "/v1/chat/completions"
PATIENCE_S = 60
TRACE = "5af7651916cd43dd8448eb211c803195"
EXPERIMENT = {
    "name": "strength",
    "coverage": 0.5,
    "arms": [{"name": "full", "weight": 0.5}, {"name": "half", "weight": 0.5, "steering": {"strength": 0.5}}],
}
STRENGTH = {"full": 1.0, "half": 0.5}
UNITS = [f"visitor-{number}" for number in range(16)]


@pytest.fixture
def change(watched: Watched) -> Iterator[Callable[[dict], None]]:
    """Writes the live file, and returns when both replicas have read it."""
    file = watched.home / "live.json"

    def write(content: dict | None) -> None:
        if content is None:
            file.unlink(missing_ok=True)
        else:
            file.write_text(json.dumps(content))
        deadline, seen = time.monotonic() + PATIENCE_S, 0
        while seen < 16:
            told = watched.client.get("/version").json()["live_settings"]
            in_force = told["changed"] == (content or {}) or told["refused"] is not None
            seen = seen + 1 if in_force else 0
            assert time.monotonic() < deadline, told
            time.sleep(0.1)

    yield write
    write(None)


def ask(watched: Watched, unit: str | None, **changes) -> httpx.Response:
    asked = {"model": watched.server.name, "max_tokens": 2, "temperature": 0, "user": unit, **changes}
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"} if changes.get("seed") == 7 else {}
    seen = [user(image_part(encoded(drawn_image(1))), "what ?")]
    return watched.client.post(CHAT, json={"messages": seen, **asked}, headers=headers)


def arms_of(watched: Watched, times: int) -> dict[str, set[str]]:
    """Of each unit, all arms that it was told of; the receipt must say the same, and have its strength."""
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda unit: (unit, ask(watched, unit)), UNITS * times))
    found: dict[str, set[str]] = {unit: set() for unit in UNITS}
    for unit, answer in answers:
        assert answer.status_code == 200
        receipt = answer.json()["steering"]
        assert receipt["arm"] == answer.headers["x-vlsae-arm"]
        assert receipt["strength"] == STRENGTH.get(receipt["arm"], 1.0)
        found[unit].add(receipt["arm"])
    return found


def test_one_unit_one_arm_on_both_replicas(watched: Watched, change: Callable[[dict], None]) -> None:
    before, logged = watched.scrape(), len(watched.lines())
    change({"experiment": EXPERIMENT})
    first = arms_of(watched, 3)
    assert {len(arms) for arms in first.values()} == {1}, "sticky"
    change({"experiment": {**EXPERIMENT, "coverage": 1}})
    second = arms_of(watched, 3)
    assert {len(arms) for arms in second.values()} == {1}
    moved = [unit for unit in UNITS if first[unit] not in ({"not_covered"}, second[unit])]
    assert moved == []
    assert set.union(*second.values()) == {"full", "half"}

    asked = [line for line in watched.lines()[logged:] if "experiment" in line]
    assert len(asked) == 2 * 3 * len(UNITS)
    counts = Counter(line["experiment"]["arm"] for line in asked)
    processes = {(line["experiment"]["unit"], line["process"]) for line in asked}
    assert len(processes) > len(UNITS), "many units were answered by both"
    assert len({unit for unit, _ in processes}) == len(UNITS)
    expected = {f'vlsae_assignments_total{{"arm": "{arm}"}}': count for arm, count in counts.items()}
    expected |= {f'vlsae_time_to_first_token_seconds_count{{"arm": "{arm}"}}': n for arm, n in counts.items()}
    for _ in range(6):
        after = watched.scrape()
        assert {name: after.get(name, 0) - before.get(name, 0) for name in expected} == expected


def test_a_wrong_change_leaves_both_in_force(watched: Watched, change: Callable[[dict], None]) -> None:
    change({"experiment": {**EXPERIMENT, "coverage": 1}})
    before = arms_of(watched, 1)
    turned = [{**EXPERIMENT["arms"][0], "weight": 0.9}, {**EXPERIMENT["arms"][1], "weight": 0.1}]
    change({"experiment": {**EXPERIMENT, "arms": turned}})
    time.sleep(2.5)
    told = [watched.client.get("/version").json()["live_settings"] for _ in range(12)]
    assert all("name or salt must change" in one["refused"] for one in told)
    assert all(one["changed"]["experiment"]["arms"] == EXPERIMENT["arms"] for one in told)
    assert arms_of(watched, 1) == before


def test_who_is_counted_apart(watched: Watched, change: Callable[[dict], None]) -> None:
    change({"experiment": {**EXPERIMENT, "coverage": 1}})
    nobody, own = ask(watched, None), ask(watched, UNITS[0], steering={"strength": 0.25})
    assert (nobody.headers["x-vlsae-arm"], nobody.headers["x-vlsae-assignment"]) == ("full", "no_unit")
    assert nobody.json()["steering"]["arm"] == "full"
    assert (own.headers["x-vlsae-arm"], own.json()["steering"]["arm"]) == ("own", "own")
    assert own.json()["steering"]["strength"] == 0.25


def test_a_shadow_is_measured_and_not_shown(watched: Watched, change: Callable[[dict], None]) -> None:
    """Against itself it is the same, against the plain model it may differ; either way the answer is the arm's."""
    for steering, outcomes in (({}, {"same"}), ({"enabled": False}, {"same", "different"})):
        shadow = {"steering": steering, "share": 1}
        one_arm = {"name": "alone", "arms": [{"name": "full", "weight": 1}], "shadow": shadow}
        change({"experiment": one_arm})
        before = shadows_of(watched)
        answer = ask(watched, UNITS[0], max_tokens=8)
        assert answer.json()["steering"]["arm"] == "full"
        deadline = time.monotonic() + PATIENCE_S
        while not (seen := shadows_of(watched) - before):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert seen.total() == 1
        assert set(seen) <= outcomes
    told = [json.loads(line) for line in (watched.home / "service.log").read_text().splitlines()]
    assert {line["greedy"] for line in told if line["message"] == "shadow"} == {True}


def shadows_of(watched: Watched) -> Counter[str]:
    scraped = watched.scrape()
    kinds = ("same", "different", "failed", "dropped")
    return Counter({kind: int(scraped[f'vlsae_shadow_answers_total{{"outcome": "{kind}"}}']) for kind in kinds})


def test_the_trace_says_the_arm_and_not_the_unit(watched: Watched, change: Callable[[dict], None]) -> None:
    change({"experiment": {**EXPERIMENT, "coverage": 1}})
    answer = ask(watched, "hush-visitor-hush", seed=7)
    known = attributes(watched.collector.trace(TRACE)[f"POST {CHAT}"])
    assert (known["vlsae.experiment"], known["vlsae.arm"]) == ("strength", answer.headers["x-vlsae-arm"])
    assert b"hush-visitor-hush" not in watched.collector.received
    assert "hush-visitor-hush" not in (watched.home / "service.log").read_text()


@pytest.mark.parametrize("unit", ["v" * 2**20, "a\tb"], ids=["megabyte", "control"])
def test_a_unit_that_is_no_identifier_is_refused(watched: Watched, unit: str) -> None:
    ask_ = {"model": watched.server.name, "messages": [user("what ?")], "max_tokens": 1}
    try:
        response = watched.client.post(CHAT, json=ask_, headers={"x-experiment-unit": unit})
    except httpx.TransportError:
        assert len(unit) == 2**20, "the gateway hung up on a head beyond its limit"
        return
    assert response.status_code == 400
    if len(unit) < 2**20:
        assert response.json()["error"]["param"] == "x-experiment-unit"
