"""Ray's surroundings without Ray: the environment it reads, and processes that must not stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from steering.cluster.local_ray import (
    END_SIGNALS,
    REPOSITORY,
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
