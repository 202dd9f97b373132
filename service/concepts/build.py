"""The index of an artifact's concepts: one SQLite file in the user's part of the temporary folder, made once per
machine, whoever needs it first.

It holds labels, words to search by, and where in `concepts.jsonl` each concept stands; neither its texts nor a picture.
It is named after that file's sha256, so it can never belong to another. Knows no HTTP and asks nothing of the index:
`index.py` does.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import sqlite3
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from steering.concepts import CONCEPTS_FILE, parse_concept
from steering.errors import BadArtifact

log = logging.getLogger(__name__)
LAYOUT = 1
"""Of the tables; another one is another file."""
MAX_ID = 999_999_999
TABLES = """
CREATE TABLE concepts (id INTEGER PRIMARY KEY, label TEXT, folded TEXT, start INTEGER, length INTEGER, digest BLOB);
CREATE VIRTUAL TABLE words USING fts5(label, texts, content='', tokenize='unicode61 remove_diacritics 2');
CREATE VIRTUAL TABLE pieces USING fts5(folded, content='', tokenize='trigram');
"""
FINISH = f"""
PRAGMA user_version = {LAYOUT};
CREATE INDEX by_label ON concepts (folded);
INSERT INTO words (words) VALUES ('optimize');
INSERT INTO pieces (pieces) VALUES ('optimize');
"""


class _Image(BaseModel):
    """What is shown of one, beside its thumbnail."""

    reference: str | None = None


class _Described(BaseModel):
    """What is looked for in a concept, or shown of it."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    id: int = Field(ge=0, le=MAX_ID)
    label: str = ""
    mean_activation: float | None = None
    texts: list[str] = Field(default_factory=list)
    images: list[_Image] = Field(default_factory=list)


def index_file(folder: Path, cache: Path) -> Path:
    """The index of the artifact in `folder`, made in `cache` where it is not there yet; other processes wait meanwhile.

    Raises BadArtifact for bad concepts, and where the index cannot be written.
    """
    try:
        with (folder / CONCEPTS_FILE).open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        file = cache / f"concepts-{digest}-{LAYOUT}.sqlite"
        with _alone(file.with_suffix(".lock")):
            if not _is_whole(file):
                _build(folder, file)
    except (OSError, sqlite3.Error) as error:
        raise BadArtifact(
            f"{folder / CONCEPTS_FILE} cannot be indexed in {cache}: {error}; make room, or set TMPDIR",
            field="artifact",
        ) from error
    return file


def cache_folder() -> Path:
    """This user's on this machine, and nobody else's, who could put words into it. Raises BadArtifact."""
    folder = Path(tempfile.gettempdir()) / f"vl_sae_steering_cache-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise BadArtifact(f"{folder} cannot be made: {error}; set TMPDIR", field="artifact") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise BadArtifact(f"{folder} is not a folder of this user alone; remove it, or set TMPDIR", field="artifact")
    return folder


def fold(label: str) -> str:
    """Labels that differ in case and white space only are the same."""
    return " ".join(label.casefold().split())


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Of all processes that want the same file."""
    with lock.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def _is_whole(file: Path) -> bool:
    if not file.exists():
        return False
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as opened:
            finished = opened.execute("PRAGMA user_version").fetchone() == (LAYOUT,)
            return finished and opened.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
    except sqlite3.DatabaseError:
        return False


def _build(folder: Path, file: Path) -> None:
    """Whole, or not there."""
    made = file.with_suffix(".part")
    made.unlink(missing_ok=True)  # of a process that was killed
    try:
        with closing(sqlite3.connect(made)) as opened:
            opened.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + TABLES)
            for row in _rows(folder):
                _insert(opened, row)
            opened.executescript(FINISH)
            opened.commit()
        made.replace(file)
    finally:
        made.unlink(missing_ok=True)
    log.info("the concepts of %s were indexed in %s", folder, file)


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    """One per concept. Raises BadArtifact, naming the line."""
    start, seen = 0, set[int]()
    with (folder / CONCEPTS_FILE).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                row = _row(line, f"{folder / CONCEPTS_FILE}, line {number}")
                if row["id"] in seen:
                    raise BadArtifact(f"{folder / CONCEPTS_FILE}, line {number}: id {row['id']} stands there twice")
                seen.add(row["id"])
                yield {**row, "start": start, "length": len(line), "digest": line_digest(line)}
            start += len(line)


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = _Described.model_validate(parse_concept(line.decode(), where, None))
        found.model_dump_json()  # what JSON can spell and UTF-8 cannot
    except ValueError as error:
        raise BadArtifact(f"{where}: {error}; copy it again from where it was made", field="artifact") from error
    return {"id": found.id, "label": found.label, "folded": fold(found.label), "texts": "\n".join(found.texts)}


def _insert(opened: sqlite3.Connection, row: dict[str, Any]) -> None:
    opened.execute("INSERT INTO concepts VALUES (:id, :label, :folded, :start, :length, :digest)", row)
    opened.execute("INSERT INTO words (rowid, label, texts) VALUES (:id, :label, :texts)", row)
    opened.execute("INSERT INTO pieces (rowid, folded) VALUES (:id, :folded)", row)


def line_digest(line: bytes) -> bytes:
    """Whether a line is still the one that was indexed."""
    return hashlib.sha256(line).digest()[:16]
