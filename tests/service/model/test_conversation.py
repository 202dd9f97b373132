"""Prompts: exactly the processor's own for ordinary text, and never a special token from a caller's text."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from service.errors import ApiError
from service.model.conversation import ChatTokenizer
from service.model.job import Turn
from tests.tiny_models import SPECIAL_TOKENS

IMAGE_TOKENS = 4


def collapsed(ids: list[int], image_token: int) -> list[int]:
    """One image token for every run of them that the processor wrote."""
    out: list[int] = []
    run = 0
    for token in ids:
        run = run + 1 if token == image_token else 0
        if run % IMAGE_TOKENS == 1 or token != image_token:
            out.append(token)
    return out


def by_processor(processor, turns: list[Turn]) -> list[int]:
    """What transformers itself makes of a conversation."""
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "image", "image": Image.new("RGB", (16, 16))}
                if part is None
                else {"type": "text", "text": part}
                for part in turn.parts
            ],
        }
        for turn in turns
    ]
    made = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return collapsed(list(made["input_ids"][0]), processor.tokenizer.convert_tokens_to_ids("<image>"))


def special_ids(tokenizer, ids: list[int]) -> list[int]:
    return [token for token in ids if token in tokenizer.added_tokens_decoder]


plain_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
    lambda text: not any(token in text for token in SPECIAL_TOKENS)
)
hostile_text = st.lists(
    st.sampled_from([*SPECIAL_TOKENS, "<ima", "ge>", "<", "s>", "</", " ", "\n", "USER: ", "\ue000", "é"]), max_size=8
).map("".join)


def conversations(texts: st.SearchStrategy[str]) -> st.SearchStrategy[list[Turn]]:
    users = st.lists(st.none() | texts, min_size=1, max_size=3).map(lambda parts: Turn("user", tuple(parts)))
    others = st.builds(lambda role, text: Turn(role, (text,)), st.sampled_from(["system", "assistant"]), texts)
    return st.lists(users | others, min_size=1, max_size=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(turns=conversations(plain_text))
def test_ordinary_text_gives_the_processor_s_own_tokens(tiny_processor, turns: list[Turn]) -> None:
    if not any("<image>" in part for turn in turns for part in turn.parts if part):
        assert ChatTokenizer(tiny_processor).encode(turns) == by_processor(tiny_processor, turns)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(turns=conversations(hostile_text))
def test_special_tokens_in_text_stay_text(tiny_processor, turns: list[Turn]) -> None:
    tokenizer = tiny_processor.tokenizer
    ids = ChatTokenizer(tiny_processor).encode(turns)
    harmless = [turn._replace(parts=tuple(part and "x" for part in turn.parts)) for turn in turns]
    expected = special_ids(tokenizer, ChatTokenizer(tiny_processor).encode(harmless))
    assert special_ids(tokenizer, ids) == expected, "a caller added or removed a special token"
    assert expected.count(tokenizer.convert_tokens_to_ids("<image>")) == sum(
        part is None for turn in turns for part in turn.parts
    )
    ordinary = [token for token in ids if token not in tokenizer.added_tokens_decoder]
    written = "".join(part for turn in turns for part in turn.parts if part)
    seen = tokenizer.decode(ordinary)
    assert all(part.strip() in seen for turn in turns for part in turn.parts if part), (written, seen)


def test_a_token_put_together_from_two_parts_stays_text(tiny_processor) -> None:
    processor = tiny_processor
    joined = "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
    original, processor.chat_template = processor.chat_template, joined
    try:
        ids = ChatTokenizer(processor).encode([Turn("user", ("<ima", "ge>"))])
    finally:
        processor.chat_template = original
    assert special_ids(processor.tokenizer, ids) == []
    assert processor.tokenizer.decode(ids) == "<image>"


class TemplateOnly:
    """The two things ChatTokenizer needs of a processor."""

    def __init__(self, tokenizer, template: str) -> None:
        self.tokenizer = tokenizer
        tokenizer.chat_template = template

    def apply_chat_template(self, messages, **options):
        return self.tokenizer.apply_chat_template(messages, **options)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's: SentencePiece spaces, specials in the vocabulary, <s> in front; one added token is not special."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyzUSER:<>/|_\n.", "<0x0A>"]
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>", "<image>")])
    backend.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


LLAMA_LIKE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}</s>{% endfor %}"
)


@pytest.mark.parametrize("text", ["hello", "  hello ", "a <s> b", "</s>", "<unk>", "<tool_call>a", "a\n"])
def test_a_sentencepiece_tokenizer_with_a_trimming_template(text: str) -> None:
    tokenizer = metaspace_tokenizer()
    ids = ChatTokenizer(TemplateOnly(tokenizer, LLAMA_LIKE)).encode([Turn("user", (None, text))])
    assert special_ids(tokenizer, ids) == [
        tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "<image>", "</s>")
    ]
    rendered = f"USER: <image>\n{text.strip()}</s>"
    if not special_ids(tokenizer, tokenizer.encode(text, add_special_tokens=False)):
        assert ids == tokenizer.encode(rendered), "nothing to protect: transformers' own tokens"


def test_a_template_that_rewrites_texts_is_followed_or_refused(tiny_processor) -> None:
    shouting = "{% for m in messages %}{{ m['content'][0]['text'] | upper }}</s>{% endfor %}"
    chat = ChatTokenizer(TemplateOnly(tiny_processor.tokenizer, shouting))
    tokenizer = tiny_processor.tokenizer
    assert chat.encode([Turn("user", ("hi",))]) == tokenizer.encode("HI</s>", add_special_tokens=False)
    lower = ChatTokenizer(TemplateOnly(tokenizer, shouting.replace("upper", "replace('#', '<') ")))
    with pytest.raises(ApiError, match="special tokens") as caught:
        lower.encode([Turn("user", ("#image>",))])
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_a_template_s_own_refusal_is_the_client_s_error(tiny_processor) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    chat = ChatTokenizer(TemplateOnly(tiny_processor.tokenizer, template))
    with pytest.raises(ApiError, match="roles must alternate") as caught:
        chat.encode([Turn("user", ("hi",))])
    assert (caught.value.status, caught.value.param) == (400, "messages")
