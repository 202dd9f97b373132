"""The Dockerfile: hadolint has nothing to say, and what it copies, installs and asks is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from service.http.routes import ROUTES
from tests.deploy.rendering import DEPLOY, FOLDERS, pods, rendered

DOCKERFILE, ROOT = DEPLOY / "Dockerfile", DEPLOY.parent
HADOLINT = Path(sys.executable).with_name("hadolint")
TARGETS = ("cpu", "gpu", "training")
INSTRUCTION = re.compile(r"^([A-Z]+) (.+)$", re.MULTILINE)


def instructions() -> dict[str, list[tuple[str, str]]]:
    """Stage to its instructions, those of the stages before it first; continued lines joined, comments left out."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    stages: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for word, rest in INSTRUCTION.findall(text):
        if word == "FROM":
            base, _, name = rest.split()
            stages[name] = list(stages.get(base, [("FROM", base)]))
        else:
            stages[name].append((word, " ".join(rest.split())))
    return stages


def last(stage: str, word: str) -> str:
    return [rest for one, rest in instructions()[stage] if one == word][-1]


def test_hadolint_has_nothing_to_say(tmp_path: Path):
    checked = subprocess.run([HADOLINT, DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout
    broken = tmp_path / "Dockerfile"
    broken.write_text(DOCKERFILE.read_text().replace("3.11.14-bookworm", "latest", 1))
    assert "DL3007" in subprocess.run([HADOLINT, broken], capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_is_pinned_and_runs_as_nobody_in_particular(target: str):
    assert re.fullmatch(r"python:3\.\d+\.\d+-\w+", last(target, "FROM"))
    user, group = last(target, "USER").split(":")
    assert int(user) > 0
    assert {pod.spec["securityContext"]["runAsUser"] for folder in FOLDERS for pod in ray_pods(folder)} == {int(user)}
    assert group == user


def ray_pods(folder: str) -> list:
    return [pod for pod in pods(rendered(folder)) if pod.owner["kind"] != "Deployment"]


@pytest.mark.parametrize("target", TARGETS)
def test_what_it_copies_and_installs_is_there_and_let_in(target: str):
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    stage = f"{target}-packages"
    copied = [rest.split()[:-1] for one in (stage, target) for word, rest in instructions()[one] if word == "COPY"]
    names = {name for group in copied for name in group if not name.startswith("-") and not name.startswith("/app")}
    assert names <= let_in
    assert [name for name in names if not (ROOT / name).exists()] == []
    [pins] = {name for name in names if name.startswith("requirements")}
    assert any(f"-r {pins}" in rest for word, rest in instructions()[stage] if word == "RUN")
    assert last(target, "COPY") == f"--from={stage} /app/.venv .venv"


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_reported_or_fetched_and_memory_comes_back(target: str):
    environment = " ".join(rest for word, rest in instructions()[target] if word == "ENV").split()
    wanted = """RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 VLLM_NO_USAGE_STATS=1
        DO_NOT_TRACK=1 MALLOC_MMAP_THRESHOLD_=8388608 MALLOC_ARENA_MAX=2"""
    assert set(wanted.split()) <= set(environment)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_its_health_is_a_path_that_needs_no_key(target: str):
    check = last(target, "HEALTHCHECK")
    [port, path] = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", check)[0]
    [route] = [route for route in ROUTES if route.path == path]
    assert route.scope is None
    assert f'"--port", "{port}"' in last(target, "CMD")
    assert last(target, "EXPOSE") == port


@pytest.mark.parametrize("target", TARGETS)
def test_the_project_itself_is_installed_without_an_index(target: str):
    """Its entry point is how vLLM finds our plugin; setuptools, which builds it, is among the pins."""
    [command] = [rest for word, rest in instructions()[target] if word == "RUN" and " -e . " in rest]
    assert {"--offline", "--no-deps", "--no-build-isolation"} <= set(command.split())
    [pins] = re.findall(r"requirements[\w-]*\.txt", last(f"{target}-packages", "COPY"))
    assert re.search(r"^setuptools==", (ROOT / pins).read_text(), re.MULTILINE)
