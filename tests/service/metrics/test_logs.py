"""One JSON object per line, whole lines from several processes, and nothing of what an exception quotes."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.metrics import logs
from service.metrics.request_record import QUIET_ROUTES, RequestRecord, log_request
from tests.service.examples import receipt
from tests.service.running_server import REPOSITORY

SECRET = "what nobody may read"


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """The log, configured as a replica does it."""
    logger = logging.getLogger(logs.LOGGER)
    before = logger.handlers, logger.level, logger.propagate
    logs.configure(str(tmp_path / "service.log"))
    yield tmp_path / "service.log"
    logger.handlers, logger.level, logger.propagate = before


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def record(**changes) -> RequestRecord:
    return RequestRecord(**{"request_id": "r-1", "method": "POST", "route": "/v1/chat/completions", **changes})


def test_a_request(file: Path) -> None:
    known = record(
        status=200, key="alice", completion_id="chatcmpl-1", stream=True, images=2, image_pixels=300,
        time_to_first_token_s=0.25, prompt_tokens=20, completion_tokens=3, finish="stop", duration_s=1.5,
        receipt=receipt(),
    )  # fmt: skip
    log_request(known)
    (line,) = lines(file)
    assert line.pop("time").endswith("+00:00")
    assert line.pop("process") > 1
    assert line == {
        "level": "info", "logger": "service.requests", "message": "request", "request_id": "r-1", "key": "alice",
        "completion_id": "chatcmpl-1", "method": "POST", "route": "/v1/chat/completions", "status": 200,
        "duration_s": 1.5, "time_to_first_token_s": 0.25, "stream": True, "finish": "stop", "prompt_tokens": 20,
        "completion_tokens": 3, "images": 2, "image_pixels": 300, "artifact": "main",
        "steering": {"artifact": "a" * 64, "applied": True, "reason": None, "preset": "captions", "strength": 1.0,
                     "arm": None, "relative_shift": 0.25, "mismatch": 0.5},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("known", "level"),
    [
        ({"status": 400, "error_code": "invalid_value"}, "info"),
        ({"status": 503, "error_code": "overloaded"}, "warning"),
        ({"status": 200, "error_code": "internal_error"}, "error"),
        ({"status": 200, "error_code": "engine_unavailable"}, "warning"),
        ({"status": None, "error_code": "shutting_down"}, "warning"),
        ({"status": None, "finish": "cancelled"}, "info"),
    ],
)
def test_the_level_says_whose_fault_it_is(file: Path, known: dict, level: str) -> None:
    log_request(record(**known))
    (line,) = lines(file)
    assert line["level"] == level


def test_probes_are_silent_until_they_fail(file: Path) -> None:
    for route in sorted(QUIET_ROUTES):
        log_request(record(method="GET", route=route, status=200))
    log_request(record(method="GET", route="/readyz", status=503))
    assert [line["status"] for line in lines(file)] == [503]


def test_an_exception_is_its_types_and_its_way(file: Path) -> None:
    try:
        try:
            json.loads(SECRET)
        except ValueError as error:
            raise RuntimeError(SECRET) from error
    except RuntimeError:
        logging.getLogger("service.http.chat_route").exception("a request failed")
    (line,) = lines(file)
    assert line["message"] == "a request failed"
    assert line["exception"] == ["builtins.RuntimeError", "json.decoder.JSONDecodeError"]
    (frame,) = line["frames"]
    assert re.fullmatch(r"tests/service/metrics/test_logs\.py:\d+ test_an_exception_is_its_types_and_its_way", frame)
    assert SECRET not in file.read_text()


WRITER = """
import logging, sys
from service.metrics import logs
logs.configure(sys.argv[1])
for number in range(500):
    logging.getLogger("service.test").info(sys.argv[2] * 2000)
"""


def test_processes_that_share_a_file_do_not_cut_each_other_s_lines(tmp_path: Path) -> None:
    shared = tmp_path / "shared.log"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, shared, name], cwd=REPOSITORY) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert sorted(line["message"][0] for line in lines(shared)) == ["a"] * 500 + ["b"] * 500


def test_a_rotated_file_is_left_alone(file: Path) -> None:
    log_request(record(status=200))
    file.rename(file.with_suffix(".1"))
    log_request(record(status=200))
    assert len(lines(file)) == len(lines(file.with_suffix(".1"))) == 1


def test_a_file_that_cannot_be_written_is_said_at_start(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        logs.configure(str(tmp_path / "nowhere" / "service.log"))
