"""Where a pair's text stands in a prompt. Knows tokenizers and chat templates; no weights, no states.

    answer      as served: a prompt of a list in the user's turn, the text as the assistant's answer to it
    user_turn   as the paper's authors have it: the text itself in the user's turn, and no answer

What is pooled while an answer is generated is the first kind: the rest of the prompt and the beginning of an answer.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError

from training.errors import InvalidTraining

TextPlace = Literal["answer", "user_turn"]
PROMPTS = (
    "Describe the image.",
    "What do you see?",
    "What is in this picture?",
    "Please describe the picture.",
    "What does the image show?",
)
"""What the texts answer where no other prompts are given."""
_MARK = "0text0"
"""Stands for the text while a template is rendered: no template changes such a word."""
PUBLISHED_PROMPT = f"USER: <image>\n{_MARK} ASSISTANT:"
"""The authors' own, for LLaVA; in other families `user_turn` is the checkpoint's chat template."""


def read_prompts(file: Path) -> tuple[str, ...]:
    """One a line, empty lines left out. Raises InvalidTraining where there is none."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidTraining(f"--prompts {file} cannot be read: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise InvalidTraining(f"--prompts {file}: no line holds a prompt; give one a line")
    return prompts


class PlacedText(NamedTuple):
    """A text in its prompt."""

    token_ids: list[int]
    """One token for the image."""
    answer_start: int
    """Index of the answer's first token; the number of tokens where there is no answer."""


class PromptTemplate(NamedTuple):
    """A rendered conversation, cut where a text goes."""

    asked: str
    """What the model is given before it answers; of `user_turn`, what stands before the text."""
    lead: str
    """Between that and the text: the space that an answer begins with."""
    after: str
    """Behind the text; nothing behind an answer, which generation has not ended yet."""

    def __str__(self) -> str:
        return f"{self.asked}{self.lead}{{text}}{self.after}"


class TextPlacer:
    """Puts texts where `place` says, as the checkpoint's chat template has it."""

    def __init__(self, processor: Any, family: str, image_token: int, place: TextPlace, prompts: Sequence[str]) -> None:
        """`image_token`: id of the family's. Raises InvalidTraining for prompts that hold not exactly one image, or no
        place for the text."""
        self._tokenizer, self._place = processor.tokenizer, place
        self._tokenizing = threading.Lock()  # fast tokenizers are not for several threads
        if place == "answer":
            check_prompts(prompts, special_tokens(self._tokenizer))
            self.templates = tuple(_answer_template(processor, prompt) for prompt in prompts)
        else:
            self.templates = (_user_turn_template(processor, family),)
        for template in self.templates:
            images = self._tokens(template.asked + template.after).count(image_token)
            if images != 1:
                raise InvalidTraining(
                    f"the prompt {str(template)!r} holds the image token of {family} {images} times, a pair has one "
                    "image; mend the checkpoint's chat template"
                )

    def place(self, text: str, draw: Random) -> PlacedText:
        """The text in one of the prompts, which `draw` chooses."""
        asked, lead, after = draw.choice(self.templates)
        with self._tokenizing:
            whole = self._tokens(asked + lead + text + after)
            if self._place == "user_turn":
                return PlacedText(whole, len(whole))
            before = self._tokens(asked)
            if whole[: len(before)] != before:  # the tokenizer joins what generation keeps apart
                whole = before + self._tokenizer(lead + text, add_special_tokens=False)["input_ids"]
        return PlacedText(whole, len(before))

    def _tokens(self, prompt: str) -> list[int]:
        """A template that writes the first token gets no second one."""
        bos = self._tokenizer.bos_token
        begun = bos is not None and prompt.startswith(bos)
        return self._tokenizer(prompt, add_special_tokens=not begun)["input_ids"]


def special_tokens(tokenizer: Any) -> list[str]:
    """As they are spelled, each once."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def check_prompts(prompts: Sequence[str], special: Sequence[str]) -> None:
    """Raises InvalidTraining where there is none, or one spells a special token."""
    if not prompts:
        raise InvalidTraining("--prompts: the list is empty; give at least one prompt that the texts answer")
    for prompt in prompts:
        found = next((token for token in special if token in prompt), None)
        if found is not None:
            raise InvalidTraining(
                f"--prompts: {prompt!r} spells the special token {found}; the chat template adds what is needed"
            )


def _answer_template(processor: Any, prompt: str) -> PromptTemplate:
    """The conversation up to the end of the answer."""
    user: list[Any] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    answered = [*user, {"role": "assistant", "content": [{"type": "text", "text": _MARK}]}]
    asked, whole = _render(processor, user, ask=True), _render(processor, answered, ask=False)
    lead, marked, _ = whole.removeprefix(asked).partition(_MARK)
    if not whole.startswith(asked) or not marked or lead.strip():
        raise InvalidTraining(
            f"the chat template renders an answer otherwise than behind its own prompt {asked!r}; mend the template, "
            "or collect with --text-in user_turn"
        )
    return PromptTemplate(asked, lead, "")


def _user_turn_template(processor: Any, family: str) -> PromptTemplate:
    if family == "llava":
        whole = PUBLISHED_PROMPT
    else:
        content = [{"type": "image"}, {"type": "text", "text": _MARK}]
        whole = _render(processor, [{"role": "user", "content": content}], ask=True)
    before, marked, after = whole.partition(_MARK)
    if not marked:
        raise InvalidTraining(
            f"the chat template leaves a text in the user's turn out: {whole!r}; mend the checkpoint's chat template"
        )
    return PromptTemplate(before, "", after)


def _render(processor: Any, turns: list[Any], *, ask: bool) -> str:
    """`ask`: up to where the model answers. Raises InvalidTraining for a template that refuses, or where there is none.

    Templates of models that know no pictures take a turn's content for a string: a TypeError.
    """
    try:
        return processor.apply_chat_template(turns, add_generation_prompt=ask, tokenize=False)
    except (ValueError, TypeError, TemplateError) as error:
        raise InvalidTraining(
            f"the checkpoint's chat template takes no turn with a picture and a text: {error}; mend the template"
        ) from error
