"""Messages to prompt token ids by the checkpoint's own chat template, with ONE image token per image.

A special token spelled in a caller's text stays text: `</s>` in a question is four characters, not an end. For that
the prompt is tokenised by a twin of the checkpoint's tokenizer in which every added token has a private, random
spelling; only the template's own special tokens are translated into it, so nothing a caller can write is special.
Runs in the model replica. Knows no HTTP, no images and no engine.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence

from jinja2 import TemplateError
from tokenizers import Tokenizer

from service.errors import ApiError
from service.model.job import Turn


class ChatTokenizer:
    """A processor's template and tokenizer, safe against its own special tokens."""

    def __init__(self, processor) -> None:
        self._processor = processor
        self._bos = processor.tokenizer.bos_token
        self._secret = secrets.token_hex(8)
        self._ordinary: Tokenizer = processor.tokenizer.backend_tokenizer
        self._private = {
            token.content: self._spell(f"t{token_id}")
            for token_id, token in self._ordinary.get_added_tokens_decoder().items()
        }
        self._special = re.compile("|".join(map(re.escape, sorted(self._private, key=len, reverse=True))))
        self._twin = _respelled(self._ordinary, self._private)

    @property
    def vocabulary_size(self) -> int:
        return self._ordinary.get_vocab_size(with_added_tokens=True)

    def encode(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids of the prompt, ready for generation."""
        texts = [part for turn in turns for part in turn.parts if part is not None]
        prompt = self._render(turns)
        slots = [self._spell(f"p{index}") for index in range(len(texts))]
        skeleton = self._render(_with_texts(turns, slots))
        add_special_tokens = not (self._bos and prompt.startswith(self._bos))
        for written in (texts, [text.strip() for text in texts]):  # some templates trim what they are given
            if self._fill(skeleton, written) == prompt:
                private = self._special.sub(lambda match: self._private[match[0]], skeleton)
                return self._twin.encode(self._fill(private, written), add_special_tokens=add_special_tokens).ids
        if self._special.findall(prompt) != self._special.findall(skeleton):
            raise ApiError(
                "invalid_value", "messages: a text spells one of the model's special tokens", param="messages"
            )
        return self._ordinary.encode(prompt, add_special_tokens=add_special_tokens).ids

    def _render(self, turns: Sequence[Turn]) -> str:
        messages = [{"role": turn.role, "content": [_content_part(part) for part in turn.parts]} for turn in turns]
        try:
            return self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise ApiError("invalid_value", f"messages: the model's chat template: {error}", param="messages") from None

    def _spell(self, name: str) -> str:
        """A string that nobody outside this process can know."""
        return f"\ue000{self._secret}{name}\ue001"

    def _fill(self, skeleton: str, texts: Sequence[str]) -> str:
        """The skeleton with its slots replaced by texts; slots that the template left out stay out."""
        return re.sub(self._spell(r"p(\d+)"), lambda match: texts[int(match[1])], skeleton)


def _content_part(part: str | None) -> dict[str, str]:
    return {"type": "image"} if part is None else {"type": "text", "text": part}


def _with_texts(turns: Sequence[Turn], texts: Sequence[str]) -> list[Turn]:
    """The same turns with other texts, in order."""
    remaining = iter(texts)
    return [
        turn._replace(parts=tuple(None if part is None else next(remaining) for part in turn.parts)) for turn in turns
    ]


def _respelled(tokenizer: Tokenizer, spelling: dict[str, str]) -> Tokenizer:
    """A copy in which every added token is written differently and keeps its id."""
    plan = json.loads(tokenizer.to_str())
    plan["truncation"] = plan["padding"] = None
    for token in plan["added_tokens"]:
        token["content"] = spelling[token["content"]]
    model = plan["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {spelling.get(token, token): index for token, index in model["vocab"].items()}
    else:
        model["vocab"] = [[spelling.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = spelling.get(model["unk_token"], model["unk_token"])
    twin = Tokenizer.from_str(json.dumps(plan))
    ids = {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    moved = [token for token, token_id in ids.items() if twin.token_to_id(spelling[token]) != token_id]
    if moved:
        raise ValueError(f"this tokenizer's added tokens cannot be respelled: {moved}")
    return twin
