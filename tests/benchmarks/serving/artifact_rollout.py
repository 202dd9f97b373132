"""A new artifact on a running service, under load: loaded beside, shadowed, given a share, promoted, taken back.

    python -m tests.benchmarks.serving.artifact_rollout --json FILE

The bundled miniature on the Hugging Face engine behind Serve's own proxy, deployed from a configuration as a cluster
is. The candidate is the bundled artifact with another strength in its presets; beside it a second one, whose folder is
not there. Clients ask one request after the other all the while. Checked: no request fails; each step's answers come
from the artifacts that it should, by their receipts; the service's own processes are the same at the end; the candidate
that cannot load is reported by name. The exit status is 1 where anything is not so. Client and service share the
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import httpx
import yaml

from service.gateway import free_port
from steering.artifact_config import read_config, write_config
from tests.benchmarks.serving.open_loop import scenes
from tests.benchmarks.serving.running_service import REPOSITORY, RunningService
from training.evaluation.manifest import describe_run
from training.miniature.paths import ARTIFACT, LLAVA

PATIENCE_S = 240
SHARES = {"old": 0.7, "new": 0.3}
CANARY = {"name": "canary", "arms": [
    {"name": "old", "weight": SHARES["old"], "artifact": "main"},
    {"name": "new", "weight": SHARES["new"], "artifact": "next"},
]}  # fmt: skip
SHADOWED = {"name": "shadowed", "arms": [{"name": "all", "weight": 1}], "shadow": {"artifact": "next", "share": 1}}


class Told(NamedTuple):
    """An answer, as its client sees it."""

    ended: float
    status: int
    arm: str
    artifact: str
    whole_s: float


class Deployment:
    """What KubeRay would hand over, changed while it runs."""

    def __init__(self, process: subprocess.Popen[str], folder: Path, port: int) -> None:
        self.service, self._process, self._folder, self._number = RunningService(process, port), process, folder, 0  # type: ignore[arg-type]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False)
        self._port = port

    def write(self, beside: dict[str, str], live: dict[str, Any]) -> Path:
        """The configuration with candidates and live settings."""
        self._number += 1
        args = {"model": str(LLAVA), "engine": {"device": "cpu"}, "gateway": "off", "allow_anonymous": True}
        service = {
            "name": "vl-sae-steering", "route_prefix": "/", "import_path": "service.app:build_application",
            "args": {**args, "artifact": str(ARTIFACT)}, "deployments": [{"name": "Ingress", "user_config": live}],
        }  # fmt: skip
        candidates = [
            {"name": name, "route_prefix": None, "import_path": "service.app:build_candidate",
             "args": {**args, "artifact": artifact}}
            for name, artifact in beside.items()
        ]  # fmt: skip
        http = {"host": "127.0.0.1", "port": self._port, "request_timeout_s": 305}
        file = self._folder / f"serve_{self._number}.yaml"
        file.write_text(yaml.safe_dump({"http_options": http, "applications": [service, *candidates]}))
        return file

    def apply(self, beside: dict[str, str], live: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self.write(beside, live)}\n")
        self._process.stdin.flush()

    def version(self) -> dict[str, Any]:
        return self.http.get("/version").raise_for_status().json()

    def until(self, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """What /version says once it is so."""
        deadline = time.monotonic() + PATIENCE_S
        while not what(told := self.version()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"not within {PATIENCE_S} s: {json.dumps(told)}")
            time.sleep(0.5)
        return told


@contextmanager
def deployed(folder: Path) -> Iterator[Deployment]:
    port = free_port()
    first = Deployment(None, folder, port).write({}, {})  # type: ignore[arg-type]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.deploy.serve_as_kuberay", str(first)],
        cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        running = Deployment(process, folder, port)
        running.service.wait_until_ready()
        yield running
        process.communicate(timeout=60)
    finally:
        process.kill()


class Load:
    """Clients that ask one request after the other until they are told to stop."""

    def __init__(self, http: httpx.Client, settings: argparse.Namespace) -> None:
        self._http, self._clients, self._units = http, settings.clients, settings.units
        self._bodies = [json.loads(one) for one in scenes(LLAVA.name, settings.items, settings.tokens).bodies]
        self.told: list[Told] = []
        self._over = Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        with ThreadPoolExecutor(self._clients) as pool:
            asking = [pool.submit(self._ask, number) for number in range(self._clients)]
            try:
                yield
            finally:
                self._over.set()
            for one in asking:
                one.result()

    def _ask(self, number: int) -> None:
        while not self._over.is_set():
            number += self._clients
            body = {**self._bodies[number % len(self._bodies)], "user": f"visitor-{number % self._units}"}
            began = time.monotonic()
            answer = self._http.post("/v1/chat/completions", json=body)
            artifact = answer.json()["steering"]["artifact"] if answer.status_code == 200 else answer.text[:300]
            arm, now = answer.headers.get("x-vlsae-arm", "none"), time.monotonic()
            self.told.append(Told(now, answer.status_code, arm, artifact, now - began))


def measure(running: Deployment, load: Load, candidate: Path, step_s: float) -> tuple[list[dict[str, Any]], list[str]]:
    own, new = read_config(ARTIFACT).fingerprint, read_config(candidate).fingerprint
    names, rows, found = {own: "main", new: "next"}, [], []
    beside = {"next": str(candidate), "bad": str(candidate / "nowhere")}
    before = _processes(running)

    def step(
        name: str, expected: set[str], live: dict[str, Any], candidates: dict[str, str], settled
    ) -> dict[str, Any]:
        """Apply, wait until it is in force, then look at what is answered for a while."""
        began, first = time.monotonic(), len(load.told)
        if name != "before":
            running.apply(candidates, live)
        told = running.until(settled)
        in_force, took_s = time.monotonic(), time.monotonic() - began
        time.sleep(step_s)
        answers = load.told[first:]
        later = [one for one in answers if one.ended - one.whole_s > in_force]  # what began after the change
        seen = {names.get(one.artifact, one.artifact) for one in later}
        if seen != expected:
            found.append(f"{name}: answered by {sorted(seen)}, not {sorted(expected)}")
        found.extend(f"{name}: {one.status} {one.artifact}" for one in answers if one.status != 200)
        rows.append(
            {
                "step": name, "requests": len(answers), "failed": sum(one.status != 200 for one in answers),
                "in_force_after_s": round(took_s, 2),
                "answered_by": dict(Counter(names.get(one.artifact, "?") for one in later)),
                "arms": dict(Counter(one.arm for one in later)),
                "whole_s_p50": round(statistics.median(one.whole_s for one in later), 3),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
        return told

    def changed(told: dict[str, Any], **expected: Any) -> bool:
        return told["live_settings"]["changed"] == expected and told["live_settings"]["refused"] is None

    def loaded(told: dict[str, Any]) -> bool:
        return "artifact" in told["candidates"].get("next", {}) and "nowhere" in str(told["candidates"].get("bad"))

    step("before", {"main"}, {}, {}, lambda _told: True)
    told = step("loaded beside", {"main"}, {}, beside, loaded)
    print(f"the one that cannot load: {told['candidates']['bad']['refused']}")
    good = {"next": beside["next"]}
    step("shadowed", {"main"}, {"experiment": SHADOWED}, good, lambda told: changed(told, experiment=SHADOWED))
    shadows = sum(running.service.metric(("vlsae_shadow_answers_total{", f'"{one}"')) for one in ("same", "different"))
    if not shadows:
        found.append("no shadow has run")
    step("canary", {"main", "next"}, {"experiment": CANARY}, good, lambda told: changed(told, experiment=CANARY))
    promoted = {"default_artifact": "next"}
    step("promoted", {"next"}, promoted, good, lambda told: changed(told, **promoted))
    step(
        "unknown name",
        {"next"},
        {"default_artifact": "nxet"},
        good,
        lambda told: "'nxet'" in str(told["live_settings"]),
    )
    step("rolled back", {"main"}, {}, good, lambda told: changed(told))
    step("removed", {"main"}, {}, {}, lambda told: told["candidates"] == {})
    found += [f"{one.arm} answered by {names.get(one.artifact)}" for one in load.told if _mixed(one, names)]
    if _processes(running) != before:
        found.append(f"the service's processes changed: {before}, then {_processes(running)}")
    rows[2]["shadows"] = shadows
    return rows, found


def _mixed(one: Told, names: dict[str, str]) -> bool:
    """An arm's answer from another artifact than its own."""
    return (
        one.status == 200 and one.arm in SHARES and names.get(one.artifact) != {"old": "main", "new": "next"}[one.arm]
    )


