"""What the command says before and when something goes wrong; the rest of it runs in `test_processes.py`."""

from __future__ import annotations

import socket

import pytest

from service.__main__ import check_port, startup_failure
from service.settings import SettingsError


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
