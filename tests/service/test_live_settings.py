"""Settings that change while the service runs: from the next request on, whole, or not at all and said so."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.http.api import build_api
from service.images.decoder import DecoderLimits, ImageDecoder
from service.live_settings import LIVE, LiveSettings
from service.settings import BUNDLED_ARTIFACT, BUNDLED_MODEL, Settings
from tests.service.examples import ScriptedModel, body, image_part, user

BUNDLED = Settings(model=str(BUNDLED_MODEL), artifact=str(BUNDLED_ARTIFACT), allow_anonymous=True)


def test_a_change_is_whole() -> None:
    live = LiveSettings(BUNDLED)
    live.change({"default_strength": 0.5, "max_choices": 2})
    assert (live.current.default_strength, live.current.max_choices) == (0.5, 2)
    live.change({"default_preset": "off"})
    assert live.current == BUNDLED.model_copy(update={"default_preset": "off"}), "the rest is as at the start"
    assert live.describe()["changed"] == {"default_preset": "off"}
    live.change({})
    assert live.current == BUNDLED


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"default_strength": 2}, "default_strength: .*less than or equal to 1, but it is 2"),
        ({"max_choices": "many"}, "max_choices: .*integer"),
        ({"max_choice": 2}, "max_choice: is no setting; what may change live: default_artifact, default_preset"),
        ({"port": 1}, "port: needs a new start; what may change"),
        ({"engine": "vllm"}, "engine: needs a new start"),
        ({"default_preset": "captoins"}, "default_preset: there is no preset 'captoins'; off, captions"),
        ({"max_concurrent_requests": 10_000}, "max_concurrent_requests: at most 256"),
        ({"default_strength": 0.5, "max_images": -1}, "max_images"),
    ],
)
def test_a_wrong_change_leaves_the_one_before_in_force(
    changes: dict[str, Any], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    live = LiveSettings(BUNDLED)
    live.change({"max_choices": 3})
    before = live.current
    with caplog.at_level(logging.ERROR, "service.live_settings"):
        live.change(changes)
    assert live.current is before
    told = live.describe()
    assert told["changed"] == {"max_choices": 3}
    assert re.search(says, told["refused"])
    assert told["refused"] in caplog.text
    live.change({"max_choices": 4})
    assert live.describe()["refused"] is None


def test_without_an_artifact_there_is_no_preset_to_choose() -> None:
    live = LiveSettings(BUNDLED.model_copy(update={"steering": "off"}))
    live.change({"default_preset": "captions"})
    assert "steering is off" in live.describe()["refused"]


def test_a_file_is_followed(tmp_path: Path, later: Callable[[], None]) -> None:
    file = tmp_path / "live.json"
    live = LiveSettings(BUNDLED.model_copy(update={"live_file": str(file)}))
    assert live.current.default_strength is None, "nobody has made it yet"
    steps: list[tuple[str | None, float | None, str | None]] = [
        ('{"default_strength": 0.25}', 0.25, None),
        ('{"default_strength": 0.5', 0.25, "cannot be read as JSON"),
        ('["default_strength"]', 0.25, "one JSON object"),
        ('{"default_strength": 0.75}', 0.75, None),
        (None, None, None),
    ]
    for content, strength, refused in steps:
        if content is None:
            file.unlink()
        else:
            file.write_text(content)
        later()
        assert live.current.default_strength == strength
        assert (refused or "") in (live.describe()["refused"] or "")
        assert bool(refused) == bool(live.describe()["refused"])


async def test_the_next_request_has_it_and_the_document_and_the_version_say_so() -> None:
    model, live = ScriptedModel(), LiveSettings(BUNDLED)
    decoder = ImageDecoder(workers=1, limits=DecoderLimits())
    api = build_api(BUNDLED, model, decoder, live=live)
    ask = body(user(image_part(), "what?"), model=BUNDLED.model_name, n=2)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://test") as client:
        assert (await client.get("/version")).json()["live_settings"]["changed"] == {}
        live.change({"default_strength": 0.5, "max_choices": 1})
        refused = await client.post("/v1/chat/completions", json=ask)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
        await client.post("/v1/chat/completions", json={**ask, "n": 1})
        assert model.jobs[-1].steering.settings.strength == 0.5
        document = json.dumps((await client.get("/openapi.json")).json())
        assert '"maximum": 1,' in document or '"maximum": 1}' in document
        assert (await client.get("/version")).json()["live_settings"]["changed"]["max_choices"] == 1
    decoder.close()


@pytest.mark.parametrize("name", LIVE)
def test_every_live_setting_is_one(name: str) -> None:
    assert name in Settings.model_fields
