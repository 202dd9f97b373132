"""Texts stand behind the prompts that are served; what cannot be placed is refused, naming what to mend."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from steering.request import SteeringRequest
from tests.tiny_families import save_tiny_qwen2_5_vl
from tests.tiny_models import (
    LLAVA_CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    byte_tokenizer,
    drawn_image,
    sentencepiece_like_tokenizer,
)
from training.collect_representations import CommandLine
from training.collection.lvlm import LvlmSettings, read_checkpoint
from training.collection.placing import PROMPTS, TextPlacer, read_prompts
from training.command_line import parse_settings
from training.errors import InvalidTraining
from training.evaluation.asking import InProcess, Question
from training.miniature.paths import CLIP

TEXTS = ["a star", "a circle in red, 一颗星星 🔴", " spaced  out ", "0text0", "{text}", "USER: x ASSISTANT:", "-"]


def llava(tokenizer: PreTrainedTokenizerFast, template: str | None = LLAVA_CHAT_TEMPLATE) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(), tokenizer=tokenizer, patch_size=8, chat_template=template
    )


def joining_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, but for a colon and the space behind it, which are one."""
    vocabulary = {char: index for index, char in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), ":Ġ"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


PROCESSORS = {
    "a token per byte": (byte_tokenizer, LLAVA_CHAT_TEMPLATE),
    "a first token that the tokenizer writes": (sentencepiece_like_tokenizer, LLAVA_CHAT_TEMPLATE),
    "a first token that the template writes": (sentencepiece_like_tokenizer, "{{ bos_token }}" + LLAVA_CHAT_TEMPLATE),
    "a tokenizer that joins prompt and answer": (joining_tokenizer, LLAVA_CHAT_TEMPLATE),
}


def placer(processor: Any, place: Any = "answer", prompts: Any = PROMPTS, family: str = "llava") -> TextPlacer:
    return TextPlacer(processor, family, processor.image_token_id, place, prompts)


def served(processor: Any, prompt: str) -> list[int]:
    engine: Any = None
    question = Question(image=drawn_image(0), text=prompt, max_tokens=1, steering=SteeringRequest())
    return list(InProcess(engine, processor).prompt(question))


@pytest.mark.parametrize(("tokenizer", "template"), PROCESSORS.values(), ids=PROCESSORS)
def test_an_answer_begins_where_generation_does(tokenizer, template):
    processor = llava(tokenizer(), template)
    for prompt in PROMPTS:
        asked, by_answer = served(processor, prompt), placer(processor, prompts=(prompt,))
        for text in TEXTS:
            placed = by_answer.place(text, Random(0))
            assert placed.token_ids[: placed.answer_start] == asked
            said = processor.tokenizer.decode(asked) + " " + text
            assert processor.tokenizer.decode(placed.token_ids) == said


def test_joined_tokens_are_kept_apart_as_generation_keeps_them():
    processor = llava(joining_tokenizer())
    joined = processor.tokenizer("ASSISTANT: a")["input_ids"]
    assert len(joined) == len("ASSISTANT: a") - 1, "the tokenizer does join them"
    placed = placer(processor).place("a", Random(0))
    assert processor.tokenizer.convert_ids_to_tokens(placed.token_ids[placed.answer_start - 1 :]) == [":", "Ġ", "a"]


def test_the_first_token_is_there_once():
    for template in (LLAVA_CHAT_TEMPLATE, "{{ bos_token }}" + LLAVA_CHAT_TEMPLATE):
        processor = llava(sentencepiece_like_tokenizer(), template)
        for place in ("answer", "user_turn"):
            ids = placer(processor, place).place("a star", Random(0)).token_ids
            assert ids.count(processor.tokenizer.bos_token_id) == 1
            assert ids[0] == processor.tokenizer.bos_token_id


def test_a_text_in_the_user_s_turn_is_the_paper_s_prompt():
    processor = llava(byte_tokenizer())
    for text in TEXTS:
        placed = placer(processor, "user_turn").place(text, Random(0))
        assert placed.token_ids == processor.tokenizer(f"USER: <image>\n{text} ASSISTANT:")["input_ids"]
        assert placed.answer_start == len(placed.token_ids)


