"""A table in the form that CHAIR's authors publish names objects as their code does; what is wrong in it is named."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.published_benchmarks import CATEGORIES, CocoFolders
from training.errors import InvalidTraining
from training.evaluation.coco_benchmark import coco_benchmark, existence_question
from training.evaluation.coco_synonyms import names_from_synonyms

TABLE = """person, woman, man, baby, passenger, woman
motorcycle,  motor bike, scooter
airplane, jet
train, engine
elephant
tie, bow
wine glass
chair, seat, stool
toilet, loo
cell phone, iPhone
dining table, table 
tv, T-V set
hot dog
dog, puppy
teddy bear
cup, mug
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    file = tmp_path / "synonyms.txt"
    file.write_text(TABLE)
    return file


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("Two women on motor bikes and a scooter", ["person", "motorcycle", "motorcycle"]),
        ("A baby elephant, an adult elephant and a baby", ["elephant", "elephant", "person"]),
        ("A baby bird and a baby animal", []),  # this table has no bird
        ("A passenger jet, a passenger train, a passenger", ["airplane", "train", "person"]),
        ("Train tracks; a man at home plate", ["person"]),
        ("A bow tie and two ties", ["tie", "tie"]),
        ("Wine glasses on the dining table", ["wine glass", "dining table"]),
        ("The seat is up: a toilet seat, a seat and a stool", ["toilet", "chair"]),
        ("A seat", ["chair"]),
        ("an IPHONE beside a t-v set", ["cell phone", "tv"]),
        ("A hot dog for the dogs", ["hot dog", "dog"]),
    ],
)
def test_captions_are_read_with_the_authors_rules(table: Path, caption: str, named: list[str]):
    assert names_from_synonyms(table).mentioned(caption) == named


def test_a_benchmark_is_counted_with_the_users_table(coco: CocoFolders, table: Path):
    benchmark = coco_benchmark(coco.annotations, coco.images, captions=5, questions=10, synonyms=table)
    truth = {scene.seed: set(scene.truth) for scene in benchmark.scenes}
    assert truth[42] == {"dog", "chair"}
    assert truth[285] == {"train", "person"}  # 'locomotive' is not in it, 'woman' is
    assert truth[310_196] == {"teddy bear", "cup"}
    assert benchmark.mentions("An engine in the loo") == ["train", "toilet"]
    assert benchmark.sources["synonyms.txt"] == hashlib.sha256(table.read_bytes()).hexdigest()
    names = {line.split(",")[0].strip() for line in TABLE.splitlines()}
    assert {one.text for one in benchmark.questions} <= {existence_question(name) for name in names}


def test_a_category_may_stand_anywhere_in_a_line_but_not_nowhere(coco: CocoFolders, table: Path):
    table.write_text(TABLE.replace("dog, puppy", "pet, dog, cat"))
    benchmark = coco_benchmark(coco.annotations, coco.images, captions=5, synonyms=table)
    assert next(scene.truth for scene in benchmark.scenes if scene.seed == 42) == {"pet", "chair"}
    table.write_text(TABLE.replace("cup, mug\n", ""))
    coco_benchmark.cache_clear()
    with pytest.raises(InvalidTraining, match=r"synonyms.txt: no line holds COCO's category 'cup'; add one"):
        coco_benchmark(coco.annotations, coco.images, captions=5, synonyms=table)
    assert "cup" in CATEGORIES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"dog, puppy\ncat, puppy\n", "synonyms.txt, line 2: 'puppy' stands in line 1, too"),
        (b"dog, Puppy\n\ncat, puppies, puppy\n", "synonyms.txt, line 3: 'puppy' stands in line 1, too"),
        (b"dog\ncat, , kitten\n", "synonyms.txt, line 2: an empty name"),
        (b"dog\ncat,\n", "synonyms.txt, line 2: an empty name"),
        (b"dog\n, cat\n", "synonyms.txt, line 2: an empty name"),
        (b"\n \n", "synonyms.txt: holds no object"),
        (b"", "synonyms.txt: holds no object"),
        (b"caf\xe9\n", "synonyms.txt: not UTF-8 text"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(table: Path, content: bytes, message: str):
    table.write_bytes(content)
    with pytest.raises(InvalidTraining, match=message):
        names_from_synonyms(table)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(InvalidTraining, match=r"--synonyms: .*nowhere.txt cannot be read: No such file"):
        names_from_synonyms(tmp_path / "nowhere.txt")
    with pytest.raises(InvalidTraining, match="cannot be read: Is a directory"):
        names_from_synonyms(tmp_path)
