"""Concepts of an artifact: read when asked for, thumbnails in files of their own, and what is said of a bad one."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from steering import concepts as reader
from steering.artifact import Artifact, load_artifact, save_artifact
from steering.artifact_config import read_config, write_config
from steering.concepts import read_concepts, write_concepts
from steering.errors import BadArtifact

PICTURE, OTHER = "data:image/png;base64,AAAA", "data:image/jpeg;base64,BBBB"


def concept(number: int, *images: dict) -> dict:
    return {"id": number, "label": f"concept {number}", "mean_activation": 0.25, "texts": ["ä\u2028b"],
            "images": list(images)}  # fmt: skip


CONCEPTS = (
    concept(0),
    concept(1, {"reference": "a", "thumbnail": PICTURE}, {"reference": "b", "thumbnail": None}),
    concept(2, {"reference": "c", "thumbnail": None, "url": "http://pictures.invalid/c"}),
    concept(3, {"reference": "a", "thumbnail": OTHER, "url": "http://pictures.invalid/a"}),
)
WITHOUT_IMAGES = {"id": 4, "label": "seldom"}


@pytest.fixture
def artifact(tiny_artifact: Path) -> Artifact:
    return replace(load_artifact(tiny_artifact), concepts=(*CONCEPTS, WITHOUT_IMAGES))


@pytest.fixture
def folder(artifact: Artifact, tmp_path: Path) -> Path:
    save_artifact(tmp_path / "artifact", artifact)
    return tmp_path / "artifact"


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "concepts.jsonl").read_text(encoding="utf-8").split("\n") if line]


def write_lines(folder: Path, *concepts: object) -> None:
    (folder / "concepts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in concepts), encoding="utf-8")


def test_thumbnails_lie_beside_the_lines_and_are_read_back_in_their_place(folder: Path) -> None:
    assert tuple(load_artifact(folder).concepts) == (*CONCEPTS, WITHOUT_IMAGES)
    assert "base64" not in (folder / "concepts.jsonl").read_text()
    assert sorted(path.name.split("-")[0] for path in (folder / "thumbnails").iterdir()) == ["1", "3"]
    assert json.loads((folder / lines_of(folder)[1]["thumbnails"]).read_text()) == [PICTURE, None]


def test_a_concept_without_thumbnails_has_the_line_it_always_had(folder: Path) -> None:
    lines = (folder / "concepts.jsonl").read_text(encoding="utf-8").split("\n")
    for number, before in ((0, CONCEPTS[0]), (2, CONCEPTS[2]), (4, WITHOUT_IMAGES)):
        assert lines[number] == json.dumps(before, ensure_ascii=False)


def test_an_artifact_saved_again_is_the_same_to_the_byte(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    save_artifact(folder, load_artifact(folder))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_an_artifact_with_thumbnails_in_its_lines_is_still_read(folder: Path) -> None:
    shutil.rmtree(folder / "thumbnails")
    write_lines(folder, *CONCEPTS)
    write_config(folder, read_config(folder))
    assert tuple(load_artifact(folder).concepts) == CONCEPTS


def test_without_thumbnails_none_is_opened(folder: Path) -> None:
    shutil.rmtree(folder / "thumbnails")
    (folder / "thumbnails").mkdir()
    for found in read_concepts(folder, thumbnails=False):
        assert all("thumbnail" not in image for image in found.get("images", []))
    write_lines(folder, *CONCEPTS)
    assert "base64" not in json.dumps(list(read_concepts(folder, thumbnails=False)))


def test_an_artifact_without_its_thumbnail_folder_is_whole_to_an_engine(folder: Path) -> None:
    shutil.rmtree(folder / "thumbnails")
    found = list(load_artifact(folder).concepts)
    assert [image["thumbnail"] for image in found[1]["images"]] == [None, None]
    assert found[1]["texts"] == CONCEPTS[1]["texts"]


def test_loading_parses_no_concept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(*_: object) -> None:
        raise AssertionError("a line was parsed")

    (folder / "concepts.jsonl").write_text("not JSON\n")
    write_config(folder, read_config(folder))
    monkeypatch.setattr(reader, "parse_concept", parsed)
    artifact = load_artifact(folder)
    with pytest.raises(AssertionError, match="parsed"):
        next(iter(artifact.concepts))


def test_concepts_of_an_artifact_that_has_since_been_replaced_are_not_taken_for_its_own(
    artifact: Artifact, folder: Path
) -> None:
    loaded = load_artifact(folder)
    save_artifact(folder, replace(artifact, concepts=CONCEPTS[::-1]))
    with pytest.raises(BadArtifact, match="was replaced; load the artifact again"):
        iter(loaded.concepts)


def first_file(folder: Path) -> Path:
    """The thumbnails of concept 1."""
    (file,) = (folder / "thumbnails").glob("1-*.json")
    return file


def refer_to(folder: Path, path: str, content: str) -> None:
    """A line that names another file, which is there and has the digest that its name says."""
    path = path.replace("DIGEST", hashlib.sha256(content.encode()).hexdigest()[:32])
    (folder / path).write_text(content)
    write_lines(folder, lines_of(folder)[1] | {"thumbnails": path})


GOOD = json.dumps([PICTURE, None])
BAD = {
    "another picture": (lambda f: first_file(f).write_text(f'["{OTHER}", null]'), r"1-\w+\.json: it is not the file"),
    "a file less": (lambda f: first_file(f).unlink(), r"1-\w+\.json: .* copy thumbnails/ again"),
    "pictures for other images": (
        lambda f: refer_to(f, "thumbnails/1-DIGEST.json", f'["{PICTURE}"]'),
        "1 thumbnails for 2 images",
    ),
    "a thumbnail that is none": (
        lambda f: refer_to(f, "thumbnails/1-DIGEST.json", '["data:text/html,x", null]'),
        "1-.*json: 1 validation error",
    ),
    "a thumbnail file that is no JSON": (
        lambda f: refer_to(f, "thumbnails/1-DIGEST.json", "["),
        "1-.*json: 1 validation error",
    ),
    "a path outside": (lambda f: refer_to(f, "../1-DIGEST.json", GOOD), "line 1: .*thumbnails"),
    "a path outside by way of the folder": (
        lambda f: refer_to(f, "thumbnails/../../1-DIGEST.json", GOOD),
        "line 1: .*thumbnails",
    ),
    "an absolute path": (lambda f: refer_to(f, f"{f.parent}/1-DIGEST.json", GOOD), "line 1: .*thumbnails"),
    "a line end behind the path": (lambda f: refer_to(f, "thumbnails/1-DIGEST.json\n", GOOD), "line 1: .*thumbnails"),
    "an inline thumbnail that is none": (
        lambda f: write_lines(f, concept(0), concept(1, {"reference": "a", "thumbnail": "javascript:x"})),
        "line 2: .*images.0.thumbnail",
    ),
    "no JSON": (lambda f: (f / "concepts.jsonl").write_text('{"id": 0}\n{'), "line 2: .*copy it again"),
    "JSON without end": (lambda f: (f / "concepts.jsonl").write_text("[" * 200_000), "line 1: .*copy it again"),
    "no object": (lambda f: write_lines(f, 3), "line 1: "),
    "no id": (lambda f: write_lines(f, {"label": "x"}), "line 1: .*id"),
    "images that are none": (lambda f: write_lines(f, {"id": 0, "images": 3}), "line 1: .*images"),
    "no text": (lambda f: (f / "concepts.jsonl").write_bytes(b"\xff\n"), "concepts.jsonl cannot be read"),
    "no file": (lambda f: (f / "concepts.jsonl").unlink(), "concepts.jsonl cannot be read"),
}


@pytest.mark.parametrize("broken", BAD)
def test_what_is_wrong_with_a_concept_is_named(folder: Path, broken: str) -> None:
    break_it, message = BAD[broken]
    break_it(folder)
    with pytest.raises(BadArtifact, match=f"(?s){message}"):
        list(read_concepts(folder, thumbnails=True))


def test_no_name_in_a_concept_decides_where_a_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_concepts(tmp_path / "in", [CONCEPTS[1] | {"id": "../../out"}])
    (written,) = tmp_path.rglob("*.json")
    assert written.relative_to(tmp_path).as_posix().startswith("in/thumbnails/0-")