NO_PLACE = {
    "none": (None, "does not have a chat template"),
    "one that refuses": ("{{ raise_exception('no pictures') }}", "no pictures"),
    "one for strings": ("{{ messages[0]['content'] + 'x' }}", "takes no turn with a picture and a text"),
    "one for strings that trims": ("{{ messages[0]['content'].strip() }}", "has no attribute 'strip'"),
    "no image token": (LLAVA_CHAT_TEMPLATE.replace("<image>", "picture"), "the image token of llava 0 times"),
    "two image tokens": (LLAVA_CHAT_TEMPLATE.replace("<image>", "<image><image>"), "the image token of llava 2 times"),
    "another generation prompt": (
        LLAVA_CHAT_TEMPLATE.replace("'ASSISTANT:'", "'ASSISTANT: Sure,'"), "renders an answer otherwise than behind",
    ),
    "answers first": (
        LLAVA_CHAT_TEMPLATE.replace("in messages", "in messages | reverse"), "renders an answer otherwise than behind",
    ),
    "a word before the answer": (
        LLAVA_CHAT_TEMPLATE.replace("{{ content['text']", "{{ ('' if loop.first else '') ~ ('Well, ' if"
                                    " message['role'] == 'assistant' else '') ~ content['text']"),
        "renders an answer otherwise than behind",
    ),
    "empty answers": (
        LLAVA_CHAT_TEMPLATE.replace("{{ content['text'] + ' '}}",
                                    "{% if message['role'] == 'user' %}{{ content['text'] }}{% endif %}{{ ' ' }}"),
        "renders an answer otherwise than behind",
    ),
    "answers left out": (
        LLAVA_CHAT_TEMPLATE.replace("{% for message in messages %}",
                                    "{% for message in messages if message['role'] == 'user' %}"),
        "renders an answer otherwise than behind",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("template", "message"), NO_PLACE.values(), ids=NO_PLACE)
def test_a_chat_template_without_a_place_for_an_answer_is_named(template, message):
    with pytest.raises(InvalidTraining, match=message):
        placer(llava(byte_tokenizer(), template))


def test_a_user_s_turn_needs_a_template_in_the_other_families(tmp_path):
    _, processor = read_checkpoint(save_tiny_qwen2_5_vl(tmp_path))
    assert placer(processor, "user_turn", family="qwen2_5_vl").templates[0].after.startswith("<|im_end|>")
    for template, message in (
        (None, "does not have a chat template"),
        (processor.chat_template.replace("{{ content['text'] }}", ""), "leaves a text in the user's turn out"),
        (processor.chat_template.replace("<|image_pad|>", ""), "the image token of qwen2_5_vl 0 times"),
    ):
        processor.chat_template = template
        with pytest.raises(InvalidTraining, match=message):
            placer(processor, "user_turn", family="qwen2_5_vl")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ((), "--prompts: the list is empty"),
        (("What?", "See <image>?"), "--prompts: 'See <image>\\?' spells the special token <image>"),
        (("Stop </s>",), "spells the special token </s>"),
    ],
)
def test_prompts_that_cannot_be_asked_are_named(prompts, message, tiny_llava):
    with pytest.raises(InvalidTraining, match=message):
        placer(llava(byte_tokenizer()), prompts=prompts)
    with pytest.raises(InvalidTraining, match=message):
        LvlmSettings(model=tiny_llava, layers=(1,), prompts=prompts).describe()


def test_prompts_are_read_one_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("What is this?\n\n  Beschreibe das Bild.  \r\n这是什么？\n", encoding="utf-8")
    assert read_prompts(file) == ("What is this?", "Beschreibe das Bild.", "这是什么？")
    file.write_text("\n \n")
    with pytest.raises(InvalidTraining, match=f"--prompts {file}: no line holds a prompt"):
        read_prompts(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidTraining, match=f"--prompts {file} cannot be read"):
        read_prompts(file)
    with pytest.raises(InvalidTraining, match=f"--prompts {tmp_path / 'none'} cannot be read"):
        read_prompts(tmp_path / "none")


def settings(tmp_path, model, *options: str) -> CommandLine:
    argv = ["--model", str(model), "--pairs", "miniature:dev:2", "--output", str(tmp_path / "store"), *options]
    return parse_settings(CommandLine, program="collect", argv=argv)


def test_the_command_line_says_where_texts_stand(tmp_path, tiny_llava):
    (tmp_path / "prompts.txt").write_text("What?\nWhere?\n")
    given = settings(
        tmp_path, tiny_llava, "--prompts", str(tmp_path / "prompts.txt"), "--prefixes", "5", "--shortest-prefix", "2"
    )
    described = given.representer().describe()
    assert described.prompts == ("USER: <image>\nWhat? ASSISTANT: {text}", "USER: <image>\nWhere? ASSISTANT: {text}")
    assert (described.text_in, described.prefixes, described.shortest_prefix) == ("answer", 5, 2)
    plain = settings(tmp_path, tiny_llava).representer().describe()
    assert (plain.text_in, len(plain.prompts), plain.prefixes) == ("answer", len(PROMPTS), 3)
    for options in ((), ("--prefixes", "0")):
        authors = settings(tmp_path, tiny_llava, "--text-in", "user_turn", *options).representer().describe()
        assert (authors.text_in, authors.prompts, authors.prefixes) == (
            "user_turn", ("USER: <image>\n{text} ASSISTANT:",), 0,
        )  # fmt: skip


@pytest.mark.parametrize("option", [["--prompts", "file"], ["--prefixes", "2"], ["--shortest-prefix", "4"]])
def test_options_of_answers_are_refused_elsewhere(option, tmp_path, tiny_llava):
    with pytest.raises(InvalidTraining, match=f"{option[0]} is for --text-in answer"):
        settings(tmp_path, tiny_llava, "--text-in", "user_turn", *option).representer()


@pytest.mark.parametrize(
    "option",
    [["--prompts", "file"], ["--prefixes", "2"], ["--shortest-prefix", "4"], ["--text-in", "user_turn"],
     ["--layers", "1"], ["--point", "input"]],
)  # fmt: skip
def test_open_clip_has_no_prompts_and_no_layers(option, tmp_path):
    with pytest.raises(InvalidTraining, match=f"{option[0]} is for LVLMs; .* is an open_clip model"):
        settings(tmp_path, CLIP, *option).representer()
    described = settings(tmp_path, CLIP).representer().describe()
    assert (described.text_in, described.prompts, described.prefixes) == (None, (), 0)
