"""The options choose the benchmark; one that is missing or means nothing is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.published_benchmarks import CocoFolders, write_pope
from training.command_line import parse_settings
from training.errors import InvalidTraining
from training.evaluation.benchmark import TURNS
from training.evaluation.benchmark_settings import BenchmarkSettings, build_benchmark
from training.evaluation.coco_benchmark import CAPTION_PROMPT
from training.evaluation.coco_objects import coco_categories
from training.evaluation.manifest import describe_benchmark


def test_the_miniature_needs_nothing():
    benchmark = build_benchmark(BenchmarkSettings(captions=3, questions=4))
    assert (benchmark.name, benchmark.captions, len(benchmark.questions)) == ("miniature", 3, 12)
    assert len(benchmark.scenes) == 3


@pytest.mark.parametrize(
    ("given", "turns"), [([], TURNS), (["first"], TURNS[:1]), (["second"], TURNS[1:]), (["both"], TURNS)]
)
def test_turns(given: list[str], turns: tuple[str, ...]):
    argv = ["--captions", "0", "--questions", "2", *(["--turns", *given] if given else [])]
    assert build_benchmark(parse_settings(BenchmarkSettings, program="x", argv=argv)).turns == turns


def test_a_suffix_stands_after_every_question_of_every_benchmark(coco: CocoFolders, tmp_path: Path):
    suffix = "Please answer this question with one word."
    photographs = {"images": coco.images, "question_suffix": suffix}
    for given in (
        {"captions": 0, "questions": 4, "question_suffix": suffix},
        {"benchmark": "coco", "annotations": coco.annotations, "captions": 0, "questions": 4, **photographs},
        {"benchmark": "pope", "pope_files": write_pope(tmp_path), **photographs},
    ):
        benchmark = build_benchmark(BenchmarkSettings.model_validate(given))
        without = build_benchmark(BenchmarkSettings.model_validate(given | {"question_suffix": None}))
        assert [one.text for one in benchmark.questions] == [f"{one.text} {suffix}" for one in without.questions]
        assert benchmark.caption_prompt == without.caption_prompt
        assert describe_benchmark(benchmark)["question_prompt"].endswith(f"? {suffix}")


def test_a_table_of_the_users_own(coco: CocoFolders, tmp_path: Path):
    file = tmp_path / "synonyms.txt"
    file.write_text("\n".join(coco_categories()).replace("person", "somebody, person"))
    argv = ["--benchmark", "coco", "--annotations", str(coco.annotations), "--images", str(coco.images)]
    argv += ["--captions", "2", "--synonyms", str(file)]
    benchmark = build_benchmark(parse_settings(BenchmarkSettings, program="x", argv=argv))
    assert benchmark.mentions("a person and a man") == ["somebody"]
    assert "synonyms.txt" in describe_benchmark(benchmark)["sources_sha256"]


def test_pope_from_the_command_line(coco: CocoFolders, tmp_path: Path):
    files = [str(file) for file in write_pope(tmp_path)]
    argv = ["--benchmark", "pope", "--pope-files", *files, "--images", str(coco.images), "--answer-max-tokens", "4"]
    benchmark = build_benchmark(parse_settings(BenchmarkSettings, program="x", argv=argv))
    assert (benchmark.name, len(benchmark.questions), benchmark.answer_max_tokens) == ("pope", 12, 4)


def test_coco_from_the_command_line(coco: CocoFolders):
    argv = ["--benchmark", "coco", "--annotations", str(coco.annotations), "--images", str(coco.images)]
    argv += ["--captions", "2", "--questions", "6", "--caption-max-tokens", "30"]
    benchmark = build_benchmark(parse_settings(BenchmarkSettings, program="x", argv=argv))
    assert (benchmark.name, benchmark.captions, len(benchmark.questions)) == ("coco", 2, 18)
    assert len(benchmark.scenes) == 3
    assert (benchmark.caption_prompt, benchmark.caption_max_tokens) == (CAPTION_PROMPT, 30)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"benchmark": "pope"}, "--pope-files: --benchmark pope needs it"),
        ({"benchmark": "pope", "pope_files": ["a"]}, "--images: --benchmark pope needs it"),
        ({"benchmark": "coco", "images": "a"}, "--annotations: --benchmark coco needs it"),
        ({"benchmark": "pope", "pope_files": ["a"], "images": "b", "captions": 5}, "--captions: --benchmark pope has"),
        ({"benchmark": "pope", "pope_files": ["a"], "images": "b", "turns": "both"}, "--turns: --benchmark pope has"),
        ({"synonyms": "a"}, "--synonyms: --benchmark miniature has no use for it"),
        ({"images": "a"}, "--images: --benchmark miniature has no use for it"),
        ({"coco_split": "val2017"}, "--coco-split: --benchmark miniature has no use for it"),
        (
            {"benchmark": "coco", "annotations": "a", "images": "b", "pope_files": ["c"]},
            "--pope-files: --benchmark coco has no use for it",
        ),
    ],
)
def test_options_that_do_not_fit_are_named(given: dict[str, Any], message: str):
    with pytest.raises(InvalidTraining, match=message):
        build_benchmark(BenchmarkSettings.model_validate(given))
