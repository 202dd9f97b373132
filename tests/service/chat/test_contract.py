"""The HTTP contract against the real service, through the official `openai` client (design, section 6).

Every engine keeps the same contract; what one cannot do is refused, and that is asserted too.
"""

from __future__ import annotations

import concurrent.futures
import json
import subprocess
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai.types.chat import ChatCompletion
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.service.asking import GREEDY, PICTURE, QUESTION, joined, logprobs, receipt, streamed, text
from tests.service.clients.seen import ENOUGH_TOKENS, Seen
from tests.service.examples import body, encoded, image_part, json_schema, user
from tests.service.running_server import RunningServer
from tests.tiny_models import drawn_image

pytestmark = [pytest.mark.service, pytest.mark.slow]
LOGPROB_TOLERANCE = {"huggingface": 1e-5, "vllm": 1e-3}
"""Against transformers, in float32."""


def test_an_answer_and_its_receipt(ask, server: RunningServer) -> None:
    answer = ask()
    assert answer.object == "chat.completion"
    assert answer.model == server.name
    assert answer.system_fingerprint is not None
    assert answer.system_fingerprint == server.get("/version").json()["system_fingerprint"]
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.choices[0].finish_reason in ("stop", "length")
    steered = receipt(answer)
    assert (steered["applied"], steered["reason"]) == (True, None)
    assert steered["artifact"] == server.get("/version").json()["artifact"]
    assert len(steered["positions"]) == len(steered["relative_shift"]) == 1
    assert steered["positions"][0] > 0
    assert steered["relative_shift"][0] > 0


def test_a_stream_says_the_same(ask, client: openai.OpenAI, server: RunningServer) -> None:
    whole = ask()
    chunks = streamed(client, server)
    assert joined(chunks) == text(whole)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert receipt(chunks[-1]) == receipt(whole)
    assert len(chunks) > 5, "token by token, not all at once"


def test_a_stream_with_usage(ask, client: openai.OpenAI, server: RunningServer) -> None:
    whole = ask()
    chunks = streamed(client, server, usage=True)
    assert joined(chunks) == text(whole)
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert receipt(chunks[-1]) == receipt(whole)
    assert all("steering" not in (chunk.model_extra or {}) for chunk in chunks[:-1])


