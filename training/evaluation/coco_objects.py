"""Which of COCO's 80 object categories a caption names. Knows no picture, no annotation file and no model.

A caption is cut at punctuation; each word is put into the singular (`inflect`, corrected where it errs) and the longest
phrase of a table that begins at a word counts: 'hot dog' is no dog, 'train track' names nothing, 'baby elephant' is one
elephant and no person. The table is our own, `data/coco_objects.json`, so that scores stand beside each other but not
beside those of other tables to the last digit; or the user's (`training.evaluation.coco_synonyms`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

import inflect
from pydantic import BaseModel, ConfigDict

from training.errors import InvalidTraining

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
    silent_beside: dict[str, str] = {}
    """A word that names nothing in a caption in which the other stands, too."""


@cache
def object_table() -> ObjectTable:
    """Our own table, read once."""
    return ObjectTable.model_validate_json(TABLE_FILE.read_bytes())


def coco_categories() -> tuple[str, ...]:
    """The 80 names, as annotation files spell them."""
    return tuple(object_table().categories)


class ObjectNames:
    """A table made ready for reading captions."""

    def __init__(self, table: ObjectTable, *, source: Path, sources: Mapping[str, str] | None = None) -> None:
        """`source`: what an error calls the table; `sources`: sha256 of what the user gave, by the file's name."""
        self.names = tuple(table.categories)
        self.sources = dict(sources or {})
        self.singular = lru_cache(maxsize=65536)(self._singular)
        self._table, self._source = table, source
        self._phrases = _phrases(table)
        self._words = frozenset(word for phrase in self._phrases for word in phrase)
        self._longest = max(map(len, self._phrases))

    def mentioned(self, caption: str) -> list[str]:
        """The objects that a caption names, in order and with repetitions."""
        clauses = [[self.singular(word) for word in words] for words in words_by_clause(caption)]
        said = {word for clause in clauses for word in clause}
        silent = {(word,) for word, other in self._table.silent_beside.items() if other in said}
        return [name for clause in clauses for phrase, name in self._named(clause) if phrase not in silent]

    def name_of(self, category: str) -> str:
        """What the table calls one of COCO's categories; one that it lacks is refused."""
        name = self._phrases.get(tuple(category.split()))
        if name is None:
            raise InvalidTraining(f"{self._source}: no line holds COCO's category {category!r}; add one")
        return name

    def _named(self, clause: list[str]) -> Iterator[tuple[Phrase, str]]:
        start = 0
        while start < len(clause):
            ends = range(min(len(clause), start + self._longest), start, -1)
            end = next((end for end in ends if tuple(clause[start:end]) in self._phrases), start + 1)
            phrase = tuple(clause[start:end])
            if (name := self._phrases.get(phrase)) is not None:
                yield phrase, name
            start = end

    def _singular(self, word: str) -> str:
        """The word's singular; a word of the table is one already ('bus', 'scissors')."""
        if word in self._words:
            return word
        if (known := self._table.singulars.get(word)) is not None:
            return known
        return _english().singular_noun(word) or word  # pyright: ignore[reportArgumentType]  (it takes any string)


@cache
def object_names() -> ObjectNames:
    """Our own table's."""
    return ObjectNames(object_table(), source=TABLE_FILE)


def words_by_clause(text: str) -> Iterator[list[str]]:
    """Words in lower case, between one punctuation mark and the next; a possessive is its noun."""
    without_possessives = re.sub(r"['’]s?\b", "", text.lower())
    for clause in re.split(r"[^\w\s/-]+", without_possessives):
        yield re.findall(r"[^\W_]+", clause)


@cache
def _english() -> inflect.engine:
    return inflect.engine()


def _phrases(table: ObjectTable) -> dict[Phrase, str | None]:
    """From phrase to object; what is listed stands before what qualifiers make of it."""
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
