"""From a body to a job: aliases, steering sources, limits, sampling, images in order."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from service.callers.keys import ANYBODY
from service.callers.ledger import Ledger
from service.chat.admission import MemoryBudget
from service.chat.request import ChatRunner, RequestContext, check_limits, sampling_of, turns_of
from service.chat.schemas import ChatCompletionRequest
from service.chat.steering_sources import find_alias, merge_steering
from service.concepts.names import ConceptNames
from service.errors import ApiError
from service.images.decoder import DecoderLimits, ImageDecoder
from service.metrics.exposition import Metrics
from service.metrics.meter import Meter
from service.metrics.request_record import RequestRecord, Tracing
from service.settings import Settings
from steering.engines.base import ResponseFormat
from steering.request import SteeringRequest
from tests.service.examples import ScriptedModel, body, encoded, image_part, json_schema, parse_chat, picture, user

SETTINGS = Settings(model="/models/tiny", artifact="/a")


def parsed(content: dict) -> ChatCompletionRequest:
    return parse_chat(json.dumps(content).encode())


@pytest.fixture
async def decoder() -> AsyncIterator[ImageDecoder]:
    decoder = ImageDecoder(workers=1, limits=DecoderLimits())
    yield decoder
    decoder.close()


async def job_of(decoder: ImageDecoder, content: dict, settings: Settings = SETTINGS):
    runner = ChatRunner(
        model=ScriptedModel(),
        decoder=decoder,
        remote=None,
        names=ConceptNames(None),
        ledger=Ledger(),
        tracing=Tracing(endpoint=None),
    )
    record, memory = RequestRecord(request_id="r", method="POST"), MemoryBudget(settings.max_memory_bytes)
    with memory.share("") as body_share, memory.share("") as held:
        context = RequestContext(
            settings=settings,
            caller=ANYBODY,
            record=record,
            meter=Meter(Metrics(), record),
            body=body_share,
            held=held,
        )
        return await runner.take_in(parsed(content), context)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({}, ("",)),
        ({"content": None}, ("",)),
        ({"content": []}, ("",)),
        ({"content": "a star"}, ("a star",)),
        ({"content": None, "refusal": "I can't."}, ("I can't.",)),
        ({"content": [{"type": "refusal", "refusal": "I"}, {"type": "text", "text": "can't."}]}, ("I", "can't.")),
    ],
)
def test_an_earlier_answer_is_what_the_assistant_said(fields: dict, parts: tuple[str, ...]) -> None:
    answer = {"role": "assistant", **fields}
    assert turns_of(parsed(body(user("hello"), answer, user("and?"))))[1] == ("assistant", parts)


@pytest.mark.parametrize(("model", "alias"), [("tiny", ""), ("tiny:off", ":off"), ("tiny:steered", ":steered")])
def test_aliases(model: str, alias: str) -> None:
    assert find_alias(model, "tiny") == alias


@pytest.mark.parametrize("model", ["", "tin", "tiny:", "tiny:on", "TINY", "tiny:off:off", "other"])
def test_other_models_are_404(model: str) -> None:
    with pytest.raises(ApiError, match="'tiny', 'tiny:off', 'tiny:steered'") as caught:
        find_alias(model, "tiny")
    assert (caught.value.status, caught.value.param) == (404, "model")


@pytest.mark.parametrize(
    ("fields", "header", "alias", "enabled", "strength", "explicit"),
    [
        ({}, None, "", None, None, False),
        ({}, None, ":off", False, None, False),
        ({}, None, ":steered", True, None, True),
        ({}, "0.25", "", True, 0.25, True),
        ({}, "0", "", None, 0.0, False),
        ({}, " 1 ", "", True, 1.0, True),
        ({"strength": 0.5}, "1", ":off", True, 0.5, True),
        ({"strength": 0.0}, "1", "", True, 0.0, True),
        ({"enabled": False}, "1", ":steered", False, 1.0, False),
        ({"strength": 0.0}, None, ":off", False, 0.0, False),
    ],
)
def test_sources_of_steering(fields, header, alias, enabled, strength, explicit) -> None:
    merged = merge_steering(SteeringRequest(**fields), header, alias, SETTINGS)
    assert (merged.settings.enabled, merged.settings.strength, merged.explicit) == (enabled, strength, explicit)


def test_the_server_s_default_is_the_lowest_source() -> None:
    settings = SETTINGS.model_copy(update={"default_preset": "questions", "default_strength": 0.5})
    by_default = merge_steering(None, None, "", settings)
    assert (by_default.settings.preset, by_default.settings.strength, by_default.explicit) == ("questions", 0.5, False)
    named = merge_steering(SteeringRequest(preset="captions"), None, "", settings)
    assert (named.settings.preset, named.settings.strength) == ("captions", None)
    assert merge_steering(None, None, ":off", settings).settings.enabled is False


@pytest.mark.parametrize(
    "header", ["", "x", "nan", "inf", "-1", "-0.5", "1.01", "7", "1e-1", "0.5, 0.5", "½", "1" * 400]
)
def test_a_wrong_header_is_named(header: str) -> None:
    with pytest.raises(ApiError) as caught:
        merge_steering(None, header, "", SETTINGS)
    assert (caught.value.status, caught.value.param) == (400, "x-steering-strength")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"control": "random"}, "steering.control"),
        ({"control": "other_image"}, "steering.control"),
    ],
)
def test_what_is_not_for_clients_yet(fields: dict, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        merge_steering(SteeringRequest(**fields), None, "", SETTINGS)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_controls_for_evaluation() -> None:
    settings = SETTINGS.model_copy(update={"allow_controls": True})
    assert merge_steering(SteeringRequest(control="random"), None, "", settings).settings.control == "random"
    assert merge_steering(SteeringRequest(control="none"), None, "", SETTINGS).settings.control == "none"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 9}, "n"),
        ({"max_tokens": 4097}, "max_tokens"),
        ({"max_completion_tokens": 4097}, "max_completion_tokens"),
        ({"messages": [user(*[image_part()] * 5), user(*[image_part()] * 4)]}, "messages"),
    ],
)
def test_limits(fields: dict, param: str) -> None:
    with pytest.raises(ApiError, match="at most") as caught:
        check_limits(parsed({**body(), **fields}), SETTINGS)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_all_texts_of_a_request_have_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.chat.request.MAX_TEXT_BYTES", 20)
    texts = [{"type": "text", "text": "\u00e9" * 4}, image_part(), {"type": "text", "text": "x" * 5}]
    fits = [{"role": "system", "content": "x" * 7}, user(*texts)]
    check_limits(parsed(body(*fits)), SETTINGS)
    with pytest.raises(ApiError, match=r"messages: .* 21 bytes; at most 20 ") as caught:
        check_limits(parsed(body(*fits, user("x"))), SETTINGS)
    assert (caught.value.status, caught.value.code, caught.value.param) == (413, "request_too_large", "messages")


def test_sampling_defaults_are_openai_s() -> None:
    sampling = sampling_of(parsed(body()))
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.n) == (1.0, 1.0, 0, 1)
    narrowest = sampling_of(parsed(body(top_p=0, top_k=5)))
    assert (narrowest.top_p, narrowest.top_k) == (1.0, 1), "the most likely token alone"
    assert (sampling.seed, sampling.stop, sampling.top_logprobs, sampling.logit_bias) == (None, (), None, {})


def test_sampling_is_what_was_asked() -> None:
    asked = {
        "temperature": 0, "top_p": 0.5, "top_k": -1, "n": 3, "seed": 0, "stop": ["a", "b"], "logprobs": True,
        "presence_penalty": 1, "frequency_penalty": -1, "logit_bias": {"7": -100},
    }  # fmt: skip
    sampling = sampling_of(parsed(body(**asked)))
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.n, sampling.seed) == (0, 0.5, 0, 3, 0)
    assert (sampling.stop, sampling.top_logprobs, sampling.logit_bias) == (("a", "b"), 0, {7: -100.0})
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.0, -1.0)
    assert sampling_of(parsed(body(logprobs=False))).top_logprobs is None


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, ResponseFormat()),
        (json_schema(schema={"type": "array"}), ResponseFormat(json_schema='{"type":"array"}')),
    ],
)
def test_the_response_format_is_what_was_asked(asked: dict | None, expected: ResponseFormat | None) -> None:
    assert sampling_of(parsed(body(response_format=asked))).response_format == expected


async def test_images_keep_their_places(decoder: ImageDecoder) -> None:
    job = await job_of(
        decoder,
        body(
            {"role": "developer", "content": "brief"},
            user("first", image_part(encoded(picture("red"))), "then", image_part(encoded(picture("lime")))),
            {"role": "assistant", "content": "yes"},
            user(image_part(encoded(picture("blue"))), "last"),
            max_tokens=5,
        ),
    )
    assert [turn.role for turn in job.turns] == ["system", "user", "assistant", "user"]
    assert job.turns[1].parts == ("first", None, "then", None)
    assert job.turns[3].parts == (None, "last")
    assert [tuple(image.rows[:3]) for image in job.images] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert job.max_tokens == 5


async def test_a_request_s_pixels_are_bounded_together(decoder: ImageDecoder) -> None:
    settings = SETTINGS.model_copy(update={"max_image_pixels": 48 * 32})
    with pytest.raises(ApiError, match="4608 pixels together; at most 3072") as caught:
        await job_of(decoder, body(user(image_part(), image_part(), image_part())), settings)
    assert caught.value.param == "messages"


async def test_every_url_is_checked_before_the_first_is_decoded(decoder: ImageDecoder) -> None:
    remote = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
    with pytest.raises(ApiError, match="only data: URLs") as caught:
        await job_of(decoder, body(user(image_part(), "or"), user(remote)))
    assert caught.value.param == "messages[1].content[0].image_url.url"
    assert not decoder._processes