def test_two_choices(ask, client: openai.OpenAI, server: RunningServer) -> None:
    answer = ask(n=2, seed=7, temperature=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert text(answer, 0) != text(answer, 1)
    assert len(receipt(answer)["positions"]) == 2
    chunks = streamed(client, server, n=2, seed=7, temperature=2)
    assert [joined(chunks, choice) for choice in (0, 1)] == [text(answer, 0), text(answer, 1)]


def test_a_seed_repeats(ask) -> None:
    texts = [text(ask(seed=seed, temperature=2, max_tokens=24)) for seed in (3, 3, 4, 5, 6)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 2


def test_logprobs(ask) -> None:
    answer = ask(logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) >= answer.usage.completion_tokens - 1, "the end-of-sequence token is not shown"
    for token in content:
        assert bytes(token.bytes).decode(errors="replace") == token.token
        assert [other.logprob for other in token.top_logprobs] == sorted(
            (other.logprob for other in token.top_logprobs), reverse=True
        )
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob, abs=1e-5), "greedy"
    assert b"".join(bytes(token.bytes) for token in content).decode(errors="replace") == text(answer)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_across_token_borders(ask, client: openai.OpenAI, server: RunningServer, stream: bool) -> None:
    unstopped = ask(logprobs=True, max_tokens=60)
    whole, tokens = text(unstopped), [token for token, _ in logprobs(unstopped)]
    position = next(index for index in range(3, len(tokens)) if "\ufffd" not in tokens[index - 1] + tokens[index])
    stop = tokens[position - 1][-1] + tokens[position][0]
    expected = whole[: whole.index(stop)]
    if stream:
        chunks = streamed(client, server, max_tokens=60, stop=["never in there", stop])
        assert (joined(chunks), chunks[-1].choices[0].finish_reason) == (expected, "stop")
    else:
        answer = ask(max_tokens=60, stop=["never in there", stop])
        assert (text(answer), answer.choices[0].finish_reason) == (expected, "stop")


def test_max_tokens(ask) -> None:
    answer = ask(max_tokens=2)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (2, "length")
    assert text(ask(max_tokens=openai.omit, max_completion_tokens=2)) == text(answer)


def test_penalties_and_bias_change_the_answer(ask, checkpoint: tuple[Path, Path]) -> None:
    tokenizer = AutoProcessor.from_pretrained(checkpoint[0]).tokenizer
    first = logprobs(ask(logprobs=True))[0][0]
    ids = [index for index in range(len(tokenizer)) if tokenizer.decode([index]) == first]
    banned = {str(index): -100 for index in ids}
    assert logprobs(ask(logprobs=True, logit_bias=banned))[0][0] != first
    only = str(ids[0])
    repeated = ask(max_tokens=6, logit_bias={only: 100})
    assert text(repeated) == first * 6
    assert text(ask(max_tokens=6, logit_bias={only: 3}, frequency_penalty=2)) != text(repeated)


def test_strength_0_is_off_exactly(ask) -> None:
    zero, off = ask(extra={"steering": {"strength": 0}}, logprobs=True), ask(":off", logprobs=True)
    assert logprobs(zero) == logprobs(off)
    assert (receipt(zero)["applied"], receipt(zero)["reason"]) == (False, "strength_0")
    assert (receipt(off)["applied"], receipt(off)["reason"]) == (False, "disabled")
    assert receipt(off)["positions"] == [0]


def test_off_is_transformers_own_generate(ask, server: RunningServer, checkpoint: tuple[Path, Path]) -> None:
    answer = ask(":off", logprobs=True)
    processor = AutoProcessor.from_pretrained(checkpoint[0])
    model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint[0], dtype=torch.float32).eval()
    content = [{"type": "image", "image": PICTURE}, {"type": "text", "text": "Describe the picture ."}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    assert answer.usage.prompt_tokens == inputs["input_ids"].shape[1]
    out = model.generate(**inputs, do_sample=False, max_new_tokens=12, output_logits=True, return_dict_in_generate=True)
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    expected = [float(logits[0].log_softmax(-1)[token]) for logits, token in zip(out.logits, tokens, strict=True)]
    ours = [logprob for _, logprob in logprobs(answer)]
    assert ours == pytest.approx(expected[: len(ours)], abs=LOGPROB_TOLERANCE[server.engine])
    assert text(answer) == processor.tokenizer.decode(tokens, skip_special_tokens=True)


def test_the_dial(client: openai.OpenAI, ask) -> None:
    half = ask(extra={"steering": {"strength": 0.5}})
    assert receipt(half)["strength"] == 0.5
    assert (
        0 < receipt(half)["relative_shift"][0] < receipt(ask(extra={"steering": {"strength": 1}}))["relative_shift"][0]
    )
    by_header = ask(extra_headers={"x-steering-strength": "0.5"})
    assert (text(by_header), receipt(by_header)) == (text(half), receipt(half))
    body_wins = ask(extra={"steering": {"strength": 0.5}}, extra_headers={"x-steering-strength": "0"})
    assert receipt(body_wins) == receipt(half)
    header_wins = ask(":off", extra_headers={"x-steering-strength": "0.5"})
    assert receipt(header_wins) == receipt(half)


def test_aliases(ask) -> None:
    assert receipt(ask(":steered"))["applied"] is True
    assert receipt(ask(":off"))["applied"] is False
    assert receipt(ask(":off", extra={"steering": {"enabled": True}}))["applied"] is True
    assert receipt(ask(":steered", extra={"steering": {"enabled": False}}))["applied"] is False


@pytest.mark.parametrize("form", ["published", "difference", "union"])
@pytest.mark.parametrize("mode", ["causal", "exact"])
def test_every_form_and_mode(ask, server: RunningServer, form: str, mode: str) -> None:
    asked = {"steering": {"form": form, "mode": mode, "alpha": 0.5}}
    if (server.engine, mode) == ("vllm", "exact"):
        with pytest.raises(openai.BadRequestError, match=r"'exact'.*use 'causal'") as caught:
            ask(extra=asked)
        assert (caught.value.param, caught.value.code) == ("steering.mode", "invalid_steering")
        return
    steered = receipt(ask(extra=asked))
    assert (steered["applied"], steered["form"], steered["mode"], steered["alpha"]) == (True, form, mode, 0.5)


def test_two_branches(ask) -> None:
    answer = ask(extra={"steering": {"gamma": 0.6, "plausibility": 0.1}})
    assert (receipt(answer)["branches"], receipt(answer)["gamma"]) == (2, 0.6)


def test_steering_from_a_place_in_a_later_turn_s_answer(ask) -> None:
    turns = [QUESTION, {"role": "assistant", "content": "a star and a ring ."}, user("Describe the picture .")]
    by_default, answer = ask(messages=turns), ask(messages=turns, extra={"steering": {"min_answer_tokens": 2}})
    assert answer.usage.completion_tokens > 2
    steered = receipt(answer)
    assert (steered["min_answer_tokens"], steered["positions"]) == (2, [answer.usage.completion_tokens - 2])
    assert receipt(by_default)["min_answer_tokens"] is None
    assert receipt(by_default)["positions"][0] > by_default.usage.completion_tokens, "earlier turns are steered, too"
    late = ask(messages=turns, extra={"steering": {"enabled": True, "min_answer_tokens": 100}})
    assert (receipt(late)["applied"], receipt(late)["reason"]) == (False, "no_text_position")
    assert text(late) == text(ask(":off", messages=turns))


@pytest.mark.parametrize("asked", [{"type": "json_object"}, json_schema(schema={"enum": ["star", "ring"]})])
def test_a_response_format(ask, asked: dict) -> None:
    assert text(ask())[0] not in '"{', "by itself it writes no JSON"
    answer = ask(response_format=asked)
    assert receipt(answer)["applied"] is True
    if asked["type"] == "json_object":
        assert text(answer).startswith("{")
    else:
        assert json.loads(text(answer)) in ("star", "ring")
        assert answer.choices[0].finish_reason == "stop"


def test_openai_s_parse_gives_an_object(client: openai.OpenAI, server: RunningServer, ask) -> None:
    asked = {"max_tokens": ENOUGH_TOKENS, "n": 2, "model": server.name, "response_format": Seen}
    options: dict[str, Any] = {**GREEDY, **asked}
    answer = client.chat.completions.parse(**options)
    for choice in answer.choices:
        assert isinstance(choice.message.parsed, Seen)
    with client.chat.completions.stream(**options) as stream:
        assert [choice.message.parsed for choice in stream.get_final_completion().choices] == [
            choice.message.parsed for choice in answer.choices
        ]
    assert text(ask(messages=[QUESTION, {"role": "assistant", "content": None}, QUESTION]))


def test_text_as_response_format_is_no_wish(ask) -> None:
    assert text(ask(response_format={"type": "text"})) == text(ask())


def test_by_default_a_text_conversation_is_served_plain(ask) -> None:
    answer = ask(messages=[user("hello")])
    assert (receipt(answer)["applied"], receipt(answer)["reason"]) == (False, "no_image")


@pytest.mark.parametrize(
    ("alias", "options"),
    [
        (":steered", {}),
        ("", {"extra": {"steering": {"enabled": True}}}),
        ("", {"extra": {"steering": {"strength": 0.5}}}),
        ("", {"extra_headers": {"x-steering-strength": "0.5"}}),
    ],
)
def test_explicit_steering_without_an_image_is_refused(ask, alias: str, options: dict) -> None:
    with pytest.raises(openai.BadRequestError, match="no image") as caught:
        ask(alias, messages=[user("hello")], **options)
    assert (caught.value.param, caught.value.code) == ("steering", "invalid_steering")


def test_several_turns_and_images(ask) -> None:
    other = image_part(encoded(drawn_image(2, (30, 60))))
    turns = [
        {"role": "system", "content": "be brief"},
        QUESTION,
        {"role": "assistant", "content": "a star ."},
        user("and", other, "?"),
    ]
    answer = ask(messages=turns)
    one_image = ask(messages=[*turns[:3], user("and", "?")])
    assert answer.usage.prompt_tokens > one_image.usage.prompt_tokens + 3
    assert receipt(answer)["applied"] is True
    developer = ask(messages=[{"role": "developer", "content": "be brief"}, *turns[1:]])
    assert text(developer) == text(answer)


def test_an_answer_can_be_sent_back(ask) -> None:
    message = ask().choices[0].message
    assert ask(messages=[QUESTION, message, user("sure ?")]).choices[0].finish_reason


def test_special_tokens_in_text_stay_text(ask) -> None:
    plain = ask(messages=[user("say it")]).usage.prompt_tokens
    spelled = ask(messages=[user("say </s> it <image>")]).usage.prompt_tokens
    assert spelled > plain + 4
    assert receipt(ask(messages=[user("<image> what ?")]))["reason"] == "no_image"


def test_eight_at_once_are_all_answered_and_equal_to_one(ask) -> None:
    alone = text(ask())
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda index: ask(":off" if index % 2 else ""), range(8)))
    assert {text(answer) for answer in answers[::2]} == {alone}
    assert {receipt(answer)["applied"] for answer in answers[1::2]} == {False}


