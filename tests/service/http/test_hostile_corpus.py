"""The hostile corpus against the real service, what is about the wire through a gateway: three passes, the status of
every input, and what they leave behind.

Whatever a pass costs for good must show between the second and the third: by then every buffer has had its size. Where
the third grew, two more tell a buffer that came late from something that every pass costs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from transformers import AutoProcessor

from tests.service.examples import body, data_url, user
from tests.service.gateways import running_gateway
from tests.service.hostile.bodies import BAD_BODIES, LARGE_BODIES, MISSING_MODELS, MODEL, ODD_BODIES
from tests.service.hostile.clients import BEHAVIOURS, Address, endless_request, send
from tests.service.hostile.pictures import HOSTILE_PICTURES, UNUSUAL_PICTURES
from tests.service.hostile.urls import HOSTILE_URLS
from tests.service.hostile.wire import CHAT, wire_requests
from tests.service.running_server import RunningServer, any_engine_will_do

pytestmark = [pytest.mark.service, pytest.mark.slow]
PASSES, MORE_PASSES = 3, 2
MAX_GROWTH = 0.02
URL_FIELD = "messages[0].content[0].image_url.url"
Seen = tuple[str, int, set[int], str]
"""Name, status, the statuses it may have, what is wrong with the error object if anything is."""


def with_url(url: str, model: str) -> bytes:
    part = {"type": "image_url", "image_url": {"url": url}}
    return json.dumps(body(user(part, "what ?"), model=model, max_tokens=1, temperature=0)).encode()


def post(client: httpx.Client, content: bytes) -> httpx.Response:
    return client.post(CHAT, content=content, headers={"content-type": "application/json"})


def fault_of(response: httpx.Response, param: str | None = None) -> str:
    """What is wrong with an error's shape; nothing of Python, Pillow or our folders may show in its message."""
    if response.status_code == 200:
        return "" if "choices" in response.json() else "no choices"
    error = response.json()["error"]
    told = [word for word in ("PIL", "Traceback", "pydantic", "/work", "site-packages", "0x7") if word in response.text]
    if set(error) != {"message", "type", "param", "code"} or not error["message"] or len(error["message"]) > 2000:
        return f"not an error: {error}"
    if param is not None and error["param"] != param:
        return f"names {error['param']}"
    return f"tells {told}" if told else ""


def pictures(client: httpx.Client, address: Address) -> Iterator[Seen]:
    for table, status in ((HOSTILE_PICTURES, 400), (UNUSUAL_PICTURES, 200)):
        for name, data in table.items():
            response = post(client, with_url(data_url(data), address.model))
            yield f"picture: {name}", response.status_code, {status}, fault_of(response, URL_FIELD)


def urls(client: httpx.Client, address: Address) -> Iterator[Seen]:
    for name, url in HOSTILE_URLS.items():
        response = post(client, with_url(url, address.model))
        yield f"URL: {name}", response.status_code, {400}, fault_of(response, URL_FIELD)


def bodies(client: httpx.Client, address: Address) -> Iterator[Seen]:
    for table, status in ((BAD_BODIES, 400), (LARGE_BODIES, 413), (MISSING_MODELS, 404), (ODD_BODIES, 200)):
        for name, content in table.items():
            response = post(client, content.replace(MODEL.encode(), address.model.encode()))
            yield f"body: {name}", response.status_code, {status}, fault_of(response)


def wires(_client: httpx.Client, address: Address) -> Iterator[Seen]:
    for name, (data, statuses) in wire_requests(address.model).items():
        yield f"wire: {name}", send(address, data), statuses, ""


def behaviours(_client: httpx.Client, address: Address) -> Iterator[Seen]:
    for behave, statuses in BEHAVIOURS.items():
        yield f"client: {behave.__name__}", behave(address), statuses, ""


CORPUS = (pictures, urls, bodies, wires, behaviours)


def memory_mb(server: RunningServer) -> dict[str, float]:
    """Of its processes by their names, what several share once; without files they have mapped, such as libraries: how
    much of those is counted here depends on who else on the machine uses them.
    """
    used: dict[str, float] = {}
    for pid, command in {server.process.pid: "service", **server.command_lines()}.items():
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:  # it ended in between
            continue
        lines = [line.split() for line in rollup.splitlines() if line.startswith(("Pss_Anon:", "Pss_Shmem:"))]
        assert len(lines) == 2, rollup
        name = " ".join(Path(word).name for word in command.split()[:3])
        used[name] = used.get(name, 0.0) + sum(int(line[1]) for line in lines) / 1024
    return used


def growth(used: list[dict[str, float]]) -> float:
    """In the last pass, as a share."""
    return sum(used[-1].values()) / sum(used[-2].values()) - 1


@pytest.fixture
def address(server: RunningServer, checkpoint: tuple[Path, Path]) -> Iterator[Address]:
    """The gateway's."""
    end_token = AutoProcessor.from_pretrained(checkpoint[0]).tokenizer.eos_token_id
    context = server.get("/version").json()["context_tokens"]
    with running_gateway(server.port, IDLE_TIMEOUT="5s") as port:
        yield Address(port, server.name, endless_request(server.name, end_token, context))


@any_engine_will_do
@pytest.mark.timeout(900)
def test_three_passes(server: RunningServer, address: Address) -> None:
    used: list[dict[str, float]] = []
    tried = 0
    while len(used) < PASSES or (growth(used) >= MAX_GROWTH and len(used) < PASSES + MORE_PASSES):
        with httpx.Client(base_url=server.url, timeout=60) as client:
            seen = [one for part in CORPUS for one in part(client, address)]
        tried = len(seen)
        wrong = [one for one in seen if one[1] not in one[2] or one[3]]
        assert wrong == []
        server.wait_until_idle()
        assert server.get("/readyz").status_code == 200
        used.append(memory_mb(server))
    passes = [round(sum(one.values())) for one in used]
    print(f"{tried} inputs; memory {passes} MiB; growth in the last pass {growth(used):.2%}")
    assert tried >= 120
    assert growth(used) < MAX_GROWTH, [{name: round(mb) for name, mb in one.items()} for one in used[-2:]]
