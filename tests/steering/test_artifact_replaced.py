"""One artifact takes another's place: what is there when that fails, and what a reader sees meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from steering.artifact import load_artifact, save_artifact
from steering.artifact_config import read_config, write_config
from steering.errors import BadArtifact

RENAME, WRITE_TEXT = Path.rename, Path.write_text


@pytest.fixture
def folder(tiny_artifact, tmp_path) -> Path:
    return shutil.copytree(tiny_artifact, tmp_path / "artifact")


@pytest.fixture
def other(folder):
    """Another artifact than that in the folder."""
    loaded = load_artifact(folder)
    return replace(loaded, config=loaded.config.model_copy(update={"min_text_tokens": 7}))


def failing_at(*calls: int) -> Callable[[Path, Path], Path]:
    """`Path.rename`, which fails when called for the first time, second time ..."""
    made = iter(range(1, 10))

    def rename(self: Path, target: Path) -> Path:
        if next(made) in calls:
            raise OSError(16, "Device or resource busy")
        return RENAME(self, target)

    return rename


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("call", [1, 2])
def test_a_rename_that_fails_leaves_the_old_artifact_in_its_place(folder, other, monkeypatch, call):
    before = bytes_of(folder)
    monkeypatch.setattr(Path, "rename", failing_at(call))
    with pytest.raises(BadArtifact, match=r"cannot be written: .*busy; make room or give another folder"):
        save_artifact(folder, other)
    assert bytes_of(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["artifact"]


def test_an_interrupt_between_the_renames_puts_the_old_artifact_back(folder, other, monkeypatch):
    def interrupted(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise KeyboardInterrupt
        return RENAME(self, target)

    before = bytes_of(folder)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_artifact(folder, other)
    assert bytes_of(folder) == before


def test_an_artifact_that_cannot_be_put_back_is_whole_where_the_error_says(folder, other, monkeypatch):
    before = bytes_of(folder)
    monkeypatch.setattr(Path, "rename", failing_at(2, 3))
    with pytest.raises(BadArtifact, match=r"is now .*/\.artifact\.[0-9a-f]{8}\.old, whole") as caught:
        save_artifact(folder, other)
    (left,) = folder.parent.iterdir()
    assert str(left) in caught.value.message
    assert bytes_of(left) == before


def test_what_is_in_place_or_aside_is_whole_at_every_rename(folder, other, monkeypatch):
    """What a crash at any of them would leave, and a reader would find."""
    old, seen = read_config(folder).fingerprint, []

    def rename(self: Path, target: Path) -> Path:
        seen.append({path.suffix: load_artifact(path).config.fingerprint for path in folder.parent.iterdir()})
        return RENAME(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    new = save_artifact(folder, other).fingerprint
    assert seen == [{"": old, ".part": new}, {".old": old, ".part": new}]
    assert [path.name for path in folder.parent.iterdir()] == ["artifact"]
    assert load_artifact(folder).config.fingerprint == new


def test_the_old_artifact_goes_only_when_the_new_one_is_in_place(folder, other, monkeypatch):
    found = []

    def removed(path: Path, **_: object) -> None:
        found.append((Path(path).suffix, load_artifact(folder).config.min_text_tokens))

    monkeypatch.setattr("steering.artifact.shutil.rmtree", removed)
    save_artifact(folder, other)
    assert found[0] == (".old", 7)


def test_of_a_link_what_it_points_to_is_replaced(folder, other, tmp_path):
    (tmp_path / "current").symlink_to(folder)
    save_artifact(tmp_path / "current", other)
    assert (tmp_path / "current").is_symlink()
    assert load_artifact(folder).config.min_text_tokens == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "current"]


def test_a_configuration_that_cannot_be_written_leaves_the_old_one(folder, monkeypatch):
    def full(self: Path, content: str, **_: object) -> None:
        WRITE_TEXT(self, content[:20])
        raise OSError(28, "No space left on device")

    config, before = read_config(folder), bytes_of(folder)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(BadArtifact, match=r"config\.json cannot be written: .*space.*; make room"):
        write_config(folder, config.model_copy(update={"min_text_tokens": 7}))
    assert bytes_of(folder) == before
