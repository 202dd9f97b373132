"""Sums over real processes: what the dead have counted stays, what they were doing does not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from prometheus_client import CollectorRegistry

from service.metrics.machine import FOLDER_VARIABLE, MachineCollector
from tests.service.running_server import REPOSITORY, free_port

COUNTING = """
import sys
from prometheus_client import Counter
from service.metrics.exposition import Metrics
from service.metrics.meter import Meter
from service.metrics.request_record import RequestRecord
from tests.service.examples import delta, end
metrics = Metrics()
Counter("foreign", "As another library in our process counts.").inc()
for _ in range(int(sys.argv[1])):
    meter = Meter(metrics, RequestRecord(request_id="r", method="POST"))
    meter.submitted()
    meter.started(20)
    meter.observe(delta(0, "a", finish="stop", tokens=2))
    meter.observe(end(3))
    meter.finished(None)
metrics.in_progress.set(int(sys.argv[1]))
metrics.ready.set(1)
print("counted", flush=True)
for _ in sys.stdin:
    print(metrics.exposition().decode() + "END", flush=True)
"""


class Machine(NamedTuple):
    """A folder of metrics, and the processes that write there: they have served 2 and 3 requests."""

    folder: Path
    processes: list[subprocess.Popen]

    def value(self, name: str, **labels: str) -> float | None:
        registry = CollectorRegistry()
        MachineCollector(registry, self.folder)
        return registry.get_sample_value(name, labels)


def start_process(folder: Path, requests: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", COUNTING, str(requests)],
        cwd=REPOSITORY, env={**os.environ, FOLDER_VARIABLE: str(folder)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("machine") / "made by the first"
    processes = [start_process(folder, requests) for requests in (2, 3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "counted\n"
    yield Machine(folder, processes)
    for process in processes:
        process.kill()
        process.communicate()


def test_sums_and_labels(machine: Machine) -> None:
    assert machine.value("vlsae_requests_total", artifact="main", arm="none", applied="true", finish="stop") == 5
    assert machine.value("vlsae_completion_tokens_total", arm="none") == 15
    assert machine.value("vlsae_time_to_first_token_seconds_count", arm="none") == 5
    assert machine.value("vlsae_time_to_first_token_seconds_bucket", arm="none", le="+Inf") == 5
    assert machine.value("vlsae_requests_in_progress") == 5
    assert machine.value("vlsae_requests_waiting") == 0
    assert machine.value("vlsae_ready") == 1
    last_event = machine.value("vlsae_model_last_event_timestamp_seconds")
    assert last_event is not None
    assert 0 <= time.time() - last_event < 60
    assert machine.value("foreign_total") is None


def test_every_process_answers_for_all(machine: Machine) -> None:
    for process in machine.processes:
        assert process.stdin is not None
        assert process.stdout is not None
        print("scrape", file=process.stdin, flush=True)
        text = "".join(iter(process.stdout.readline, "END\n"))
        assert 'vlsae_completion_tokens_total{arm="none"} 15.0' in text
        assert "foreign" not in text


def test_the_command(machine: Machine) -> None:
    port = free_port()
    command = [sys.executable, "-m", "service.metrics.machine", "--port", str(port)]
    environment = {**os.environ, FOLDER_VARIABLE: str(machine.folder)}
    exporter = subprocess.Popen(command, cwd=REPOSITORY, env=environment)
    try:
        transport = httpx.HTTPTransport(retries=20)
        with httpx.Client(transport=transport) as client:
            assert (
                'vlsae_completion_tokens_total{arm="none"} 15.0' in client.get(f"http://127.0.0.1:{port}/metrics").text
            )
    finally:
        exporter.terminate()
        exporter.wait()


def test_the_command_without_a_folder() -> None:
    environment = {name: value for name, value in os.environ.items() if name != FOLDER_VARIABLE}
    command = [sys.executable, "-m", "service.metrics.machine"]
    failed = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)
    assert failed.returncode == 2
    assert FOLDER_VARIABLE in failed.stderr


def test_the_dead_and_their_successors(machine: Machine) -> None:
    """The last one: it kills."""
    (machine.folder / f"gauge_livesum_{os.getpid()}.db").touch()  # made by another process this very moment
    assert machine.value("vlsae_requests_in_progress") == 5
    machine.processes[1].kill()
    machine.processes[1].wait()
    assert machine.value("vlsae_requests_in_progress") == 2
    assert machine.value("vlsae_requests_total", artifact="main", arm="none", applied="true", finish="stop") == 5
    of_the_other = machine.folder / f"gauge_livesum_{machine.processes[0].pid}.db"
    unseen = of_the_other.rename(machine.folder / f"gauge_livesum_{os.getpid()}.db")
    assert machine.value("vlsae_requests_in_progress") is None, "the id of a process that is not ours"
    unseen.rename(of_the_other)
    assert machine.value("vlsae_requests_in_progress") == 2, "left out, not lost"
