"""A manifest changes with whatever would change the numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.published_benchmarks import CocoFolders, picture_name, write_pope
from training.errors import InvalidTraining
from training.evaluation.benchmark import TURNS
from training.evaluation.coco_benchmark import coco_benchmark
from training.evaluation.manifest import describe_benchmark, describe_run, processor_digest, weights_digest
from training.evaluation.pope_benchmark import pope_benchmark


def test_a_changed_pixel_question_or_file_shows(coco: CocoFolders, tmp_path: Path):
    files = write_pope(tmp_path)
    first = describe_benchmark(pope_benchmark(files, coco.images))
    assert describe_benchmark(pope_benchmark(files, coco.images)) == first
    assert first["question_prompt"] == "Is there a dog in the image?"
    files[0].write_text(files[0].read_text().replace("toilet", "sink"))
    asked = describe_benchmark(pope_benchmark(files, coco.images))
    assert {key for key in first if first[key] != asked[key]} == {"sources_sha256", "questions_sha256"}
    Image.new("RGB", (32, 24)).save(coco.images / picture_name(42))
    seen = describe_benchmark(pope_benchmark(files, coco.images))
    assert {key for key in seen if seen[key] != asked[key]} == {"scenes_sha256"}


def test_a_changed_truth_shows(coco: CocoFolders):
    benchmark = coco_benchmark(coco.annotations, coco.images, captions=2)
    scenes = (replace(benchmark.scenes[0], truth=frozenset({"zebra"})), benchmark.scenes[1])
    first, changed = (describe_benchmark(one) for one in (benchmark, replace(benchmark, scenes=scenes)))
    assert first["scenes_sha256"] != changed["scenes_sha256"]
    assert first["question_prompt"] is None


def test_the_turns_and_what_stands_before_a_question_show(coco: CocoFolders):
    both, first = (
        describe_benchmark(coco_benchmark(coco.annotations, coco.images, captions=0, questions=2, turns=turns))
        for turns in (TURNS, TURNS[:1])
    )
    assert (both["turns"], first["turns"]) == (["first", "second"], ["first"])
    assert both["questions_sha256"] != first["questions_sha256"]


def test_an_unreadable_picture_is_found_before_anything_is_asked(coco: CocoFolders, tmp_path: Path):
    benchmark = pope_benchmark(write_pope(tmp_path), coco.images)
    (coco.images / picture_name(285)).write_bytes(b"")
    with pytest.raises(InvalidTraining, match=picture_name(285)):
        describe_benchmark(benchmark)


def test_a_run_names_its_versions_and_weights(tmp_path: Path):
    described = describe_run({"seed": 1})
    assert described["settings"] == {"seed": 1}
    assert {"torch", "transformers", "pillow"} <= described["versions"].keys()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"a")
    first = weights_digest(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"b")
    assert weights_digest(tmp_path) != first


def test_a_run_names_the_gpu_that_it_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert "gpu" not in describe_run({})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert describe_run({})["gpu"] == "a GPU"


def test_a_processor_is_known_by_its_files(tmp_path: Path):
    digests = {processor_digest(tmp_path)}
    for name, content in (("tokenizer.json", "{}"), ("tokenizer.json", "[]"), ("preprocessor_config.json", "{}")):
        (tmp_path / name).write_text(content)
        digests.add(processor_digest(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"b")
    assert len(digests | {processor_digest(tmp_path)}) == 4
