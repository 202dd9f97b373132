"""The command that a newcomer pastes."""

from __future__ import annotations

import json
import shlex

from service.example import curl_command, example_body, example_picture
from service.images.worker import decode
from tests.service.examples import parse_chat


def test_the_picture_is_real() -> None:
    image = decode(example_picture(), 10_000, 100)
    assert len(set(image.get_flattened_data())) == 4, "the ground and three shapes"


def test_the_body_is_a_valid_request() -> None:
    chat = parse_chat(json.dumps(example_body("tiny")).encode())
    assert chat.model == "tiny"


def test_a_shell_reads_the_command_as_it_is_meant() -> None:
    words = shlex.split(curl_command("http://127.0.0.1:8000", "tiny"))
    assert words[:3] == ["curl", "-sS", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(words[-1]) == example_body("tiny")
