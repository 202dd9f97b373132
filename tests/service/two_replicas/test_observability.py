"""A real service of two ingress and two model replicas, watched from outside: sums, a Prometheus, a collector, a log,
and nothing of what clients said in any of them.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import yaml
from PIL.PngImagePlugin import PngInfo

from tests.service.examples import body, encoded, image_part, picture, user
from tests.service.running_server import REPOSITORY, free_port
from tests.service.trace_collector import attributes
from tests.service.watched_server import Watched
from tests.tiny_models import drawn_image

pytestmark = [pytest.mark.service, pytest.mark.slow]
CHAT = "/v1/chat/completions"
PROMETHEUS = REPOSITORY / "deploy/prometheus"
DASHBOARD = json.loads((REPOSITORY / "deploy/grafana/dashboard.json").read_text())
TRACE = "0af7651916cd43dd8448eb211c80319c"
PATIENCE_S = 40
ONLY_SOMETIMES = re.compile("feedback|assignments")
"""What the dashboard has of these needs a caller that gives it, or an experiment."""
TOKENS = 'vlsae_completion_tokens_total{"arm": "none"}'
SECRETS = {
    place: f"hush{place}{number:04d}hush"
    for number, place in enumerate(
        ("system", "user", "assistant", "stop", "metadata", "picture", "header", "key", "query", "model", "path",
         "field", "schema", "requestid", "tracestate", "notjson", "cookie")
    )
}  # fmt: skip


def asks(model: str) -> list[dict]:
    """Requests of many kinds, refused ones too."""
    seen = image_part(encoded(drawn_image(1)))
    kinds = [
        {"messages": [user(seen, "what ?")], "max_tokens": 4, "model": f"{model}:steered"},
        {"messages": [user(seen, "what ?")], "max_tokens": 3, "n": 2, "model": f"{model}:off"},
        {"messages": [user(seen, seen, "what ?")], "max_tokens": 5, "stream": True},
        {"messages": [user("what ?")], "max_tokens": 2, "n": 3},
        {"messages": [user("what ?")], "max_tokens": 0},
        {"messages": [user("what ?")], "model": "other"},
    ]
    return [{"model": model, "temperature": 0, **kind} for kind in kinds] * 5


def answer_of(response: httpx.Response) -> dict:
    """The completion; of a stream what its last chunk and the usage chunk would say."""
    if response.headers["content-type"] == "application/json":
        return response.json()
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    finish = [choice for event in events for choice in event["choices"] if choice.get("finish_reason")]
    return {"usage": events[-1]["usage"], "choices": finish, "steering": events[-1]["steering"]}


def test_the_counts_are_what_was_sent_whoever_answers_the_scrape(watched: Watched) -> None:
    before, logged = watched.scrape(), len(watched.lines())

    def send(ask: dict) -> httpx.Response:
        options = {"stream_options": {"include_usage": True}} if ask.get("stream") else {}
        return watched.client.post(CHAT, json=ask | options)

    with ThreadPoolExecutor(6) as pool:
        responses = list(pool.map(send, asks(watched.server.name)))
    answers = [answer_of(response) for response in responses if response.status_code == 200]
    refused = [response.json()["error"]["code"] for response in responses if response.status_code != 200]
    expected = Counter()
    for answer in answers:
        finish = "length" if any(choice["finish_reason"] == "length" for choice in answer["choices"]) else "stop"
        applied = "true" if answer["steering"]["applied"] else "false"
        expected[
            f'vlsae_requests_total{{"applied": "{applied}", "arm": "none", "artifact": "main", "finish": "{finish}"}}'
        ] += 1
        expected["vlsae_prompt_tokens_total{}"] += answer["usage"]["prompt_tokens"]
        expected[TOKENS] += answer["usage"]["completion_tokens"]
    for code in refused:
        expected[f'vlsae_rejections_total{{"arm": "none", "reason": "{code}"}}'] += 1
    for response in responses:
        labels = f'{{"route": "{CHAT}", "status": "{response.status_code}"}}'
        expected[f"vlsae_http_responses_total{labels}"] += 1
    expected["vlsae_images_total{}"] = 5 * 4
    expected["vlsae_image_pixels_total{}"] = 5 * 4 * drawn_image(1).width * drawn_image(1).height
    for name in ("time_to_first_token", "request_duration"):
        expected[f'vlsae_{name}_seconds_count{{"arm": "none"}}'] = len(answers)
        expected[f'vlsae_{name}_seconds_bucket{{"arm": "none", "le": "+Inf"}}'] = len(answers)
    expected['vlsae_relative_shift_ratio_count{"arm": "none"}'] = 10
    expected["vlsae_requests_in_progress{}"] = expected["vlsae_requests_waiting{}"] = 0
    assert len(answers) == 20

    def counted() -> dict[str, float]:
        after = watched.scrape()
        assert after["vlsae_ready{}"] == 1
        return {name: after.get(name, 0) - before.get(name, 0) for name in expected}

    deadline = time.monotonic() + PATIENCE_S
    while counted() != expected and time.monotonic() < deadline:  # the last is counted after its last byte was sent
        time.sleep(0.1)
    for _ in range(12):
        assert counted() == expected
    lines = watched.lines()[logged:]
    assert len(lines) == 30
    assert len({line["process"] for line in lines}) == 2, "both ingress processes have answered"
    assert sum(":Model" in line for line in watched.server.command_lines().values()) == 2
    assert {line["key"] for line in lines} == {"alice"}
    assert sum(line.get("completion_tokens", 0) for line in lines) == expected[TOKENS]


def test_a_real_prometheus_scrapes_it_and_its_sums_are_right(watched: Watched) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("needs Prometheus")
    folder, port = watched.home / "prometheus", free_port()
    shutil.copytree(PROMETHEUS, folder)
    (folder / "metrics_key").write_text(watched.secrets["monitor"])
    config = yaml.safe_load((folder / "prometheus.yml").read_text().replace("# authorization", "authorization"))
    (job,) = config["scrape_configs"]
    assert job["authorization"] == {"credentials_file": "metrics_key"}, "the commented line is there to be used"
    job["static_configs"] = [{"targets": [watched.server.url.removeprefix("http://")]}]
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = ["prometheus", "--config.file=prometheus.yml", f"--web.listen-address=127.0.0.1:{port}"]
    running = subprocess.Popen([*command, "--log.level=error", "--storage.tsdb.path=data"], cwd=folder)
    try:
        prometheus = httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", transport=httpx.HTTPTransport(retries=9))
        expressions = [
            target["expr"].replace("$__rate_interval", "20s")
            for panel in DASHBOARD["panels"]
            for target in panel["targets"]
        ]
        _until_scraped(prometheus, watched)
        for ask in asks(watched.server.name):
            watched.client.post(CHAT, json=ask)
        _until_scraped(prometheus, watched)
        _until(
            lambda: [one for one in expressions if not ONLY_SOMETIMES.search(one) and not _query(prometheus, one)] == []
        )
        _until(lambda: {rule["health"] for rule in _rules(prometheus)} == {"ok"})
        _until(lambda: [rule["name"] for rule in _rules(prometheus) if rule["state"] != "inactive"] == [])
    finally:
        running.terminate()
        running.wait()


def _rules(prometheus: httpx.Client) -> list[dict]:
    (group,) = prometheus.get("/rules").json()["data"]["groups"]
    return group["rules"]


def _until(condition: Callable[[], bool]) -> None:
    """A scrape may come late on a busy machine; the next one does not."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def _query(prometheus: httpx.Client, expression: str) -> list[dict]:
    answer = prometheus.get("/query", params={"query": expression}).json()
    assert answer["status"] == "success", answer
    return answer["data"]["result"]


