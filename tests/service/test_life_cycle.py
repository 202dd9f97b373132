"""What clients see while parts of the service stop, die and come back, and when all of it goes. A server of its own."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from transformers import AutoProcessor

from tests.service.examples import body, image_part, user
from tests.service.running_server import RunningServer, start_server

pytestmark = [pytest.mark.service, pytest.mark.slow]
NAME, MAX_CHOICES = "renamed/model", 7
"""Settings that only this server has: what is restarted must have them again."""
SHORT_TOKENS = 100
"""Of an answer that is still being given when the end begins, and is finished well before the end is over."""
PATIENCE_S = 60.0
"""Longer than anything here may take; nothing is asserted about durations."""


class Conversation:
    """A chat request on a thread of its own, read as it comes."""

    def __init__(self, server: RunningServer, pool: ThreadPoolExecutor, **fields) -> None:
        self._server, self._fields = server, fields
        self.began = threading.Event()
        self.lines: list[str] = []
        self.status: Future[int] = pool.submit(self._run)

    def _run(self) -> int:
        url = self._server.url + "/v1/chat/completions"
        with httpx.stream("POST", url, json=self._fields, timeout=PATIENCE_S) as answer:
            with suppress(httpx.RemoteProtocolError):  # no proper end of the message
                for line in answer.iter_lines():
                    self.lines.append(line)
                    if line:
                        self.began.set()
            return answer.status_code

    def outcome(self) -> str:
        """'complete', 'cut', or the code of the error that it ended with."""
        status = self.status.result(PATIENCE_S)
        last = [line for line in self.lines if line][-1].removeprefix("data: ")
        if last == "[DONE]":
            return "complete"
        answer = json.loads(last)
        if "error" in answer:
            return answer["error"]["code"]
        return "complete" if status == 200 and answer["choices"][0]["finish_reason"] else "cut"


@pytest.fixture(scope="module")
def own(checkpoint: tuple[Path, Path]) -> Iterator[RunningServer]:
    model, artifact = checkpoint
    limits = ("--served-model-name", NAME, "--max-choices", str(MAX_CHOICES), "--drain-timeout-s", "30")
    with tempfile.TemporaryDirectory(prefix="srv") as home:
        paths = ("--model", str(model), "--artifact", str(artifact))
        server = start_server(*paths, *limits, home=Path(home), own_group=True)
        try:
            yield server
        finally:
            server.process.kill()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


@pytest.fixture(scope="module")
def endless(own: RunningServer, checkpoint: tuple[Path, Path]) -> dict:
    """A request that runs into its limit, after some seconds."""
    end_token = AutoProcessor.from_pretrained(checkpoint[0]).tokenizer.eos_token_id
    context = own.get("/version").json()["context_tokens"]
    forbidden = {str(end_token): -100}
    question = user(image_part(), "go on")
    return body(question, model=NAME, n=MAX_CHOICES, max_tokens=context - 60, logit_bias=forbidden)


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def ready(server: RunningServer) -> bool:
    """Without a gateway a probe may have to wait for an ingress that is being replaced."""
    try:
        return server.get("/readyz").status_code == 200
    except httpx.ReadTimeout:
        return False


def answer_of(server: RunningServer) -> str:
    """A greedy answer, and that the server still has its settings."""
    ask = body(user(image_part(), "what is it?"), model=NAME, temperature=0, max_tokens=20)
    answer = httpx.post(server.url + "/v1/chat/completions", json=ask, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    refused = httpx.post(server.url + "/v1/chat/completions", json={**ask, "n": MAX_CHOICES + 1}, timeout=PATIENCE_S)
    assert f"at most {MAX_CHOICES} choices" in refused.json()["error"]["message"]
    return answer.json()["choices"][0]["message"]["content"]


def test_a_stalled_model_is_not_ready_until_it_goes_on(own: RunningServer, endless: dict, pool) -> None:
    asking = Conversation(own, pool, **{**endless, "max_tokens": 200}, stream=True)
    asking.began.wait(PATIENCE_S)
    model = own.pid_of(":Model")
    os.kill(model, signal.SIGSTOP)
    try:
        wait_for(lambda: not ready(own), "it still says that it is ready")
        assert own.get("/healthz").status_code == 200
    finally:
        os.kill(model, signal.SIGCONT)
    wait_for(lambda: ready(own), "it is not ready again")
    assert asking.outcome() == "complete"


def test_a_lost_model_replica_costs_its_requests_only(own: RunningServer, endless: dict, pool) -> None:
    before = answer_of(own)
    streams = [Conversation(own, pool, **endless, stream=True) for _ in range(2)]
    plain = Conversation(own, pool, **endless)
    wait_for(lambda: own.get("/readyz").json().get("running") == 3 * MAX_CHOICES, "they do not all run")
    wait_for(lambda: all(one.began.is_set() for one in streams), "the streams have not begun")
    os.kill(own.pid_of(":Model"), signal.SIGKILL)
    assert [one.outcome() for one in (*streams, plain)] == ["engine_unavailable"] * 3
    assert [one.status.result() for one in (*streams, plain)] == [200, 200, 503]
    wait_for(lambda: ready(own), "it did not come back")
    assert answer_of(own) == before


def test_a_lost_ingress_replica_comes_back_with_its_settings(own: RunningServer, endless: dict, pool) -> None:
    before = answer_of(own)
    stream = Conversation(own, pool, **endless, stream=True)
    stream.began.wait(PATIENCE_S)
    os.kill(own.pid_of(":Ingress"), signal.SIGKILL)
    assert stream.outcome() == "cut", "there is nobody to say more; without [DONE] it is not complete"
    wait_for(lambda: ready(own), "it did not come back")
    assert answer_of(own) == before


def test_a_lost_controller_comes_back_with_all_settings(own: RunningServer) -> None:
    before = answer_of(own)
    lost, ingress = own.pid_of("ServeController"), own.pid_of(":Ingress")
    os.kill(lost, signal.SIGKILL)
    assert answer_of(own) == before, "requests need no controller"
    wait_for(lambda: any("ServeController" in line for line in own.command_lines().values()), "no new controller")
    os.kill(ingress, signal.SIGKILL)  # only a controller that knows the application can replace it
    wait_for(lambda: any(":Ingress" in line for line in own.command_lines().values()), "no new ingress")
    wait_for(lambda: ready(own), "it did not come back")
    assert answer_of(own) == before


def test_at_the_end_who_runs_may_finish_and_who_takes_too_long_is_told(own: RunningServer, endless: dict, pool) -> None:
    """The last test of this server. Every process is asked to end, as a service manager does, and then its group."""
    model, family = own.pid_of(":Model"), own.family()
    long = Conversation(own, pool, **endless, stream=True)
    long.began.wait(PATIENCE_S)
    short = Conversation(own, pool, **{**endless, "n": 1, "max_tokens": SHORT_TOKENS}, stream=True)
    short.began.wait(PATIENCE_S)
    os.kill(model, signal.SIGSTOP)
    assert not short.status.done(), "it ended before the end had begun"
    for pid in family:
        os.kill(pid, signal.SIGTERM)
    os.killpg(own.process.pid, signal.SIGTERM)
    wait_for(lambda: "stopping" in own.log(), "it does not stop")
    refused = httpx.post(own.url + "/v1/chat/completions", json=endless, timeout=PATIENCE_S)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert int(refused.headers["retry-after"]) >= 1
    assert not ready(own)
    os.kill(model, signal.SIGCONT)
    assert short.outcome() == "complete"
    os.kill(model, signal.SIGSTOP)
    assert long.outcome() == "shutting_down"
    os.kill(model, signal.SIGCONT)
    assert own.process.wait(PATIENCE_S) == 0
    assert own.alive(family) == []
    assert own.log().endswith("\nstopped\n")
    assert "Traceback" not in own.log()
