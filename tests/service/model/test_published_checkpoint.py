"""A checkpoint in llava-1.5-7b-hf's published layout through the `MODEL=` / `ARTIFACT=` path a user takes."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path

import pytest

from tests.service.examples import encoded, image_part, user
from tests.service.running_server import ENGINES, start_server
from tests.tiny_models import drawn_image

pytestmark = [pytest.mark.service, pytest.mark.slow]


@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_served_and_steered(engine: str, published: tuple[Path, Path]) -> None:
    model, artifact = published
    with tempfile.TemporaryDirectory(prefix="srv") as home:
        paths = ("--model", str(model), "--artifact", str(artifact))
        server = start_server(*paths, engine=engine, home=Path(home))
        try:
            question = user(image_part(encoded(drawn_image(1, (640, 480)))), "What is in the image?")
            common = {"messages": [question], "temperature": 0, "max_tokens": 4, "logprobs": True}
            steered = server.client().chat.completions.create(model=f"{server.name}:steered", **common)
            plain = server.client().chat.completions.create(model=f"{server.name}:off", **common)
            assert server.get("/version").json()["context_tokens"] == 4096
            assert server.stop(signal.SIGTERM) == 0, server.log()
        finally:
            server.process.kill()
    assert steered.usage is not None
    assert steered.usage.prompt_tokens > 576
    receipt = (steered.model_extra or {})["steering"]
    assert receipt["applied"]
    assert receipt["layer"] == 2
    assert not (plain.model_extra or {})["steering"]["applied"]
    first = [answer.choices[0].logprobs.content[0].logprob for answer in (steered, plain) if answer.choices[0].logprobs]
    assert first[0] != first[1]
