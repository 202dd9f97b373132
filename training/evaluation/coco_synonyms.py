"""A table of objects in the form that CHAIR's authors publish, for numbers that stand beside papers'. No pictures.

Rohrbach et al. 2018 keep a line per object, its name first and then what else it is called:
    motorcycle, scooter, motor bike, motor cycle, motorbike, moped
Beside the file they have rules in code, which papers' numbers rest on: they are added to the file's table here, and
captions are read by `training.evaluation.coco_objects` as with our own.

Deviations: nouns come from `inflect` (the authors': pattern; later copies: WordNet); a phrase of the file counts as one
also where it is none of the authors' listed double words; a hyphen ends a word.
"""

from __future__ import annotations

from pathlib import Path

from training.durable_files import sha256_of
from training.errors import InvalidTraining
from training.evaluation.coco_objects import ObjectNames, ObjectTable, object_table, words_by_clause

ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
"""Words that 'baby' and 'adult' belong to: a baby elephant is no person."""
UNLISTED_ANIMALS = ("animal", "cub")
"""The same, where the animal is none of the objects."""
RULES = {
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in ANIMALS},
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
}
"""A phrase, and the word that it stands for, which names nothing where the file lacks it."""
NOT_OBJECTS = (
    "home plate",
    "train track",  # not in the authors' first version, but in those that later papers count with
    *(f"{age} {animal}" for age in ("baby", "adult") for animal in UNLISTED_ANIMALS),
)
SILENT_BESIDE = {"seat": "toilet"}
"""'The seat of the toilet' is no chair."""


def names_from_synonyms(file: Path) -> ObjectNames:
    """The file's table with the authors' rules; a line that cannot be used is named by number."""
    lines = _read_lines(file)
    names = {word: name for name, words in lines.items() for word in words}
    objects = {name: list(words) for name, words in lines.items()}
    silent = [phrase for phrase in NOT_OBJECTS if phrase not in names]
    for phrase, stands_for in RULES.items():
        if phrase not in names:
            (objects[names[stands_for]] if stands_for in names else silent).append(phrase)
    table = ObjectTable(
        about=(f"read from {file.name}",),
        categories={name: tuple(words) for name, words in objects.items()},
        not_objects=tuple(silent),
        qualifiers=(),
        singulars=object_table().singulars,
        silent_beside=SILENT_BESIDE,
    )
    return ObjectNames(table, source=file, sources={file.name: sha256_of(file)})


def _read_lines(file: Path) -> dict[str, tuple[str, ...]]:
    """By the first word of each line all that stand there, in the spelling of captions; blank lines are passed over."""
    objects: dict[str, tuple[str, ...]] = {}
    line_of: dict[str, int] = {}
    for number, line in enumerate(_text_of(file).splitlines(), start=1):
        if not line.strip():
            continue
        words = tuple(dict.fromkeys(_spelled_as_read(part) for part in line.split(",")))
        if "" in words:
            raise InvalidTraining(f"{file}, line {number}: an empty name; a line is name, name, ...")
        for word in words:
            if word in line_of:
                raise InvalidTraining(f"{file}, line {number}: {word!r} stands in line {line_of[word]}, too")
            line_of[word] = number
        objects[words[0]] = words
    if not objects:
        raise InvalidTraining(f"{file}: holds no object; a line is name, name, ...")
    return objects


def _spelled_as_read(name: str) -> str:
    """As the words of a caption are, so that 'iPhone' and 'T-shirt' can be found."""
    return " ".join(word for clause in words_by_clause(name) for word in clause)


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidTraining(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise InvalidTraining(f"--synonyms: {file} cannot be read: {error.strerror}") from None
