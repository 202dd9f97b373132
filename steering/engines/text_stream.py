"""Token ids to text as it comes: whole characters only, and never past the beginning of a stop string."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(kw_only=True)
class TextStream:
    """Text of one choice."""

    tokenizer: Any
    """A transformers tokenizer."""
    stop: tuple[str, ...] = ()
    stopped: bool = False
    """A stop string was met; what follows it is gone."""
    _tokens: list[int] = field(default_factory=list)
    _context_start: int = 0
    _read_start: int = 0
    _held: str = ""

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain, perhaps none."""
        self._tokens.append(token)
        context = self._decode(self._context_start, self._read_start)
        text = self._decode(self._context_start, len(self._tokens))
        if text.endswith(REPLACEMENT):
            return ""
        self._context_start, self._read_start = self._read_start, len(self._tokens)
        return self._release(text[len(context) :])

    def finish(self) -> str:
        """The rest, at the end of a choice: held-back text and an unfinished character's replacement."""
        if self.stopped:
            return ""
        context = self._decode(self._context_start, self._read_start)
        text = self._decode(self._context_start, len(self._tokens))[len(context) :]
        self._read_start = len(self._tokens)
        rest = self._release(text)
        if self.stopped:
            return rest
        rest, self._held = rest + self._held, ""
        return rest

    def _decode(self, start: int, end: int) -> str:
        return self.tokenizer.decode(self._tokens[start:end], skip_special_tokens=True)

    def _release(self, new: str) -> str:
        """Hold back what could be the beginning of a stop string."""
        text = self._held + new
        found = [position for position in (text.find(stop) for stop in self.stop) if position >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)


class TokenBytes:
    """The exact bytes of single tokens, for logprobs. Knows byte-level BPE and SentencePiece vocabularies."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self._special = set(tokenizer.all_special_tokens)
        self._byte_level = (
            _byte_alphabet() if "Ġ" in vocabulary or not any("▁" in token for token in vocabulary) else None
        )

    def __call__(self, token_id: int) -> bytes:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        if token in self._special:
            return token.encode()
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        if self._byte_level is not None and all(character in self._byte_level for character in token):
            return bytes(self._byte_level[character] for character in token)
        return token.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """Character to byte of byte-level BPE: printable bytes stand for themselves, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}
