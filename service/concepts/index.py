"""What the artifact's concepts are called, what they show, and which of them are about something.

    index = ConceptIndex(Path(artifact))
    index.labels([17, 4])          # {17: "star, red", 4: ""}
    index.find("Star, red")        # 17; ApiError with near labels where there is none, or more than one

Looked up in a file that `build.py` makes; nothing is kept in memory. All of it blocks: for milliseconds, a search of
65,536 concepts for a second at most, and at first for as long as the index is being made. Call it in a thread. Knows no
HTTP.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import logging
import re
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from service.concepts.build import MAX_ID, cache_folder, fold, index_file, line_digest
from service.errors import ApiError
from steering.artifact_config import read_config
from steering.concepts import CONCEPTS_FILE, Concept, parse_concept
from steering.errors import BadArtifact

log = logging.getLogger(__name__)
MAX_WORDS = 16
"""Of a search; the rest is not looked at."""
NEAR_LABELS, NEAR_CANDIDATES = 5, 100
COMPARED_CHARACTERS = 64
"""Of a label that nobody knows."""
WORD = re.compile(r"[^\W_]+")
THUMBNAIL = re.compile(r"data:(image/(?:png|jpeg|webp));base64,(.*)", re.DOTALL)
"""What browsers show as pictures and never run."""
PLACE = "concepts.start, concepts.length, concepts.digest"
"""Where a line stands: its first byte, its bytes, its digest."""
SEARCH = f"""
WITH scores (id, score) AS MATERIALIZED (
    SELECT rowid, -10 * bm25(words) FROM words WHERE words MATCH ?
    UNION ALL SELECT rowid, -bm25(words) FROM words WHERE words MATCH ?)
