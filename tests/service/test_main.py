"""What the command says before and when something goes wrong; the rest of it runs in `test_processes.py`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from service import __main__ as command
from service.__main__ import own_url, startup_failure
from service.command_line import check_drain_file, check_port
from service.model.replica import ModelStatus
from service.settings import LaunchSettings, SettingsError
from steering.engines.base import Health
from steering.engines.checkpoint import read_checkpoint


def test_the_command_loads_no_ray_before_it_has_set_its_environment() -> None:
    look = "import sys, service.__main__; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", look], check=True)


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"--port: cannot listen on 127.0.0.1:{port} "):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


@pytest.mark.parametrize("family", ["steering.errors.BadArtifact", "steering.errors.EngineUnavailable"])
def test_our_own_errors_need_no_traceback(family: str) -> None:
    words = f'Traceback:\n  File "a.py"\n{family}: /a: it was damaged\n'
    assert startup_failure(words) == "/a: it was damaged"


def test_others_do() -> None:
    words = 'Traceback:\n  File "a.py"\nMemoryError: too little\n'
    assert words in startup_failure(words)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
        ("10.1.2.3", "http://10.1.2.3:8000"),
        ("localhost", "http://localhost:8000"),
    ],
)
def test_where_the_service_is_reached_from_here(host: str, url: str) -> None:
    assert own_url(LaunchSettings(host=host)) == url


def test_what_is_left_of_an_earlier_drain_is_named(tmp_path: Path) -> None:
    left = tmp_path / "drain"
    check_drain_file(LaunchSettings(drain_file=str(left)))
    left.touch()
    with pytest.raises(SettingsError, match=f"--drain-file: {left} exists"):
        check_drain_file(LaunchSettings(drain_file=str(left)))


def test_the_start_says_what_the_artifact_is_worth(
    tiny_llava: Path, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """What its gate looked at; or that nobody did, as of imported weights."""
    checkpoint = read_checkpoint(str(tiny_llava), tiny_artifact, None)
    able = checkpoint.capabilities("huggingface", modes=("causal",), branches=(1,), response_format=False)
    assert able.faithfulness
    health = Health(alive=True, running=0, waiting=0, seconds_since_progress=0.0)
    for known, expected in (
        (able, ["alignment paired_overlap 0.5, stranger_overlap 0.2", "faithful  image_unexplained 0.1, text_unex"]),
        (replace(able, alignment={}, faithfulness={}), ["alignment not measured", "faithful  not measured"]),
    ):
        status = ModelStatus(health=health, capabilities=known, system_fingerprint="fp", checkpoint="c")
        monkeypatch.setattr(command, "model_status", lambda status=status: status)
        command.report(LaunchSettings(), 1.0, keyed=False)
        shown = capsys.readouterr().out
        assert all(f"\n{line}" in shown for line in expected), shown


def test_who_interrupts_the_start_waits_for_nobody(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """There is no Serve yet that could be asked to delete anything."""

    def interrupted(_settings: LaunchSettings) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "private_ray", lambda **_options: nullcontext())
    monkeypatch.setattr(command, "deploy", interrupted)
    monkeypatch.setattr(command, "stop_on_signals", lambda: None)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises(KeyboardInterrupt):
        command.serve_until_interrupted(LaunchSettings(), None, keyed=False)
    assert "stopping" not in capsys.readouterr().out


def test_pixels_that_may_go_to_a_disk_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command.ray_for(LaunchSettings(max_memory_bytes=700_000_000), cpus=1)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(command, "fits_into_memory", lambda _bytes: False)
    command.ray_for(LaunchSettings(), cpus=1)
    assert "/dev/shm has less than 2560 MiB: pixels may go to the disk" in capsys.readouterr().out