def _processes(running: Deployment) -> dict[str, list[int]]:
    return {name: running.service.pids_of(f"ServeReplica:vl-sae-steering:{name}") for name in ("Ingress", "Model")}


def other_strength(folder: Path) -> None:
    """The bundled artifact with presets of another strength, which is another artifact."""
    shutil.copytree(ARTIFACT, folder)
    config = read_config(folder)
    weaker = {name: one.model_copy(update={"strength": one.strength / 2}) for name, one in config.presets.items()}
    write_config(folder, config.model_copy(update={"presets": weaker}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--clients", type=int, default=3, help="requests at a time")
    parser.add_argument("--units", type=int, default=200, help="units that they come from")
    parser.add_argument("--step-s", type=float, default=15, help="seconds of load in each step")
    parser.add_argument("--items", type=int, default=50, help="scenes that are asked about")
    parser.add_argument("--tokens", type=int, default=8, help="largest number of tokens of an answer")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        other_strength(Path(name) / "next")
        with deployed(Path(name)) as running:
            load = Load(running.http, settings)
            with load.running():
                rows, found = measure(running, load, Path(name) / "next", settings.step_s)
    total = len(load.told)
    ratios = {"failed_over_requests": sum(one.status != 200 for one in load.told) / total}
    arguments = {name: str(value) for name, value in vars(settings).items()}
    manifest = describe_run(arguments) | {"cpus": os.cpu_count(), "requests": total, "failures": found}
    result = {"ratios": ratios, "spread": {}, "table": rows, "manifest": manifest}
    if settings.json:
        settings.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{total} requests, {ratios['failed_over_requests']:.0%} failed")
    for failure in found[:20]:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
