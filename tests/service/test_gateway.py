"""The gateway as a process: found, checked, started, gone with its parent; and what is refused where it is not."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import trustme

from service import gateway as module
from service.gateway import Gateway, GatewayError, check_serve_mode, free_port, settle_gateway
from service.http.api import build_api
from service.http.middleware import GATEWAY_HEADER
from service.images.decoder import DecoderLimits, ImageDecoder
from service.settings import LaunchSettings, Settings, SettingsError
from tests.service.examples import ScriptedModel, body
from tests.service.gateways import running_backend, running_gateway
from tests.service.running_server import REPOSITORY, RunningServer

CHAT = "/v1/chat/completions"


def addresses(port: int) -> dict[str, str]:
    return {"GATEWAY_BIND": f"127.0.0.1:{port}", "GATEWAY_SERVER": "127.0.0.1:1"}


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, ssl.SSLContext]:
    """A PEM file of certificate and key, and who trusts it."""
    authority, file, trusting = trustme.CA(), tmp_path / "gateway.pem", ssl.create_default_context()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(file))
    authority.configure_trust(trusting)
    return file, trusting


async def test_clients_can_speak_tls_and_nothing_else_then(certificate: tuple[Path, ssl.SSLContext]) -> None:
    file, trusting = certificate
    async with running_backend() as backend:
        settings = LaunchSettings(host="127.0.0.1", port=free_port(), tls_certificate=str(file))
        with Gateway.before(settle_gateway(settings), server_port=backend.port):
            async with httpx.AsyncClient(verify=trusting) as client:
                answer = await client.get(f"https://127.0.0.1:{settings.port}/a")
                assert answer.json()["path"] == "/a"
                with pytest.raises(httpx.RemoteProtocolError):
                    await client.get(f"http://127.0.0.1:{settings.port}/a")


def test_a_certificate_that_is_none_stops_the_start(tmp_path: Path) -> None:
    file = tmp_path / "gateway.pem"
    with pytest.raises(SettingsError, match=f"--tls-certificate: {file} is not a file"):
        settle_gateway(LaunchSettings(tls_certificate=str(file)))
    file.write_text("nonsense")
    with pytest.raises(SettingsError, match=r"--gateway: HAProxy refuses [\s\S]*gateway.pem"):
        Gateway.before(LaunchSettings(tls_certificate=str(file)), server_port=1)


def test_a_gateway_that_is_not_there_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SettingsError, match=r"--gateway: there is no HAProxy here: .*--gateway external"):
        Gateway(addresses(1))


def test_a_gateway_that_cannot_listen_is_none() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(GatewayError, match=f"does not listen on 127.0.0.1:{port}"):
            Gateway(addresses(port)).start()


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ({}, "off"),
        ({"host": "::1"}, "off"),
        ({"host": "localhost"}, "off"),
        ({"host": "0.0.0.0"}, "on"),
        ({"host": "::"}, "on"),
        ({"host": "example.org"}, "on"),
        ({"gateway": "on"}, "on"),
        ({"host": "0.0.0.0", "gateway": "external"}, "external"),
    ],
)
def test_what_auto_means(given: dict, means: str) -> None:
    assert settle_gateway(LaunchSettings(**given)).gateway == means


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"host": "0.0.0.0", "gateway": "off"}, "--gateway: off leaves 0.0.0.0 without limits.*external"),
        ({"gateway": "off", "tls_certificate": "a"}, "--tls-certificate: .*--gateway is off"),
        ({"gateway": "external", "tls_certificate": "a"}, "--tls-certificate: .*--gateway is external"),
    ],
)
def test_limits_that_nobody_would_keep_stop_the_start(given: dict, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        settle_gateway(LaunchSettings(**given))


def test_serve_s_own_ways_to_clients_are_refused() -> None:
    check_serve_mode({"RAY_SERVE_ENABLE_HA_PROXY": "0"})
    for variable in module.SERVE_MODES:
        with pytest.raises(SettingsError, match=f"{variable}: .*past the gateway"):
            check_serve_mode({variable: "1"})


def test_serve_still_knows_the_modes_that_are_refused() -> None:
    from ray.serve._private import constants

    assert [name for name in module.SERVE_MODES if not hasattr(constants, name)] == []


def test_an_operator_s_values_are_in_force_and_no_other_variable_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_SOURCE_REQUESTS", "3")
    monkeypatch.setenv("VLSAE_KEYS", "secret")
    with running_gateway(1) as port:
        answers = [httpx.get(f"http://127.0.0.1:{port}/a", timeout=30).status_code for _ in range(5)]
    assert (answers[0], answers[-1]) == (503, 429)
    assert set(Gateway(addresses(1))._environment) == {"GATEWAY_BIND", "GATEWAY_SERVER", "GATEWAY_SOURCE_REQUESTS"}


def test_it_goes_with_its_parent(tmp_path: Path) -> None:
    program = tmp_path / "parent.py"
    program.write_text(
        "import os\n"
        "from service.gateway import Gateway\n"
        f"gateway = Gateway({addresses(free_port())!r})\n"
        "gateway.start()\n"
        "print(gateway._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    left = subprocess.run([sys.executable, str(program)], env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while RunningServer.alive([int(left.stdout)]):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("promised", ["on", "external"])
async def test_what_comes_past_a_promised_gateway_is_refused(promised: str) -> None:
    """All but probes and scrapes."""
    settings = Settings(model="/models/tiny", artifact="/a", allow_anonymous=True, gateway=promised)  # type: ignore[arg-type]
    decoder = ImageDecoder(workers=1, limits=DecoderLimits(max_side=999))
    transport = httpx.ASGITransport(app=build_api(settings, ScriptedModel(), decoder))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for headers in ({}, {GATEWAY_HEADER: "off"}):
            refused = await client.post(CHAT, json=body(), headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")
            assert (await client.get("/nowhere", headers=headers)).status_code == 403
            assert (await client.get("/healthz", headers=headers)).status_code == 200
            assert (await client.get("/metrics", headers=headers)).status_code == 200
        assert (await client.post(CHAT, json=body(), headers={GATEWAY_HEADER: "on"})).status_code == 200
    decoder.close()
