"""The index of concepts on real artifacts: names, near names, pages, searches, and what becomes of damaged files."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.concepts.build import cache_folder, index_file
from service.concepts.index import ConceptIndex
from service.errors import ApiError
from service.settings import BUNDLED_ARTIFACT
from steering.concepts import read_concepts
from steering.errors import BadArtifact

PICTURE = "data:image/png;base64,iVBORw0KGgo="
LINES = [
    {"id": 0, "label": "Star, red", "mean_activation": 0.5, "texts": ["A red star shines."]},
    {"id": 1, "label": "star,  RED", "mean_activation": 0.1, "texts": ["Another."]},
    {"id": 2, "label": "moon, blue", "texts": ["A blue moon, Ännchen.", 'quoted "words" OR NEAR(a b)']},
    {"id": 4, "label": "", "images": [{"reference": "a", "thumbnail": PICTURE}, {"reference": "b", "thumbnail": None}]},
    {"id": 7, "label": "moon, blue"},
]


def made(folder: Path, lines: list) -> Path:
    """An artifact of which only what the index looks at is there."""
    folder.mkdir()
    shutil.copy(BUNDLED_ARTIFACT / "config.json", folder)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "concepts.jsonl").write_text(text + "\n", encoding="utf-8")
    return folder


def refusal(caplog: pytest.LogCaptureFixture, ask: Callable[[], object]) -> str:
    """What the operator reads where a client is only told that something is wrong."""
    with pytest.raises(ApiError, match="tell the operator") as caught:
        ask()
    assert caught.value.code == "bad_artifact"
    return caplog.records[-1].getMessage()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, cache: Path) -> ConceptIndex:
    return ConceptIndex(made(tmp_path / "artifact", LINES), cache)


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> ConceptIndex:
    return ConceptIndex(BUNDLED_ARTIFACT, tmp_path_factory.mktemp("cache"))


def test_all_concepts_are_those_of_the_artifact(bundled: ConceptIndex) -> None:
    found, after, more = [], -1, True
    while more:
        page, more = bundled.page(after=after, limit=100)
        found, after = found + page, page[-1]["id"]
    assert found == list(read_concepts(BUNDLED_ARTIFACT, thumbnails=True))
    assert len(found) == 1024
    assert bundled.one(17) == found[17]
    assert bundled.one(1024) is None


def test_every_label_finds_its_concept(bundled: ConceptIndex) -> None:
    labels = bundled.labels(range(1024))
    named = {concept_id: label for concept_id, label in labels.items() if label}
    assert len(named) == 766
    assert {bundled.find(label) for label in named.values()} == set(named)
    assert bundled.find("1023") == 1023, "a concept without a label"


def test_a_thumbnail_is_a_picture(bundled: ConceptIndex) -> None:
    thumbnail = bundled.thumbnail(0, 0)
    assert thumbnail is not None
    assert (thumbnail.media_type, thumbnail.content[:3]) == ("image/jpeg", b"\xff\xd8\xff")
    assert bundled.thumbnail(0, 3) is None
    assert bundled.thumbnail(5000, 0) is None


def test_labels_of_unknown_and_unnamed_concepts_are_empty(index: ConceptIndex) -> None:
    assert index.labels([2, 4, 3, 2**40]) == {2: "moon, blue", 4: "", 3: "", 2**40: ""}
    assert index.labels([]) == {}


def test_case_decides_only_where_it_must(index: ConceptIndex) -> None:
    assert index.find("Star, red") == 0
    assert index.find("star,  RED") == 1
    assert index.find("7") == 7
    with pytest.raises(ApiError, match="2 concepts; name one by its id: 0, 1"):
        index.find("STAR, RED")
    with pytest.raises(ApiError, match="2 concepts; name one by its id: 2, 7") as caught:
        index.find("moon, blue", field="settings[1].concepts")
    assert (caught.value.code, caught.value.param) == ("invalid_steering", "settings[1].concepts")


@pytest.mark.parametrize("wrong", ["moon, bleu", "mon, blue", "blue moon", "moo"])
def test_an_unknown_label_gets_near_ones(index: ConceptIndex, wrong: str) -> None:
    with pytest.raises(ApiError, match=r"no concept; near ones: 'moon, blue' \(2\)"):
        index.find(wrong)


@pytest.mark.parametrize(
    "wrong", ["", "  ", "zzzzqqqq", '"', "*", "x" * 100_000, "\0", "²", "NEAR(", "1024", "9" * 5000]
)
def test_what_is_like_nothing_is_an_error_too(index: ConceptIndex, wrong: str) -> None:
    with pytest.raises(ApiError) as caught:
        index.find(wrong)
    assert caught.value.code == "invalid_steering"
    assert len(caught.value.message) < 300


def test_pages(index: ConceptIndex) -> None:
    def ids(**asked) -> tuple[list[int], bool]:
        found, more = index.page(**{"after": -1, "limit": 2, **asked})
        return [concept["id"] for concept in found], more

    assert ids() == ([0, 1], True)
    assert ids(after=2) == ([4, 7], False)
    assert ids(after=7) == ([], False)
    assert ids(words="blu") == ([2, 7], False)
    assert ids(words="annchen moon") == ([2], False)
    assert ids(words="moon star") == ([], False)
    assert ids(words="moon", after=2) == ([7], False)
    assert ids(words="!") == ([], False)


def test_search_ranks_labels_before_texts(index: ConceptIndex) -> None:
    found = index.search("red", limit=5)
    assert [one.concept["id"] for one in found] == [0, 1], "of equal labels, that with the word in a text, too"
    assert found[0].score > found[1].score > 0
    assert [one.concept["id"] for one in index.search("SHINES", limit=5)] == [0]
    assert [one.concept["id"] for one in index.search('OR NEAR(a "quoted") *', limit=9)] == [2, 1, 0]
    assert index.search("_ * ^", limit=5) == []


def test_thumbnails_of_older_artifacts(index: ConceptIndex) -> None:
    assert index.thumbnail(4, 0) == ("image/png", b"\x89PNG\r\n\x1a\n")
    assert index.thumbnail(4, 1) is None


@pytest.mark.parametrize(
    "thumbnail", ["data:image/svg+xml;base64,PHN2Zy8+", "data:image/png;base64,?", "data:image/png,a"]
)
def test_a_thumbnail_that_is_no_picture(tmp_path: Path, cache: Path, caplog, thumbnail: str) -> None:
    line = {"id": 0, "label": "", "images": [{"reference": "a", "thumbnail": thumbnail}]}
    index = ConceptIndex(made(tmp_path / "artifact", [line]), cache)
    assert "thumbnail 0 of concept 0" in refusal(caplog, lambda: index.thumbnail(0, 0))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ({"id": -1}, "line 2"),
        ({"id": 10**9}, "line 2"),
        ({"id": 0}, "line 2: id 0 stands there twice"),
        ({"id": 1, "label": 3}, "line 2"),
        ({"id": 1, "texts": "a"}, "line 2"),
        ('{"id": 1, "label": "\\ud800"}', "line 2"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_left(tmp_path: Path, cache: Path, line: object, message: str) -> None:
    folder = made(tmp_path / "artifact", [{"id": 0}, line])
    with pytest.raises(BadArtifact, match=message):
        index_file(folder, cache)
    assert not list(cache.glob("*.part")) + list(cache.glob("*.sqlite"))


def test_concepts_that_were_replaced_are_found_out(index: ConceptIndex, tmp_path: Path, caplog) -> None:
    assert index.one(0) is not None
    file = tmp_path / "artifact" / "concepts.jsonl"
    file.write_text(file.read_text().replace("Star", "Stir"))
    assert "was replaced" in refusal(caplog, lambda: index.one(0))
    file.unlink()
    assert "No such file" in refusal(caplog, lambda: index.one(0))


def test_a_damaged_index_is_made_again(index: ConceptIndex, tmp_path: Path, cache: Path) -> None:
    index.prepare()
    (file,) = cache.glob("*.sqlite")
    for damage in (b"", b"nonsense" * 100, file.read_bytes()[:5000]):
        file.write_bytes(damage)
        assert ConceptIndex(tmp_path / "artifact", cache).labels([2]) == {2: "moon, blue"}


def test_it_is_made_once_however_many_ask(tmp_path: Path, cache: Path) -> None:
    folder = made(tmp_path / "artifact", LINES)
    with ThreadPoolExecutor(8) as threads:
        files = set(threads.map(lambda _: index_file(folder, cache), range(8)))
    (file,) = files
    made_at = file.stat().st_mtime_ns
    script = (
        "import sys; from pathlib import Path; from service.concepts.index import ConceptIndex as C;"
        "print(C(Path(sys.argv[1]), Path(sys.argv[2])).labels([2]), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, folder, cache], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{2: 'moon, blue'} False", "no replica of the ingress loads torch for it"
    assert file.stat().st_mtime_ns == made_at


def test_an_index_that_was_tidied_away_is_made_again(index: ConceptIndex, cache: Path) -> None:
    index.prepare()
    for file in cache.iterdir():
        file.unlink()
    assert index.find("Star, red") == 0


def test_threads_share_an_index(index: ConceptIndex) -> None:
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(lambda _: index.find("Star, red"), range(64))) == {0}


def test_the_cache_is_the_user_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = cache_folder()
    assert folder == cache_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(BadArtifact, match="this user alone"):
        cache_folder()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(BadArtifact, match="this user alone"):
        cache_folder()


def test_no_room_is_said(tmp_path: Path, caplog) -> None:
    folder = made(tmp_path / "artifact", LINES)
    assert "set TMPDIR" in refusal(caplog, ConceptIndex(folder, tmp_path / "nowhere").prepare)


def test_many_concepts_are_one_small_file(tmp_path: Path, cache: Path) -> None:
    lines = [{"id": one, "label": f"word{one % 977} thing{one}", "texts": ["some words"] * 10} for one in range(3000)]
    index = ConceptIndex(made(tmp_path / "artifact", lines), cache)
    assert index.find("word1 thing978") == 978
    with pytest.raises(ApiError, match=r"'word22 thing999' \(999\)"):
        index.find("word22 thingg999")
    (file,) = cache.glob("*.sqlite")
    assert file.stat().st_size < os.stat(tmp_path / "artifact" / "concepts.jsonl").st_size * 2
    assert sqlite3.connect(file).execute("SELECT count(*) FROM concepts").fetchone() == (3000,)