def _until_scraped(prometheus: httpx.Client, watched: Watched) -> None:
    """Prometheus knows what the service knows now."""
    names = ("vlsae_requests_total", "vlsae_completion_tokens_total", "vlsae_image_pixels_total")
    scraped = watched.scrape()
    known = {name: sum(value for sample, value in scraped.items() if sample.startswith(name + "{")) for name in names}
    deadline, told = time.monotonic() + PATIENCE_S, {}
    while told != known:
        assert time.monotonic() < deadline, (told, known)
        time.sleep(0.2)
        results = {name: _query(prometheus, f"sum({name})") for name in names}
        told = {name: float(result[0]["value"][1]) for name, result in results.items() if result}


def test_traces_of_a_service_of_several_processes(watched: Watched) -> None:
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    ask = body(user(image_part(), "what ?"), model=watched.server.name, max_tokens=2)
    answered = watched.client.post(CHAT, json=ask, headers=headers)
    spans = watched.collector.trace(TRACE)
    assert set(spans) == {f"POST {CHAT}", "images", "queue", "generation"}
    known = attributes(spans[f"POST {CHAT}"])
    assert known["vlsae.request_id"] == answered.headers["x-request-id"]
    assert known["gen_ai.response.id"] == answered.json()["id"]
    assert known["vlsae.key"] == "alice"


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/v1/models", {}, 200),
        ("GET", "/healthz", {"authorization": ""}, 200),
        ("GET", "/v1/models", {"authorization": "Bearer wrong"}, 401),
        ("GET", "/metrics", {}, 403),
        ("GET", "/nowhere", {}, 404),
        ("GET", "/-/routes", {}, 404),
        ("GET", CHAT, {}, 405),
        ("POST", CHAT, {}, 415),
    ],
)
def test_one_request_id_on_every_answer(
    watched: Watched, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    for sent in ({}, {"x-request-id": "mine-1"}):
        response = watched.client.request(method, path, headers=headers | sent)
        assert response.status_code == status
        (returned,) = response.headers.get_list("x-request-id")
        assert returned == sent.get("x-request-id", returned)
        assert len(returned) >= 6


def test_what_clients_say_is_written_nowhere(watched: Watched) -> None:
    say, client, model = SECRETS, watched.client, watched.server.name
    noted = PngInfo()
    noted.add_text("comment", say["picture"])
    image = encoded(picture(), pnginfo=noted)
    talk = body(
        {"role": "system", "content": say["system"]}, user(image_part(image), say["user"]),
        {"role": "assistant", "content": say["assistant"]}, user("go on"), model=model, max_tokens=3,
        stop=[say["stop"]], metadata={"note": say["metadata"]},
    )  # fmt: skip
    headers = {
        "x-note": say["header"], "cookie": say["cookie"],
        "traceparent": f"00-{TRACE[::-1]}-b7ad6b7169203331-01", "tracestate": f"a={say['tracestate']}",
    }  # fmt: skip
    assert client.post(CHAT, json=talk, headers=headers, params={"q": say["query"]}).status_code == 200
    with client.stream("POST", CHAT, json=talk | {"stream": True, "max_tokens": 80}, headers=headers) as left:
        next(left.iter_lines())
    assert client.post(CHAT, json=talk | {"model": say["model"]}).status_code == 404
    assert client.post(CHAT, json=talk | {say["field"]: 1}).status_code == 400
    assert client.post(CHAT, json=talk | {"n": say["schema"]}).status_code == 400
    assert client.post(CHAT, content=say["notjson"], headers={"content-type": "application/json"}).status_code == 400
    assert client.post(CHAT, json=talk, headers={"x-request-id": say["requestid"] + " !"}).status_code == 400
    assert client.post(CHAT, json=talk, headers={"authorization": f"Bearer {say['key']}"}).status_code == 401
    assert client.get(f"/v1/models/{say['path']}").status_code == 404
    assert client.get(f"/{say['path']}").status_code == 404
    watched.collector.trace(TRACE[::-1])
    forbidden = [secret.encode() for secret in (*say.values(), *watched.secrets.values())]
    forbidden += [base64.b64encode(image)[60:100], image[45:75]]
    places = {"traces": watched.collector.received}
    for path in watched.home.rglob("*"):
        if path.is_file() and "prometheus" not in path.parts:
            places[str(path.relative_to(watched.home))] = path.read_bytes()
    assert "service.log" in places
    assert any("/serve/replica_" in place for place in places), "Ray's session folder is among them"
    assert [(place, secret) for place, content in places.items() for secret in forbidden if secret in content] == []
