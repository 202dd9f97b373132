"""Which of COCO's 80 object categories a caption names. Knows no picture, no annotation file and no model.

A caption is cut at punctuation; each word is put into the singular (`inflect`, corrected where it errs) and the longest
phrase of the table `data/coco_objects.json` that begins at a word counts: 'hot dog' is no dog, 'train track' names
nothing, 'baby elephant' is one elephant and no person. The table is our own, so scores stand beside each other but not
beside those of other tables to the last digit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

import inflect
from pydantic import BaseModel, ConfigDict

TABLE_FILE = Path(__file__).parent / "data" / "coco_objects.json"
Phrase = tuple[str, ...]
NOTHING: None = None
"""What a phrase names that holds an object's word and is none."""


class Qualifier(BaseModel):
    """Words that belong to the object named directly after them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    words: tuple[str, ...]
    of: tuple[str, ...] | Literal["all"]
    """Categories."""


class ObjectTable(BaseModel):
    """The table as it stands in the file; `about` there says what each part means."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    about: tuple[str, ...]
    categories: dict[str, tuple[str, ...]]
    not_objects: tuple[str, ...]
    qualifiers: tuple[Qualifier, ...]
    singulars: dict[str, str]


@cache
def object_table() -> ObjectTable:
    """The table, read once."""
    return ObjectTable.model_validate_json(TABLE_FILE.read_bytes())


def coco_categories() -> tuple[str, ...]:
    """The 80 names, as annotation files spell them."""
    return tuple(object_table().categories)


def objects_mentioned(caption: str) -> list[str]:
    """The categories that a caption names, in order and with repetitions."""
    phrases, longest = _phrases(), _longest_phrase()
    named = []
    for clause in clauses(caption):
        start = 0
        while start < len(clause):
            ends = range(min(len(clause), start + longest), start, -1)
            end = next((end for end in ends if tuple(clause[start:end]) in phrases), None)
            if end is not None and (category := phrases[tuple(clause[start:end])]) is not NOTHING:
                named.append(category)
            start = end or start + 1
    return named


def clauses(caption: str) -> Iterator[list[str]]:
    """Words in the singular, between one punctuation mark and the next; a possessive is its noun."""
    text = re.sub(r"['’]s?\b", "", caption.lower())
    for clause in re.split(r"[^\w\s/-]+", text):
        yield [singular(word) for word in re.findall(r"[^\W_]+", clause)]


@lru_cache(maxsize=65536)
def singular(word: str) -> str:
    """The word's singular; a word of the table is one already ('bus', 'scissors')."""
    table_words = _table_words()
    if word in table_words:
        return word
    if (known := object_table().singulars.get(word)) is not None:
        return known
    return _english().singular_noun(word) or word  # pyright: ignore[reportArgumentType]  (it takes any string)


@cache
def _english() -> inflect.engine:
    return inflect.engine()


@cache
def _table_words() -> frozenset[str]:
    return frozenset(word for phrase in _phrases() for word in phrase)


@cache
def _longest_phrase() -> int:
    return max(map(len, _phrases()))


@cache
def _phrases() -> dict[Phrase, str | None]:
    """From phrase to category; what is listed stands before what qualifiers make of it."""
    table = object_table()
    listed: dict[Phrase, str | None] = {tuple(phrase.split()): NOTHING for phrase in table.not_objects}
    for category, phrases in table.categories.items():
        listed |= {tuple(phrase.split()): category for phrase in phrases}
    qualified: dict[Phrase, str | None] = {}
    for qualifier in table.qualifiers:
        for category in table.categories if qualifier.of == "all" else qualifier.of:
            qualified |= _with_qualifier(qualifier.words, category, table.categories[category])
    return qualified | listed


def _with_qualifier(words: Sequence[str], category: str, phrases: Sequence[str]) -> dict[Phrase, str | None]:
    return {(word, *phrase.split()): category for word in words for phrase in phrases}
