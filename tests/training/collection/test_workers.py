"""Whoever is killed whenever: the finished store has the bytes of an unbroken run."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from pathlib import Path

import pytest

from steering.cluster.local_ray import descendants
from tests.training.collection.running import (
    PAIRS,
    PORTION,
    actors,
    all_bytes,
    command_line,
    finish,
    kill,
    shards,
    start,
    wait_for,
)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[str, bytes]:
    """By one process without Ray."""
    output = tmp_path_factory.mktemp("unbroken") / "store"
    assert f"{PAIRS} pairs of layer_2, layer_3, 0 skipped" in finish(start(output, "--workers", "0"))
    return all_bytes(output)


@pytest.mark.slow
def test_an_actor_that_is_killed_is_replaced(unbroken, tmp_path):
    run = start(tmp_path / "store", "--workers", "2")
    wait_for(lambda: shards(tmp_path / "store") >= 3 and len(actors(run)) == 2, run)
    kill(actors(run)[0])
    said = finish(run)
    assert f"{PAIRS} pairs" in said
    assert said.count("\n") <= 14, f"Ray says next to nothing:\n{said}"
    assert all_bytes(tmp_path / "store") == unbroken


@pytest.mark.slow
def test_killed_at_random_moments_it_goes_on(unbroken, tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"kill points from seed {seed}")
    draw, output = random.Random(seed), tmp_path / "store"
    started: list[int] = []
    for workers in ("2", "0"):
        before = shards(output)
        run = start(output, "--workers", workers)
        wait_for(lambda wanted=before + draw.randint(1, 6): shards(output) >= wanted, run)
        time.sleep(draw.random() / 20)
        started += kill_run(run.pid, ray_too=draw.random() < 0.5)
        run.communicate()
        assert before < shards(output) < PAIRS // PORTION
    finish(start(output, "--workers", "0"))
    assert all_bytes(output) == unbroken
    wait_until_gone(started, within_s=90)


def kill_run(driver: int, *, ray_too: bool) -> list[int]:
    """The driver alone or with all of its Ray. What could write is gone soon either way; Ray's agents, which report
    about themselves, take their time. Gives all processes there were."""
    started = descendants(driver)
    writers = [pid for pid in started if "Agent" not in command_line(pid)]
    kill(driver)
    if ray_too:
        for pid in started:
            with suppress(ProcessLookupError):
                kill(pid)
    wait_until_gone(writers, within_s=20)
    return started


def wait_until_gone(pids: list[int], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while left := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, [command_line(pid) for pid in left]
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
