"""`python -m service` as a user starts it, and what the system knows about its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import pytest

from service.gateway import free_port
from service.model.readiness import FRESH_S
from steering.cluster.local_ray import descendants

REPOSITORY = Path(__file__).parent.parent.parent
START_TIMEOUT_S = 240
"""vLLM included: four processes import it, one after the other."""
STOP_TIMEOUT_S = 40
PATIENCE_S = 60
REQUESTS_NOW = ("vlsae_requests_in_progress", "vlsae_requests_at_model", "vlsae_requests_waiting")
"""Gauges."""

ENGINES = ["huggingface", pytest.param("vllm", marks=pytest.mark.vllm)]
any_engine_will_do = pytest.mark.parametrize("server", ["huggingface"], indirect=True)
"""For tests of what no engine changes."""


class RunningServer:
    """A server process in the foreground of nobody."""

    def __init__(self, process: subprocess.Popen, port: int, name: str, engine: str, log: Path) -> None:
        self.process, self.port, self.name, self.engine, self._log = process, port, name, engine, log
        self.url = f"http://127.0.0.1:{port}"
        self._http = httpx.Client(base_url=self.url, timeout=10, limits=httpx.Limits(max_keepalive_connections=0))

    def log(self) -> str:
        """Everything it printed so far."""
        return self._log.read_text()

    def client(self, **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "unused", "max_retries": 0, **options})

    def get(self, path: str) -> httpx.Response:
        return self._http.get(path)

    def running(self) -> int:
        """Sequences in the engine, a moment ago; -1 where it is too busy to say."""
        return self.get("/readyz").json().get("running", -1)

    def wait_until_idle(self, timeout_s: float = PATIENCE_S) -> None:
        """Until no part of the service has a request."""
        deadline = time.monotonic() + timeout_s
        self._wait(lambda: not any(map(self.metric, REQUESTS_NOW)), deadline)
        time.sleep(FRESH_S)  # what is said of the engine from here on is no older
        self._wait(lambda: self.running() == 0, deadline)

    @staticmethod
    def _wait(condition: Callable[[], bool], deadline: float) -> None:
        while not condition():
            assert time.monotonic() < deadline, "it still works"
            time.sleep(0.05)

    def metric(self, sample: str) -> float:
        """A sample by name and labels as they stand in the text; 0 where there is none yet."""
        lines = (line.rpartition(" ") for line in self.get("/metrics").text.splitlines())
        return next((float(value) for name, _, value in lines if name == sample), 0.0)

    def family(self) -> list[int]:
        """Process ids of all it has started."""
        return descendants(self.process.pid)

    def command_lines(self) -> dict[int, str]:
        """Process id to command line of all it has started."""
        found = {}
        for pid in self.family():
            with suppress(OSError):  # it ended in between
                found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        return found

    def pid_of(self, part: str) -> int:
        """The process whose command line contains `part`."""
        return next(pid for pid, line in self.command_lines().items() if part in line)

    def stop(self, number: signal.Signals) -> int:
        """Signal it and wait; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(STOP_TIMEOUT_S)

    @staticmethod
    def alive(pids: list[int]) -> list[int]:
        """Those that still run; a zombie does not."""
        return [pid for pid in pids if Path(f"/proc/{pid}").exists() and " Z " not in _stat(pid)]


def _stat(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # it ended in between
        return " Z "


def run_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "service", *arguments]


def start_server(
    *arguments: str,
    engine: str = "huggingface",
    home: Path,
    environment: dict[str, str] | None = None,
    own_group: bool = False,
) -> RunningServer:
    """Start one and wait until it says that it is ready. Its temporary files lie in `home`.

    `own_group`: lead a process group, which a test may then signal as a whole.
    """
    port, log = free_port(), home / "log.txt"
    name = Path(arguments[arguments.index("--model") + 1]).name
    with log.open("w") as sink:
        process = subprocess.Popen(
            run_command("--port", str(port), "--engine", engine, *arguments),
            cwd=REPOSITORY,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(home), **(environment or {})},
            process_group=0 if own_group else None,
        )
    server = RunningServer(process, port, name, engine, log)
    deadline = time.monotonic() + START_TIMEOUT_S
    while "curl " not in server.log():
        assert process.poll() is None, server.log()
        assert time.monotonic() < deadline, server.log()
        time.sleep(0.1)
    return server
