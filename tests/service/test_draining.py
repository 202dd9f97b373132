"""The end of a service, in process: who is refused, who may finish, who is cut, and who waits for whom."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path

import httpx
import pytest

from service.draining import Drain, WorkLock, drain, lock_of, share
from service.errors import ApiError
from service.http.api import build_api
from service.images.decoder import DecoderLimits, ImageDecoder
from service.settings import Settings, SettingsError
from steering.engines.base import GenerationEnd, TextDelta
from tests.service.examples import ScriptedModel, body

SHORT_S, LONG_S = 0.3, 60.0


class PatientModel(ScriptedModel):
    """Answers one token, then goes on when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.go_on = asyncio.Event(), asyncio.Event()

    async def generate(self, job):
        async with aclosing(super().generate(job)) as events:
            async for event in events:
                yield event
                if isinstance(event, TextDelta | GenerationEnd):
                    self.reached.set()
                    await self.go_on.wait()


class Service:
    """The API with a drain file that is not there yet."""

    def __init__(self, folder: Path, drain_timeout_s: float) -> None:
        self.file, self.model = folder / "drain", PatientModel()
        limits = DecoderLimits()
        settings = Settings(
            model="/models/tiny",
            artifact="/a",
            allow_anonymous=True,
            drain_file=str(self.file),
            drain_timeout_s=drain_timeout_s,
        )
        api = build_api(settings, self.model, ImageDecoder(workers=1, limits=limits))
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://test")

    async def chat(self, **fields) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json=body(**fields))

    async def running_chat(self, **fields) -> asyncio.Task[httpx.Response]:
        asking = asyncio.create_task(self.chat(**fields))
        await self.model.reached.wait()
        return asking


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path, SHORT_S)


def code_of(response: httpx.Response) -> str:
    return response.json()["error"]["code"]


async def test_who_comes_later_is_refused(service: Service) -> None:
    service.model.go_on.set()
    assert (await service.client.get("/readyz")).status_code == 200
    assert (await service.chat()).status_code == 200
    service.file.touch()
    for refused in (await service.client.get("/readyz"), await service.chat()):
        assert (refused.status_code, code_of(refused)) == (503, "shutting_down")
        assert int(refused.headers["retry-after"]) >= 1
    assert (await service.client.get("/healthz")).status_code == 200
    service.file.unlink()
    assert (await service.client.get("/readyz")).status_code == 200


async def test_a_running_answer_is_finished_and_waited_for(tmp_path: Path) -> None:
    service = Service(tmp_path, LONG_S)
    asking = await service.running_chat(stream=True)
    waiting = asyncio.create_task(asyncio.to_thread(drain, service.file, 10.0))
    finished_waiting = await asyncio.to_thread(drain, service.file, 0.0)
    assert not finished_waiting
    assert not waiting.done()
    service.model.go_on.set()
    assert (await asking).text.endswith("data: [DONE]\n\n")
    assert await waiting


async def test_a_stream_that_takes_too_long_ends_with_an_error_event(service: Service) -> None:
    asking = await service.running_chat(stream=True)
    service.file.touch()
    answer = await asking
    assert answer.status_code == 200
    last = [block for block in answer.text.split("\n\n") if block][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert service.model.closed == 1


async def test_any_other_answer_that_takes_too_long_is_503(service: Service) -> None:
    asking = await service.running_chat()
    service.file.touch()
    answer = await asking
    assert (answer.status_code, code_of(answer)) == (503, "shutting_down")
    assert "retry-after" in answer.headers


@pytest.mark.parametrize("file", [None, "drain"])
@pytest.mark.parametrize("error", [TimeoutError, KeyError])
async def test_other_errors_stay_what_they_are(tmp_path: Path, file: str | None, error: type[Exception]) -> None:
    with pytest.raises(error):
        async with Drain(file and str(tmp_path / file), 0).request():
            raise error


async def test_a_request_is_waited_for_though_its_process_never_saw_the_file(tmp_path: Path) -> None:
    """As in a process that stands still: here nothing runs while drain() waits."""
    file = tmp_path / "drain"
    async with Drain(str(file), LONG_S).request():
        assert not drain(file, 0.0)
    assert drain(file, 0.0)


async def test_a_drain_that_is_taken_back_lets_everybody_finish_and_the_next_one_waits(tmp_path: Path) -> None:
    file = tmp_path / "drain"
    bounds, limits, go_on = Drain(str(file), 0.6), [], asyncio.Event()

    async def work() -> None:
        async with bounds.request():
            limits.append(next(iter(bounds._running - set(limits))))
            await go_on.wait()

    first = asyncio.create_task(work())
    await asyncio.sleep(0)
    file.touch()
    while limits[0].when() is None:
        await asyncio.sleep(0.01)
    file.unlink()
    while limits[0].when() is not None:
        await asyncio.sleep(0.01)
    second = asyncio.create_task(work())
    await asyncio.sleep(0)
    assert not await asyncio.to_thread(drain, file, 0.0)
    while limits[1].when() is None:
        await asyncio.sleep(0.01)
    assert limits[0].when() == limits[1].when()
    go_on.set()
    await asyncio.gather(first, second)
    assert drain(file, 0.0)


async def test_feedback_is_refused_too(service: Service) -> None:
    service.file.touch()
    refused = await service.client.post("/v1/feedback", json={"request_id": "r", "score": 1})
    assert (refused.status_code, code_of(refused)) == (503, "shutting_down")


def test_what_a_former_drain_left_is_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "drain"
    Drain(str(file), LONG_S)
    assert caplog.text == ""
    file.touch()
    Drain(str(file), LONG_S)
    assert f"{file} exists" in caplog.text


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--drain-file: cannot use .*/no/drain\.lock"):
        WorkLock(str(tmp_path / "no" / "drain"))


async def test_a_second_request_is_bounded_too(tmp_path: Path) -> None:
    """It arrives while the watch for the first runs."""
    drain_file = tmp_path / "drain"
    bounds = Drain(str(drain_file), 0.1)

    async def work() -> str:
        try:
            async with bounds.request():
                await asyncio.Event().wait()
        except ApiError as error:
            return error.code
        raise AssertionError("it cannot end by itself")

    first = asyncio.create_task(work())
    await asyncio.sleep(0)
    second = asyncio.create_task(work())
    await asyncio.sleep(0)
    drain_file.touch()
    assert await asyncio.gather(first, second) == ["shutting_down"] * 2


def test_the_command_waits_for_another_process_and_says_when_it_gave_up(tmp_path: Path) -> None:
    file = tmp_path / "drain"
    command = [sys.executable, "-m", "service.draining", str(file), "--timeout-s", "0.1"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    lock = share(lock_of(file))
    try:
        gave_up = subprocess.run(command, capture_output=True, text=True)
    finally:
        os.close(lock)
    assert gave_up.returncode == 1
    assert gave_up.stderr == "requests are still running after 0.1 s\n"
