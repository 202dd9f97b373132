"""The real service as processes: what a disconnect frees, what a stranger may not, what is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import pytest
from transformers import AutoProcessor

from tests.service.examples import body, encoded, image_part, user
from tests.service.running_server import REPOSITORY, RunningServer, any_engine_will_do, run_command
from tests.tiny_models import drawn_image

pytestmark = [pytest.mark.service, pytest.mark.slow]
MAX_ONGOING = 12
"""As `conftest.py` starts the server."""
COMPLETION_TOKENS = 'vlsae_completion_tokens_total{arm="none"}'
SENT = 40
"""At once: twice what a replica and its queue hold."""


@pytest.fixture
def endless(server: RunningServer, checkpoint: tuple[Path, Path]) -> dict:
    """A request that runs into its limit: the end-of-sequence token is forbidden."""
    end_token = AutoProcessor.from_pretrained(checkpoint[0]).tokenizer.eos_token_id
    content = user(image_part(encoded(drawn_image(1))), "go on")
    context = server.get("/version").json()["context_tokens"]
    return body(content, model=server.name, n=8, max_tokens=context - 60, logit_bias={str(end_token): -100})


def test_a_client_that_leaves_a_stream_frees_the_engine(server: RunningServer, endless: dict) -> None:
    cancelled = 'vlsae_requests_total{applied="unknown",arm="none",artifact="main",finish="cancelled"}'
    before, tokens = server.metric(cancelled), server.metric(COMPLETION_TOKENS)
    with httpx.stream(
        "POST", server.url + "/v1/chat/completions", json={**endless, "stream": True}, timeout=30
    ) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        next(lines)
        while server.running() != 8:
            next(lines)
    server.wait_until_idle()
    assert server.metric(cancelled) == before + 1
    assert server.metric(COMPLETION_TOKENS) - tokens < endless["n"] * endless["max_tokens"] / 2, "it ran on"


async def test_a_client_that_does_not_wait_frees_the_engine(server: RunningServer, endless: dict) -> None:
    """Without a stream: it hangs up as soon as the engine runs."""
    tokens = server.metric(COMPLETION_TOKENS)
    async with httpx.AsyncClient() as client:
        asking = asyncio.create_task(client.post(server.url + "/v1/chat/completions", json=endless, timeout=30))
        while await asyncio.to_thread(server.running) < 8:
            assert not asking.done(), "it was answered before it was seen to run"
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    await asyncio.to_thread(server.wait_until_idle)
    assert server.metric(COMPLETION_TOKENS) - tokens < endless["n"] * endless["max_tokens"] / 2, "it ran on"


def test_the_first_token_does_not_wait_for_others(server: RunningServer, endless: dict) -> None:
    ask = {**endless, "n": 1, "max_tokens": 300, "stream": True}
    with httpx.stream("POST", server.url + "/v1/chat/completions", json=ask, timeout=60) as answer:
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        assert server.metric("vlsae_requests_in_progress") == 1, "it has come before the last one was made"
        assert len(list(lines)) > 50


async def test_a_full_queue_is_503_and_everything_else_is_answered(server: RunningServer, endless: dict) -> None:
    ask = {**endless, "n": 1, "max_tokens": 200}  # the first is still being answered when the last arrives
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=SENT + 1)) as client:
        asked = [asyncio.create_task(client.post(server.url + "/v1/chat/completions", json=ask)) for _ in range(SENT)]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        ready = await client.get(server.url + "/readyz")
        assert ready.status_code == 200, "busy is not ill"
        answers = await asyncio.gather(*asked)
    served = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 503]
    assert len(served) + len(refused) == SENT
    assert len(served) >= MAX_ONGOING
    assert {answer.json()["usage"]["completion_tokens"] for answer in served} == {ask["max_tokens"]}
    assert refused
    for answer in refused:
        assert answer.json()["error"]["code"] == "overloaded"
        assert int(answer.headers["retry-after"]) >= 1
    server.wait_until_idle()


@any_engine_will_do
def test_a_taken_port_is_named_before_anything_starts(server: RunningServer) -> None:
    command = run_command("--port", str(server.port))
    failed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    assert failed.returncode == 2
    assert f"127.0.0.1:{server.port}" in failed.stderr
    assert "choose another" in failed.stderr
    assert failed.stdout == ""


def test_torch_is_in_the_model_s_process_only(server: RunningServer) -> None:
    def loads_torch(part: str) -> bool:
        return "libtorch" in Path(f"/proc/{server.pid_of(part)}/maps").read_text()

    assert loads_torch(":Model")
    assert not loads_torch(":Ingress")
    assert not loads_torch("ProxyActor")


def test_http_listens_on_loopback_only(server: RunningServer) -> None:
    assert _listening_addresses(server.port) == {"0100007F"}, "127.0.0.1, as the kernel writes it"


def _listening_addresses(port: int) -> set[str]:
    """Local addresses (hexadecimal, as in /proc) that listen on a port, IPv4 and IPv6."""
    rows = [
        line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    listening = [row[1].split(":") for row in rows if row[3] == "0A"]
    return {address for address, local_port in listening if int(local_port, 16) == port}


def join_ray(server: RunningServer, home: Path, token: str | None) -> subprocess.Popen[str]:
    """A stranger's attempt to use the service's Ray and to run something there."""
    raylet = next(line for line in server.command_lines().values() if "/raylet " in line)
    address = next(word.removeprefix("--gcs-address=") for word in raylet.split() if word.startswith("--gcs-address="))
    program = (
        f"import ray; ray.init(address={address!r}, log_to_driver=False);"
        "print('ran', ray.get(ray.remote(num_cpus=0)(lambda: 41 + 1).remote()))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home)} | ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {})
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=pipe, stderr=pipe, text=True, cwd=home
    )


def token_of(server: RunningServer) -> str:
    environment = Path(f"/proc/{server.pid_of('/raylet ')}/environ").read_text().split("\0")
    return next(entry.partition("=")[2] for entry in environment if entry.startswith("RAY_AUTH_TOKEN="))


@any_engine_will_do
def test_only_who_has_the_token_can_use_ray(server: RunningServer, tmp_path: Path) -> None:
    tokens = {"tokenless": None, "wrong": "0" * 64, "right": token_of(server)}
    attempts = {name: join_ray(server, tmp_path, token) for name, token in tokens.items()}
    shown = {name: attempt.communicate(timeout=100) for name, attempt in attempts.items()}
    for name in ("tokenless", "wrong"):
        assert attempts[name].returncode != 0
        assert "ran" not in shown[name][0]
        assert "uthenticat" in shown[name][1], name
    assert shown["right"][0] == "ran 42\n", shown["right"][1]


@any_engine_will_do
def test_a_killed_image_decoder_is_replaced(server: RunningServer) -> None:
    ask = body(user(image_part(), "what ?"), model=server.name, max_tokens=1)
    assert httpx.post(server.url + "/v1/chat/completions", json=ask, timeout=30).status_code == 200
    for pid, line in server.command_lines().items():
        if "images/worker.py" in line:
            os.kill(pid, signal.SIGKILL)
    assert httpx.post(server.url + "/v1/chat/completions", json=ask, timeout=30).status_code == 200


def test_a_damaged_artifact_stops_the_start(checkpoint: tuple[Path, Path]) -> None:
    model, artifact = checkpoint
    with tempfile.TemporaryDirectory(prefix="srv") as home:
        damaged = Path(home) / "artifact"
        subprocess.run(["cp", "-r", str(artifact), str(damaged)], check=True)
        weights = bytearray((damaged / "model.safetensors").read_bytes())
        weights[-10] ^= 1
        (damaged / "model.safetensors").write_bytes(weights)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        failed = subprocess.run(
            run_command("--port", str(port), "--model", str(model), "--artifact", str(damaged)),
            cwd=REPOSITORY, capture_output=True, text=True, timeout=200, env={**os.environ, "TMPDIR": home},
        )  # fmt: skip
        assert failed.returncode == 1
        assert "error: " in failed.stderr
        assert "the artifact was changed or damaged" in failed.stderr
        assert "Traceback" not in failed.stderr
        assert list(Path(home).glob("vlsae-*")) == []
