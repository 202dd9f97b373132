"""Words and pairs of neighbouring words of a text in any script, and in how many texts of a corpus each occurs.

Counting takes the same memory for ten texts and for ten million: two rows of counters that phrases are hashed into, of
which the smaller one counts (a count-min sketch). It never counts too little; where many rare phrases meet in a
counter it counts a few too many. Knows no concepts.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

MAX_WORDS = 256
"""Words of a text that are read; the rest of a longer one is not."""
COUNTERS = 1 << 22
"""In each of the two rows: 32 MiB in all."""
_SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Thai, Lao, Burmese, Khmer, Kana, Han: no spaces between words, so every character is taken as one."""
_MARKS = "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code))[0] == "M")
_LETTERS = rf"(?:(?![{_SPACELESS}])[\w{_MARKS}])+"
_WORD = re.compile(rf"[{_SPACELESS}][{_MARKS}]*|{_LETTERS}(?:['’]{_LETTERS})*")
_GAP = re.compile(r"[\s\-]*")
_FIRST_OTHER_SCRIPT = "\u0590"
"""Latin, Greek and Cyrillic stand before it: there a word of one or two letters says nothing by itself."""
_SHORT = 2


class Phrase(NamedTuple):
    """One word or two."""

    text: str
    words: tuple[str, ...]


def find_phrases(text: str) -> dict[str, Phrase]:
    """The words that may say something, and all pairs of neighbours, by text; each once, in the text's order.

    Lower case. Punctuation ends a pair.
    """
    text = unicodedata.normalize("NFC", text.lower()) if not text.isascii() else text.lower()
    found: dict[str, Phrase] = {}
    before: re.Match[str] | None = None
    for number, match in enumerate(_WORD.finditer(text)):
        if number == MAX_WORDS:
            break
        word = match.group()
        if before is not None and _GAP.fullmatch(text, before.end(), match.start()):
            joined = before.group() + (" " if before.end() < match.start() else "") + word
            found.setdefault(joined, Phrase(joined, (before.group(), word)))
        if len(word) > _SHORT or word[0] >= _FIRST_OTHER_SCRIPT:
            found.setdefault(word, Phrase(word, (word,)))
        before = match
    return found


class PhraseCounts:
    """In how many texts of a corpus a phrase occurs."""

    def __init__(self) -> None:
        self.texts = 0
        """Texts counted."""
        self._counts = np.zeros((2, COUNTERS), dtype=np.int32)

    def add(self, texts: Sequence[str]) -> None:
        """More of the corpus."""
        self.texts += len(texts)
        places = self._places(phrase for text in texts for phrase in find_phrases(text))
        for row in range(2):
            np.add.at(self._counts[row], places[row], 1)

    def count(self, phrases: Iterable[str]) -> np.ndarray:
        """Number of texts with each, or a few more."""
        places = self._places(phrases)
        return np.minimum(self._counts[0][places[0]], self._counts[1][places[1]])

    @staticmethod
    def _places(phrases: Iterable[str]) -> np.ndarray:
        """[2, n] counters."""
        digests = b"".join(
            hashlib.blake2b(phrase.encode("utf-8", "surrogatepass"), digest_size=8).digest() for phrase in phrases
        )
        return (np.frombuffer(digests, dtype="<u4").reshape(-1, 2) % COUNTERS).T