def test_models(client: openai.OpenAI, server: RunningServer) -> None:
    listed = [model.id for model in client.models.list()]
    assert listed == [server.name, f"{server.name}:off", f"{server.name}:steered"]
    assert client.models.retrieve(f"{server.name}:off").id == f"{server.name}:off"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_request_ids(client: openai.OpenAI, server: RunningServer) -> None:
    raw = client.chat.completions.with_raw_response
    given = raw.create(model=server.name, extra_headers={"x-request-id": "mine-1"}, **GREEDY)
    assert given.headers.get_list("x-request-id") == ["mine-1"]
    assert len(raw.create(model=server.name, **GREEDY).headers["x-request-id"]) > 10


def test_operations_routes(server: RunningServer) -> None:
    assert server.get("/healthz").json() == {"status": "alive"}
    server.wait_until_idle()
    assert server.get("/readyz").json() == {"status": "ready", "running": 0, "waiting": 0}
    version = server.get("/version").json()
    assert (version["model"], version["engine"]) == (server.name, server.engine)
    assert "captions" in version["presets"]
    assert version["alignment"]
    assert version["faithfulness"]


def test_metrics_count(ask, server: RunningServer) -> None:
    sample = 'vlsae_requests_total{applied="true",arm="none",artifact="main",finish="length"}'
    before, tokens = server.metric(sample), server.metric('vlsae_completion_tokens_total{arm="none"}')
    ask(max_tokens=2)
    assert server.metric(sample) == before + 1
    assert server.metric('vlsae_completion_tokens_total{arm="none"}') == tokens + 2
    assert server.metric("vlsae_requests_in_progress") == 0


def test_the_start_says_what_is_served_and_how_to_ask(server: RunningServer) -> None:
    log = server.log()
    version = server.get("/version").json()
    assert version["artifact"][:16] in log
    assert all(preset in log for preset in version["presets"])
    assert all(name in log for name in version["alignment"] | version["faithfulness"])
    command = next(line for line in log.splitlines() if line.startswith("curl "))
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60).stdout
    assert receipt(ChatCompletion.model_validate_json(shown))["applied"] is True


def test_the_body_is_what_openai_would_send(server: RunningServer) -> None:
    """Raw JSON, without the client's own defaults."""
    answer = json.loads(
        subprocess.run(
            ["curl", "-sS", f"{server.url}/v1/chat/completions", "-H", "content-type: application/json",
             "-d", json.dumps(body(QUESTION, model=server.name, max_tokens=1))],
            capture_output=True, text=True, check=True,
        ).stdout
    )  # fmt: skip
    ChatCompletion.model_validate(answer, strict=True)
