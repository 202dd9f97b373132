"""Structured output: on a real little model, and where a choice stands in its grammar."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import jsonschema
import pytest
import pytest_asyncio
import torch

from steering.engines.base import ResponseFormat
from steering.engines.huggingface.engine import HuggingFaceEngine
from steering.engines.huggingface.grammar import Grammars
from steering.errors import InvalidSteering
from tests.steering.engines.driving import ask
from tests.tiny_models import byte_tokenizer
from training.miniature.paths import BUNDLE

END = 257
SEEN = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["star", "ring", "cross", "square"]},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 3},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "sure": {"type": "boolean"},
    },
    "required": ["shape", "words", "count", "sure"],
    "additionalProperties": False,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def miniature():
    engine = HuggingFaceEngine(BUNDLE / "llava", BUNDLE / "artifact")
    await engine.start()
    yield engine
    await engine.stop()


def wanted(schema: dict) -> ResponseFormat:
    return ResponseFormat(json_schema=json.dumps(schema))


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "steering", [{"enabled": False}, {"strength": 1.0}, {"gamma": 0.6, "plausibility": 0.9}], ids=str
)
async def test_the_miniature_s_answers_follow_their_schema(miniature, steering: dict) -> None:
    settings = {"n": 2, "temperature": 1.0, "seed": 4, "max_tokens": 200, "response_format": wanted(SEEN)}
    answer = await ask(miniature, "Describe the picture .", steering=steering, **settings)
    for choice in range(2):
        jsonschema.validate(json.loads(answer.text(choice)), SEEN)
        assert answer.finish_reasons()[choice] == "stop"
        assert len([delta for delta in answer.deltas if delta.choice == choice]) > 3, "it streams"
    again = await ask(miniature, "Describe the picture .", steering=steering, **settings)
    assert [again.text(choice) for choice in range(2)] == [answer.text(choice) for choice in range(2)]
    assert answer.end.receipt.applied == (steering != {"enabled": False})


@pytest.mark.asyncio(loop_scope="module")
async def test_the_miniature_can_spell_all_that_json_needs(miniature) -> None:
    text = json.dumps('"\\ /{}[]:,.0123456789+-eE \n\t é 世 😀 <image> </s>', ensure_ascii=False)
    answer = await ask(miniature, max_tokens=200, response_format=wanted({"const": json.loads(text)}))
    assert json.loads(answer.text()) == json.loads(text)


@pytest.mark.asyncio(loop_scope="module")
async def test_beside_it_a_free_answer_stays_as_it_is(miniature) -> None:
    free = {"max_tokens": 30, "temperature": 0.8, "seed": 2, "top_logprobs": 3}
    alone = await ask(miniature, "Describe the picture .", **free)
    beside, *_ = await asyncio.gather(
        ask(miniature, "Describe the picture .", **free),
        ask(miniature, "Describe the picture .", n=3, max_tokens=60, response_format=ResponseFormat()),
        ask(miniature, "Describe the picture .", max_tokens=60, response_format=wanted(SEEN)),
    )
    assert beside.tokens() == alone.tokens()


@pytest.mark.asyncio(loop_scope="module")
async def test_bias_and_penalties_choose_among_what_the_grammar_allows(miniature) -> None:
    ring = miniature.processor.tokenizer.encode("ring", add_special_tokens=False)
    for bias in (100.0, -100.0):
        answer = await ask(
            miniature, max_tokens=20, logit_bias=dict.fromkeys(ring, bias), presence_penalty=2.0,
            response_format=wanted({"enum": ["star", "ring"]}),
        )  # fmt: skip
        assert json.loads(answer.text()) in ("star", "ring")


def test_masked_tokens_are_as_good_as_impossible_and_the_end_comes_last() -> None:
    grammars = Grammars(byte_tokenizer(), 261, frozenset([END]))
    vocabulary = byte_tokenizer().get_vocab()
    one, other = (grammars.begin(wanted({"enum": ["a", "ab"]})) for _ in range(2))
    logits_V = torch.zeros(261)

    def allowed(choice) -> set[int]:
        return set((choice.mask(logits_V) == 0).nonzero().flatten().tolist())

    assert allowed(one) == {vocabulary['"']}
    one.advance(vocabulary['"'])
    one.advance(vocabulary["a"])
    assert allowed(one) == {vocabulary['"'], vocabulary["b"]}
    one.advance(vocabulary['"'])
    assert allowed(one) == {END}
    assert allowed(other) == {vocabulary['"']}, "each choice has its own place"
    assert not logits_V.any(), "the model's own logits are left alone"
    with pytest.raises(InvalidSteering, match="no token of this model"):
        other.mask(torch.full((261,), float("-inf")))


@pytest.mark.slow
def test_an_engine_without_grammars_does_not_import_the_library():
    """Importing it asks for a GPU; after that vLLM's processes, forked, could not use one."""
    program = "import sys, steering.engines.huggingface.engine; print('xgrammar' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout == "False\n"
