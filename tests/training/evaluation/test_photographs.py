"""POPE's and COCO's formats through a real engine: the bundled miniature answers about drawn scenes on files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.published_benchmarks import CocoFolders, picture_name
from training.command_line import run_stage
from training.evaluate_hallucination import EvaluationSettings, evaluate, main
from training.evaluation.miniature_benchmark import miniature_benchmark
from training.miniature.paths import ARTIFACT

needs_miniature = pytest.mark.skipif(not (ARTIFACT / "config.json").exists(), reason="the miniature has not been built")


def settings(**changed: Any) -> EvaluationSettings:
    return EvaluationSettings.model_validate({"conditions": ["steered", "other_image"], "resamples": 200} | changed)


@needs_miniature
@pytest.mark.slow
async def test_the_miniature_answers_pope_files_as_it_answers_its_own_world(tmp_path: Path):
    """The same scenes and questions, once drawn in memory and once from files as POPE's, give the same answers."""
    world = miniature_benchmark(captions=0, questions=12, seed=8)
    images = tmp_path / "val2014"
    images.mkdir()
    files = []
    for number, scene in enumerate(world.scenes):
        scene.image.save(images / picture_name(number), format="PNG")  # the engine must see the same pixels
    for split in world.splits:
        asked = [one for one in world.questions if one.split == split]
        rows = [
            {"question_id": number, "image": picture_name(one.scene), "text": one.text}
            | {"label": "yes" if one.truth else "no"}
            for number, one in enumerate(asked, start=1)
        ]
        files.append(tmp_path / f"coco_pope_{split}.json")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = await evaluate(settings(captions=0, questions=12, seed=8))
    read = await evaluate(settings(benchmark="pope", pope_files=files, images=images, answer_max_tokens=3))
    for name in ("plain", "steered"):
        values = [
            {
                (split, metric): number["value"]
                for split, metrics in report["conditions"][name]["pope"].items()
                for metric, number in metrics.items()
            }
            for report in (own, read)
        ]
        assert values[0] == values[1]
        assert "chair_s" not in read["conditions"][name]
    assert read["conditions"]["plain"]["pope"]["random"]["accuracy"]["value"] > 0.6
    described = read["manifest"]["benchmark"]
    assert (described["name"], described["scenes"], described["questions"]) == ("pope", 6, 36)
    assert set(described["sources_sha256"]) == {file.name for file in files}
    assert "steered_minus_other_image" in read["differences"]


@needs_miniature
async def test_coco_captions_run_to_a_report(coco: CocoFolders):
    report = await evaluate(
        settings(
            benchmark="coco",
            annotations=coco.annotations,
            images=coco.images,
            captions=3,
            questions=4,
            caption_max_tokens=12,
            answer_max_tokens=2,
        )
    )
    plain = report["conditions"]["plain"]
    assert plain["length"]["value"] > 0
    assert plain["chair_i"]["value"] == 0  # the miniature knows no object of COCO's
    assert set(plain["pope"]) == {"random", "popular", "adversarial"}
    assert {row["scene"] for row in plain["examples"]} <= {file.name for file in coco.images.iterdir()}
    assert report["manifest"]["benchmark"]["caption_max_tokens"] == 12
    assert json.dumps(report)


def test_bad_input_ends_the_program_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    files = ["--pope-files", "gone_random.json", "--images", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["evaluate_hallucination", "--benchmark", "pope", *files])
    with pytest.raises(SystemExit) as ended:
        run_stage(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --pope-files: gone_random.json is missing\n"
