"""What leaves for a service is what the service takes: the same pixels, the same words, the steering beside them.

The official client speaks to a socket of this process that answers as the service's contract says.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from steering.request import SteeringRequest
from tests.tiny_models import drawn_image
from training.evaluation.asking import OverHttp, Question, ask_all

RECEIPT = {"applied": True, "reason": None, "artifact": "abc", "positions": [3], "relative_shift": [0.25]}


class Listener(ThreadingHTTPServer):
    received: list[dict[str, Any]]


class Contract(BaseHTTPRequestHandler):
    server: Listener

    def do_GET(self) -> None:
        self._send({"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "x"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.received.append(body)
        message = {"role": "assistant", "content": body["messages"][-1]["content"][-1]["text"].upper()}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        self._send(answer | {"steering": RECEIPT})

    def _send(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener(("127.0.0.1", 0), Contract) as server:
        server.received = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def question(index: int, **changed: Any) -> Question:
    settings = {"text": f"question {index}", "max_tokens": 7, "steering": SteeringRequest(preset="questions")}
    return Question(image=drawn_image(index), **settings | changed)


async def test_pixels_words_and_steering_arrive(listener: Listener):
    async with OverHttp(f"http://127.0.0.1:{listener.server_port}", artifact="abc") as service:
        asked = [
            question(0),
            question(1, earlier=("Describe.", "A star."), temperature=0.5, seed=11),
            question(2, steering=SteeringRequest()),
        ]
        replies = await ask_all(service, iter(asked), total=3, concurrency=1, report=lambda line: None)
        assert [reply.text for reply in replies] == ["QUESTION 0", "QUESTION 1", "QUESTION 2"]
        assert (replies[0].applied, replies[0].positions, replies[0].relative_shift) == (True, 3, 0.25)
    first, second, third = listener.received
    assert first["steering"] == {"preset": "questions"}
    assert "steering" not in third  # left to the server's default
    assert (first["model"], first["max_tokens"], first["temperature"]) == ("m", 7, 0)
    assert (second["temperature"], second["seed"]) == (0.5, 11)
    assert [turn["role"] for turn in second["messages"]] == ["user", "assistant", "user"]
    for index, body in enumerate((first, second, third)):
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        sent = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
        assert sent.tobytes() == drawn_image(index).tobytes()


async def test_another_artifact_and_forced_answers_are_refused(listener: Listener):
    async with OverHttp(f"http://127.0.0.1:{listener.server_port}", artifact="other") as service:
        with pytest.raises(ValueError, match="the service has artifact abc, not other"):
            await service.reply(question(0))
        with pytest.raises(ValueError, match="cannot be forced over HTTP"):
            await service.reply(question(0, answer_so_far=(1,)))
