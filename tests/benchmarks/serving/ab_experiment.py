"""Does an A/B experiment on a running service hold what it promises? 2,000 requests through HTTP, on loopback.

    python -m tests.benchmarks.serving.ab_experiment --json FILE

The bundled miniature on the Hugging Face engine, three arms, one of which fails on purpose: it names a preset that the
artifact's folder got after the engine had loaded it. Half way the weights change while requests are under way: first
without a new salt, which must be refused, then with one. Checked: each unit stays in its arm, the shares are the
weights' (chi-square, p of .001), no request fails but in the failing arm, the report finds that arm and no other. Then
the same load without and with a shadow, in turns; each round's ratio of the median times is the spread. The exit status
is 1 where anything is not as it should be. Client and service share the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from service.experiments import report
from service.experiments.exposures import read_exposures
from service.experiments.statistics import RED_BELOW, sample_ratio_p
from tests.benchmarks.serving.open_loop import scenes
from tests.benchmarks.serving.running_service import RunningService, running_service
from training.evaluation.manifest import describe_run
from training.miniature.paths import ARTIFACT, LLAVA

WEIGHTS = ({"whole": 0.4, "half": 0.4, "broken": 0.2}, {"whole": 0.3, "half": 0.3, "broken": 0.4})
STEERING = {"whole": {}, "half": {"strength": 0.5}, "broken": {"preset": "too_late"}}
LOOK_S = 1.5
"""By then a change of the live file is in force."""
SHADOW = {"steering": {"strength": 0.5}, "share": 1}


class Told(NamedTuple):
    """An answer, as its client sees it."""

    unit: str
    status: int
    arm: str
    whole_s: float


class Client:
    """Many clients of one service."""

    def __init__(self, service: RunningService, live: Path, settings: argparse.Namespace) -> None:
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{service.port}", timeout=120, trust_env=False)
        self._bodies = [json.loads(one) for one in scenes(LLAVA.name, settings.items, settings.tokens).bodies]
        self._live, self._clients = live, settings.clients

    def change(self, weights: dict[str, float], salt: str, **more: Any) -> None:
        """Without waiting for it."""
        arms = [{"name": arm, "weight": weight, "steering": STEERING[arm]} for arm, weight in weights.items()]
        new = self._live.with_suffix(".new")
        new.write_text(json.dumps({"experiment": {"name": "strength", "salt": salt, "arms": arms, **more}}))
        new.replace(self._live)

    def in_force(self) -> dict[str, Any]:
        return self._http.get("/version").json()["live_settings"]

    def ask(self, units: list[str]) -> list[Told]:
        with ThreadPoolExecutor(self._clients) as pool:
            return list(pool.map(self._ask_one, units, cycle(self._bodies)))

    def _ask_one(self, unit: str, body: dict[str, Any]) -> Told:
        began = time.monotonic()
        answer = self._http.post("/v1/chat/completions", json={**body, "user": unit})
        arm = answer.headers.get("x-vlsae-arm", "none")
        return Told(unit, answer.status_code, arm, time.monotonic() - began)


def measure(client: Client, log: Path, settings: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    units = [f"visitor-{number}" for number in range(settings.units)]
    half = settings.requests // 2
    client.change(WEIGHTS[0], "1")
    time.sleep(LOOK_S)
    first = client.ask(list(islice(cycle(units), half)))
    client.change(WEIGHTS[1], "1")
    time.sleep(LOOK_S)
    refused, split = client.in_force()["refused"], sorted({one.arm for one in client.ask(units[:8])})
    with ThreadPoolExecutor(1) as beside:
        changing = beside.submit(lambda: (time.sleep(LOOK_S), client.change(WEIGHTS[1], "2")))
        second = client.ask(list(islice(cycle(units), settings.requests - half)))
        changing.result()
    reports = [report.report_on(one) for one in read_exposures(log.read_text().splitlines())]
    found = failures(first + second, reports, refused, log)
    table = [row(one) for one in reports]
    for one in reports:
        print(report.table(one), end="\n\n", flush=True)
    ratios = {
        f"share_over_weight_{arm}_{one['salt']}": round(
            told["units"] / sum(other["units"] for other in one["arms"].values()) / told["share"], 3
        )
        for one in reports
        for arm, told in one["arms"].items()
    }
    print(f"refused half way: {refused}; arms then: {split}")
    return {"ratios": ratios, "spread": {}, "table": table}, found


def row(one: dict[str, Any]) -> dict[str, Any]:
    """What the report said, without its numbers."""
    return {
        "salt": one["salt"],
        "sample_ratio_p": round(one["sample_ratio"]["p"], 4),
        "units": {arm: told["units"] for arm, told in one["arms"].items()},
        "requests": {arm: told["requests"] for arm, told in one["arms"].items()},
        "errors": {arm: told["measures"]["errors"]["value"] for arm, told in one["arms"].items()},
        "verdicts": {
            arm: {name: told["verdict"] for name, told in one["differences"][arm].items()} for arm in one["differences"]
        },
    }


def failures(told: list[Told], reports: list[dict[str, Any]], refused: str | None, log: Path) -> list[str]:
    """What must not be, in words."""
    found = [f"{one.unit} in {one.arm} got {one.status}" for one in told if one.arm != "broken" and one.status != 200]
    found += [f"{one.unit} in broken got {one.status}" for one in told if one.arm == "broken" and one.status == 200]
    if "name or salt must change" not in (refused or ""):
        found.append(f"the change of weights alone was not refused: {refused}")
    arms: dict[tuple[str, str], set[str]] = defaultdict(set)
    for exposures in read_exposures(log.read_text().splitlines()):
        for one in exposures.requests:
            arms[exposures.salt, one.unit or ""].add(one.arm)
    found += [f"unit {unit} was in {sorted(seen)}" for (_, unit), seen in arms.items() if len(seen) > 1]
    if [one["salt"] for one in reports] != ["1", "2"]:
        found.append(f"the log knows of {[one['salt'] for one in reports]}")
    for one, weights in zip(reports, WEIGHTS, strict=False):
        if (p := sample_ratio_p({arm: told["units"] for arm, told in one["arms"].items()}, weights)) < RED_BELOW:
            found.append(f"the shares of salt {one['salt']} are not the weights': p = {p}")
        for arm, expected in (("broken", "higher"), ("half", "not told apart")):
            if (verdict := one["differences"][arm]["errors"]["verdict"]) != expected:
                found.append(f"the report says of the errors of {arm}: {verdict}")
    return found


def measure_shadow(service: RunningService, client: Client, settings: argparse.Namespace) -> dict[str, Any]:
    """Under full load, and alone: time to the whole answer with a shadow over that without."""
    weights, shadows, medians = {"whole": 1.0}, Counter(), []
    outcomes = ("same", "different", "failed", "dropped")

    def counted() -> Counter[str]:
        return Counter(
            {one: round(service.metric(("vlsae_shadow_answers_total{", f'outcome="{one}"'))) for one in outcomes}
        )

    for number in range(settings.rounds):
        taken = {}
        for name, more in (("with", {"shadow": SHADOW}), ("without", {"shadow": {**SHADOW, "share": 1e-9}})):
            client.change(weights, "shadow", **more)
            time.sleep(LOOK_S)
            before = counted()
            told = client.ask([f"visitor-{number}"] * settings.shadow_requests)
            taken[name] = statistics.median(one.whole_s for one in told)
            if name == "with":
                shadows += counted() - before
        medians.append(taken["with"] / taken["without"])
    ratios = {"shadow_whole_s_over_without": round(statistics.median(medians), 3)}
    spread = {"shadow_whole_s_over_without": [round(min(medians), 3), round(max(medians), 3)]}
    print(f"shadow at {settings.clients} clients: {ratios}, {spread}; {dict(shadows)}", flush=True)
    return {"ratios": ratios, "spread": spread, "table": [{"shadows": dict(shadows)}]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--requests", type=int, default=2000, help="requests of the experiment")
    parser.add_argument("--units", type=int, default=500, help="units that they come from")
    parser.add_argument("--clients", type=int, default=16, help="requests at a time")
    parser.add_argument("--rounds", type=int, default=7, help="rounds without and with a shadow")
    parser.add_argument("--shadow-requests", type=int, default=64, help="requests of each half of a round")
    parser.add_argument("--items", type=int, default=50, help="scenes that are asked about")
    parser.add_argument("--tokens", type=int, default=8, help="largest number of tokens of an answer")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        artifact, live, log = Path(folder) / "artifact", Path(folder) / "live.json", Path(folder) / "service.log"
        shutil.copytree(ARTIFACT, artifact)
        options = ("--model", str(LLAVA), "--artifact", str(artifact), "--live-file", str(live), "--log-file", str(log))
        with running_service(*options) as service:
            _add_preset(artifact)
            client = Client(service, live, settings)
            result, found = measure(client, log, settings)
            beside = measure_shadow(service, client, settings) if settings.rounds else {}
    for part, told in beside.items():
        result[part] = result[part] + told if isinstance(told, list) else {**result[part], **told}
    arguments = {name: str(value) for name, value in vars(settings).items()}
    result["manifest"] = describe_run(arguments) | {"cpus": os.cpu_count(), "failures": found}
    if settings.json:
        settings.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for failure in found[:20]:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if found else 0


def _add_preset(artifact: Path) -> None:
    """The engine has read its presets before; whoever looks at the folder now sees one more."""
    file = artifact / "config.json"
    config = json.loads(file.read_text())
    config["presets"]["too_late"] = config["presets"]["captions"]
    file.write_text(json.dumps(config))


if __name__ == "__main__":
    sys.exit(main())