SELECT concepts.id, {PLACE}, sum(score) FROM scores JOIN concepts ON concepts.id = scores.id
GROUP BY concepts.id ORDER BY sum(score) DESC, concepts.id LIMIT ?
"""
"""A word of the label counts ten times one of the texts, and is rare or common among labels."""


class Thumbnail(NamedTuple):
    """A small picture, encoded."""

    media_type: str
    content: bytes


class Found(NamedTuple):
    """A concept that a search found."""

    concept: Concept
    score: float
    """Above 0; larger is better. Only to be compared within one search."""


@contextmanager
def _for_clients() -> Iterator[None]:
    """What is wrong with which file stands in the log; a client is told that something is."""
    try:
        yield
    except BadArtifact as error:
        log.error("the concepts cannot be shown: %s", error.message)
        raise ApiError("bad_artifact", "the artifact's concepts cannot be read; tell the operator") from None


class ConceptIndex:
    """The concepts of one artifact. Its methods may be called from several threads, and raise ApiError, `bad_artifact`,
    where its files are damaged, or were replaced since they were indexed."""

    def __init__(self, folder: Path, cache: Path | None = None) -> None:
        """Touches no file yet. `cache`: where the index lies (default: the user's part of the temporary folder)."""
        self._folder, self._cache = folder, cache
        self._lock = threading.Lock()
        self._file: Path | None = None
        self._num_concepts, self._fingerprint = 0, ""

    @_for_clients()
    def prepare(self) -> None:
        """Make the index, if no process of this machine has; else the first question does."""
        self._indexed()

    @_for_clients()
    def fingerprint(self) -> str:
        """Of the artifact: other artifacts' ids mean other concepts."""
        self._indexed()
        return self._fingerprint

    @_for_clients()
    def labels(self, ids: Iterable[int]) -> dict[int, str]:
        """Id to label; "" for a concept that has none, or of which nothing is said."""
        wanted = list(ids)
        holes = ", ".join("?" * len(wanted))
        found = dict(self._ask(f"SELECT id, label FROM concepts WHERE id IN ({holes})", wanted))
        return {concept_id: found.get(concept_id, "") for concept_id in wanted}

    @_for_clients()
    def find(self, label_or_id: str, *, field: str = "steering.concepts") -> int:
        """The id of a concept that a client named: by id ("17"), or by label, in which case and white space may differ.

        Raises ApiError, `invalid_steering` on `field`, where there is no such concept, with the labels most like it;
        and where several have the label, with their ids.
        """
        if label_or_id.isascii() and label_or_id.isdecimal():
            return self._check_id(label_or_id, field)
        folded = fold(label_or_id)
        found = self._ask("SELECT id, label FROM concepts WHERE folded = ? ORDER BY id", [folded]) if folded else []
        same = [concept_id for concept_id, label in found if label == label_or_id] or [one for one, _ in found]
        if len(same) == 1:
            return same[0]
        shown = f"{field}: {label_or_id[:COMPARED_CHARACTERS]!r}"
        if same:
            several = ", ".join(map(str, same[: 2 * NEAR_LABELS]))
            message = f"{shown} is the label of {len(same)} concepts; name one by its id: {several}"
        else:
            near = ", ".join(f"{label!r} ({one})" for one, label in self.near(label_or_id))
            message = f"{shown} is the label of no concept; {f'near ones: {near}' if near else 'see GET /v1/concepts'}"
        raise ApiError("invalid_steering", message, param=field)

    @_for_clients()
    def near(self, label: str) -> list[tuple[int, str]]:
        """(id, label) of those most like a label, the most alike first; `difflib` judges, among those that share most
        pieces of three characters with it, or words."""
        folded = fold(label)[:COMPARED_CHARACTERS]
        pieces = {folded[start : start + 3] for start in range(len(folded) - 2)}
        rows: dict[str, tuple[int, str]] = {}
        for table, query in (("pieces", _any_of(pieces)), ("words", _any_of(_words(label), prefix=True))):
            select = f"SELECT id, concepts.label, concepts.folded FROM {table} JOIN concepts ON id = {table}.rowid"
            ranked = f"{select} WHERE {table} MATCH ? AND concepts.folded != '' ORDER BY rank LIMIT {NEAR_CANDIDATES}"
            for concept_id, known, known_folded in self._ask(ranked, [query]) if query else []:
                rows.setdefault(known_folded, (concept_id, known))
        return [rows[like] for like in difflib.get_close_matches(folded, rows, NEAR_LABELS, cutoff=0.2)]

    @_for_clients()
    def page(self, *, after: int, limit: int, words: str = "") -> tuple[list[Concept], bool]:
        """At most `limit` concepts with an id above `after`, in order, and whether there are more; with `words`, those
        whose label and texts have words beginning with each of them."""
        asked = _words(words)
        if words and not asked:
            return [], False
        if asked:
            query = " AND ".join(f'"{word}"*' for word in asked)
            select = (
                f"SELECT id, {PLACE} FROM words JOIN concepts ON id = words.rowid WHERE words MATCH ? AND words.rowid"
            )
            rows = self._ask(f"{select} > ? ORDER BY words.rowid LIMIT ?", [query, after, limit + 1])
        else:
            rows = self._ask(f"SELECT id, {PLACE} FROM concepts WHERE id > ? ORDER BY id LIMIT ?", [after, limit + 1])
        return [self._read(*row) for row in rows[:limit]], len(rows) > limit

    @_for_clients()
    def one(self, concept_id: int) -> Concept | None:
        """With thumbnails as data URLs; None where nothing is said of it."""
        rows = self._ask(f"SELECT id, {PLACE} FROM concepts WHERE id = ?", [concept_id])
        return self._read(*rows[0]) if rows else None

    @_for_clients()
    def thumbnail(self, concept_id: int, image: int) -> Thumbnail | None:
        """Of the concept's image with this place among its images; None where there is none."""
        concept = self.one(concept_id)
        images = concept.get("images", []) if concept else []
        if image >= len(images) or images[image]["thumbnail"] is None:
            return None
        form = THUMBNAIL.fullmatch(images[image]["thumbnail"])
        try:
            if form is None:
                raise ValueError("it is no PNG, JPEG or WebP as a data URL")
            return Thumbnail(form[1], base64.b64decode(form[2], validate=True))
        except (ValueError, binascii.Error) as error:
            raise BadArtifact(f"thumbnail {image} of concept {concept_id}: {error}", field="artifact") from error

    @_for_clients()
    def search(self, words: str, *, limit: int) -> list[Found]:
        """Concepts with any of the words in label or texts, the best first: by BM25, of labels and texts apart."""
        query = _any_of(_words(words), prefix=True)
        rows = self._ask(SEARCH, [f"label: ({query})", f"texts: ({query})", limit]) if query else []
        return [Found(self._read(*row[:4]), row[4]) for row in rows]

    def _check_id(self, written: str, field: str) -> int:
        self.prepare()
        if len(written) > len(str(MAX_ID)) or int(written) >= self._num_concepts:
            last = self._num_concepts - 1
            raise ApiError("invalid_steering", f"{field}: the concepts' ids are 0 to {last}", param=field)
        return int(written)

    def _ask(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """A connection of its own for each: a long search keeps nobody waiting."""
        file = self._indexed()
        try:
            with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro&immutable=1", uri=True)) as opened:
                return opened.execute(query, values).fetchall()
        except sqlite3.Error as error:
            self._file = None
            raise BadArtifact(f"the index of the concepts cannot be read: {error}", field="artifact") from error

    def _indexed(self) -> Path:
        with self._lock:
            if self._file is None or not self._file.exists():  # temporary folders are tidied up
                config = read_config(self._folder)
                self._num_concepts, self._fingerprint = config.num_concepts, config.fingerprint
                self._file = index_file(self._folder, self._cache or cache_folder())
            return self._file

    def _read(self, concept_id: int, start: int, length: int, digest: bytes) -> Concept:
        """A concept from the artifact's own files."""
        file, where = self._folder / CONCEPTS_FILE, f"{self._folder / CONCEPTS_FILE}, concept {concept_id}"
        try:
            with file.open("rb") as lines:
                lines.seek(start)
                line = lines.read(length)
        except OSError as error:
            raise BadArtifact(f"{where}: {error.strerror}", field="artifact") from error
        if line_digest(line) != digest:
            raise BadArtifact(f"{where}: the file was replaced; start the service again", field="artifact")
        return parse_concept(line.decode(), where, self._folder)


def _words(text: str) -> list[str]:
    return WORD.findall(text)[:MAX_WORDS]


def _any_of(terms: Iterable[str], *, prefix: bool = False) -> str:
    """A query of FTS5's; every term in quotation marks, which terms lose."""
    quoted = ('"{}"{}'.format(term.replace('"', '""'), "*" if prefix else "") for term in terms)
    return " OR ".join(quoted)
