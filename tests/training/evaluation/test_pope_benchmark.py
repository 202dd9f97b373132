"""POPE's files are asked in their own words, and what is wrong with one is named by line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.published_benchmarks import POPE_ABSENT, CocoFolders, picture_name, pope_line, write_pope
from training.errors import InvalidTraining
from training.evaluation.pope_benchmark import pope_benchmark, split_of


def test_every_line_is_a_question_in_the_files_words(coco: CocoFolders, tmp_path: Path):
    benchmark = pope_benchmark(write_pope(tmp_path), coco.images)
    assert [scene.name for scene in benchmark.scenes] == [picture_name(42), picture_name(285)]
    assert benchmark.splits == ("random", "popular", "adversarial")
    assert len(benchmark.questions) == 12
    for split, absent in POPE_ABSENT.items():
        asked = [(one.scene, one.text, one.truth) for one in benchmark.questions if one.split == split]
        assert asked == [
            (0, "Is there a dog in the image?", True),
            (0, f"Is there a {absent} in the image?", False),
            (1, "Is there a train in the image?", True),
            (1, f"Is there a {absent} in the image?", False),
        ]
    assert benchmark.scenes[1].image.size == (32, 24)
    assert benchmark.captions == 0
    assert set(benchmark.sources) == {f"coco_pope_{split}.json" for split in POPE_ABSENT}


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1), truth=st.booleans(), escaped=st.booleans())
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_words_are_asked_as_they_stand(coco: CocoFolders, tmp_path: Path, text: str, truth: bool, escaped: bool):
    file = tmp_path / "pope_random.jsonl"
    row = {"image": picture_name(42), "text": text, "label": "yes" if truth else "no"}
    file.write_text("\n" + json.dumps(row, ensure_ascii=escaped) + "\n\n", encoding="utf-8")
    (asked,) = pope_benchmark([file], coco.images).questions
    assert (asked.text, asked.truth) == (text, truth)


def test_one_split_alone_will_do(coco: CocoFolders, tmp_path: Path):
    benchmark = pope_benchmark(write_pope(tmp_path)[2:], coco.images)
    assert benchmark.splits == ("adversarial",)
    assert len(benchmark.questions) == 4


def test_a_part_is_whole_pictures_drawn_by_seed(coco: CocoFolders, tmp_path: Path):
    files = write_pope(tmp_path)
    drawn = {pope_benchmark(files, coco.images, questions=3, seed=seed).scenes[0].name for seed in range(20)}
    assert drawn == {picture_name(42), picture_name(285)}
    part = pope_benchmark(files, coco.images, questions=3, seed=0)
    assert Counter((one.split, one.scene) for one in part.questions) == {(split, 0): 2 for split in POPE_ABSENT}
    assert len(pope_benchmark(files, coco.images, questions=4).scenes) == 2
    with pytest.raises(InvalidTraining, match="--questions: 1 is less"):
        pope_benchmark(files, coco.images, questions=1)


def test_the_name_tells_the_split():
    assert split_of(Path("random/aokvqa_POPE_Popular.jsonl")) == "popular"
    for name in ("coco_pope.json", "random_or_popular.json"):
        with pytest.raises(InvalidTraining, match=f"{name} must hold one of random, popular, adversarial"):
            split_of(Path(name))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps(pope_line(1, 42, "dog", "maybe")), "line 3: label: Input should be 'yes' or 'no'"),
        (json.dumps(pope_line(1, 42, "dog", "YES")), "line 3: label: "),
        (json.dumps({"image": picture_name(42), "label": "yes"}), "line 3: text: Field required"),
        ('{"image": "a.jpg", "text"', "line 3: Invalid JSON"),
        ("[1, 2]", "line 3: Input should be"),
        (json.dumps(pope_line(1, 42, "dog", "no")), "line 3: label 'no', but the same question about COCO_val2014"),
    ],
)
def test_a_bad_line_is_named(coco: CocoFolders, tmp_path: Path, line: str, message: str):
    files = write_pope(tmp_path, lambda split, rows: [*rows[:2], line] if split == "popular" else rows)
    with pytest.raises(InvalidTraining) as refused:
        pope_benchmark(files, coco.images)
    assert f"{files[1]}, {message}" in str(refused.value)


def test_files_that_cannot_be_used_are_named(coco: CocoFolders, tmp_path: Path):
    files = write_pope(tmp_path, lambda split, rows: [] if split == "random" else rows)
    with pytest.raises(InvalidTraining, match=r"coco_pope_random\.json: holds no question"):
        pope_benchmark(files, coco.images)
    files[0].write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidTraining, match=r"coco_pope_random\.json: not UTF-8 text"):
        pope_benchmark(files, coco.images)
    with pytest.raises(InvalidTraining, match=r"gone_random\.json is missing"):
        pope_benchmark([tmp_path / "gone_random.json"], coco.images)
    with pytest.raises(InvalidTraining, match="2 files hold the split popular"):
        pope_benchmark([files[1], tmp_path / "gqa_pope_popular.json"], coco.images)


def test_a_missing_picture_is_named_before_anything_is_asked(coco: CocoFolders, tmp_path: Path):
    files = write_pope(tmp_path)
    (coco.images / picture_name(285)).unlink()
    with pytest.raises(InvalidTraining, match=f"{picture_name(285)} is missing of 2"):
        pope_benchmark(files, coco.images)
    with pytest.raises(InvalidTraining, match=r"--images: .*nowhere is not a folder"):
        pope_benchmark(files, tmp_path / "nowhere")
