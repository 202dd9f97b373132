"""The paper's procedure as a report: every condition under both decodings, from a real tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.benchmarks.hallucination.published_procedure import (
    AGAINST,
    ProcedureSettings,
    main,
    procedure,
    ratios_of,
    run,
)
from tests.training.made_up import answered, board, captioned
from training.evaluation.conditions import OTHER_IMAGES, RANDOM_SEEDS, Task


def test_what_is_asked_is_the_papers():
    by_name = {condition.name: condition for condition in procedure()}
    alphas: dict[Task, float] = {"captions": 0.7, "questions": 0.8}
    for task, alpha in alphas.items():
        asked = by_name["paper"].requests[task]
        assert (asked.form, asked.mode, asked.alpha) == ("published", "exact", alpha)
        assert (asked.beta_up, asked.beta_down, asked.gamma, asked.plausibility) == (0.9, 0.9, 0.6, 0.8)
        bare = by_name["decoding_only"].requests[task]
        assert (bare.gamma, bare.plausibility) == (0.0, 0.8)
        for control, draws in (("other_image", OTHER_IMAGES), ("random", RANDOM_SEEDS)):
            assert by_name[control].requests[task] == asked.model_copy(update={"control": control})
            assert len(by_name[control].seeds) == draws


async def test_a_report(tiny_llava: Path, tiny_artifact: Path):
    settings = ProcedureSettings(model=tiny_llava, artifact=tiny_artifact, captions=3, questions=2, resamples=100)
    report = json.loads(json.dumps(await run(settings)))
    assert set(report) == {"ratios", "spread", "table", "manifest"}
    assert set(report["ratios"]) == set(report["spread"])
    named = {(row["decoding"], row["condition"]) for row in report["table"]}
    conditions = {condition.name for condition in procedure()} | {f"paper_minus_{other}" for other in AGAINST}
    assert named == {(decoding, name) for decoding in ("temperature_1", "greedy") for name in conditions}
    assert report["manifest"]["decodings"]["temperature_1"] == {"temperature": 1.0, "sampling_seed": 0}
    values = {(row["decoding"], row["condition"], row["metric"]): row["value"] for row in report["table"]}
    assert values["greedy", "decoding_only", "recall"] == values["greedy", "plain", "recall"]


def test_a_ratio_is_the_papers_value_by_that_of_the_same_decoding():
    counts = {"decoding_only": captioned(0.6) | answered(0.8), "paper": captioned(0.3) | answered(0.6)}
    ratios = dict(ratios_of(board(**counts)))
    assert ratios["chair_s"][0] == 0.5
    assert ratios["pope_adversarial_accuracy"][0] == 0.75
    assert "pope_adversarial_f1" not in ratios  # nothing is there in these scenes: it is 0
    for ratio, low, high in ratios.values():
        assert low <= ratio <= high


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["published_procedure.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "--sampling-seed" in capsys.readouterr().out
