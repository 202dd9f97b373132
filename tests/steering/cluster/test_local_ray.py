"""Ray's surroundings: the environment it reads, processes that must not stay, and where its objects lie."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from steering.cluster.local_ray import (
    END_SIGNALS,
    REPOSITORY,
    SHARED_MEMORY,
    descendants,
    end_signals_held_back,
    prepare_environment,
    short_folder,
)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A copy of the environment in place of the real one."""
    copied = dict(os.environ)
    monkeypatch.setattr(os, "environ", copied)
    return copied


def test_nobody_else_s_ray_and_no_network(environment: dict[str, str]) -> None:
    environment.update(RAY_ADDRESS="10.0.0.1:6379", RAY_AUTH_TOKEN_PATH="/theirs", RAY_USAGE_STATS_ENABLED="1")
    prepare_environment()
    assert "RAY_ADDRESS" not in environment
    assert "RAY_AUTH_TOKEN_PATH" not in environment
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert environment["HF_HUB_OFFLINE"] == environment["TRANSFORMERS_OFFLINE"] == "1"


def test_every_start_has_a_token_of_its_own(environment: dict[str, str]) -> None:
    environment["RAY_AUTH_TOKEN"] = "known to others"
    tokens = set()
    for _ in range(3):
        prepare_environment()
        tokens.add(environment["RAY_AUTH_TOKEN"])
    assert len(tokens) == 3
    assert all(len(token) == 64 for token in tokens)


def test_our_modules_come_first_for_workers(environment: dict[str, str]) -> None:
    environment["PYTHONPATH"] = "/theirs"
    prepare_environment()
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(REPOSITORY), "/theirs"]
    assert (REPOSITORY / "steering" / "cluster" / "local_ray.py").exists()


def test_who_is_started_while_end_signals_are_held_back_does_not_end_by_them() -> None:
    with end_signals_held_back():
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        for number in END_SIGNALS:
            child.send_signal(number)
    finally:
        child.communicate(b"\n")
    assert child.returncode == 0


def test_an_end_signal_that_was_held_back_reaches_the_caller_s_handler() -> None:
    got: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: got.append("the caller"))
    try:
        with end_signals_held_back():
            signal.signal(signal.SIGTERM, lambda *_: got.append("Ray"))
            signal.raise_signal(signal.SIGTERM)  # in this thread; another one of the process would not hold it back
            assert got == []
        assert got == ["the caller"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sockets_get_a_short_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/var/tmp")
    assert short_folder() == "/var/tmp"
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "deep/" * 20)
    assert short_folder() == "/tmp"


def test_descendants_are_children_of_children_too() -> None:
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 10
        while len(found := descendants(parent.pid)) < 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert parent.pid not in found
        assert parent.pid in descendants(os.getpid())
        assert set(found) <= set(descendants(os.getpid()))
    finally:
        parent.communicate(b"\n")
    assert descendants(parent.pid) == []


STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(60)
"""
MIDDLE = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], stdout=subprocess.PIPE)
child.stdout.readline()
"""
ORPHANED = f"""
import os, subprocess, sys
from steering.cluster.local_ray import adopt_orphans, descendants, end_descendants
adopt_orphans()
subprocess.run([sys.executable, "-c", {MIDDLE!r}], check=True)
assert len(descendants(os.getpid())) == 1, "the orphan has become ours"
end_descendants(grace_s=0.2)
print(descendants(os.getpid()))
"""


def test_an_orphan_that_stays_is_killed() -> None:
    began = time.monotonic()
    shown = subprocess.run(
        [sys.executable, "-c", ORPHANED], cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=True
    )
    assert shown.stdout.strip() == "[]"
    assert time.monotonic() - began < 10


OVERFULL = """
import json, os, sys
from pathlib import Path
from steering.cluster.local_ray import SHARED_MEMORY, private_ray

with private_ray(cpus=1, object_store_bytes=100 * 2**20, in_memory=json.loads(sys.argv[1])):
    import ray

    kept = [ray.put(os.urandom(1000) * 30_000) for _ in range(6)]
    assert sum(len(ray.get(one)) for one in kept) == 180_000_000
    session = Path(ray._private.worker._global_node.get_session_dir_path()).parent
    places = {"disk": session, "memory": Path(SHARED_MEMORY)}
    found = {
        name: sum(file.stat().st_size for file in place.glob("**/ray_spilled_objects_*/*"))
        for name, place in places.items()
    }
print(json.dumps({**found, "left": [str(one) for one in places["memory"].glob("vlsae-*")]}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("in_memory", [True, False])
def test_what_the_object_store_has_no_room_for_stays_in_memory_where_it_has_to(in_memory: bool) -> None:
    before = {str(one) for one in Path(SHARED_MEMORY).glob("vlsae-*")}
    done = subprocess.run(
        [sys.executable, "-c", OVERFULL, json.dumps(in_memory)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["disk"] > 50_000_000) == (not in_memory)
    assert (found["memory"] > 50_000_000) == in_memory
    assert set(found["left"]) <= before
