"""Stage 5: chooses the presets of an artifact on dev scenes and writes them into it. Never sees held-out scenes.

    python -m training.tune_presets --model M --artifact A
    python -m training.tune_presets --model M --artifact A --benchmark coco --annotations annotations --images train2014

1. The alignment gate: where the codes of a pair overlap hardly more than those of strangers there is nothing to
   realign to, and every preset stays off.
2. Each form gets the same budget (`training.evaluation.tuner`).
3. A setting may become the preset `captions` only if it lowers CHAIR_s beyond its interval, costs at most .02 of
   recall (its interval included), and is better than the same setting fed four other scenes' images; `questions`
   likewise by the accuracy on adversarial questions, with no split of first or second turns worse by more than a point
   (their intervals included). Otherwise the preset is off.
4. The server's default is `captions` where that is shown to harm no questions, else `questions` where that is shown to
   harm no captions, else `off`: worse by no more than a margin, in first and in second turns.

On COCO the dev scenes are photographs of a split that no evaluation uses (train2014), the questions built from it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from steering.artifact_config import ArtifactConfig, read_config, write_config
from steering.settings import Preset
from training.alignment import alignment_gate
from training.command_line import parse_settings, run_stage
from training.durable_files import write_json
from training.evaluation.benchmark_settings import check_options
from training.evaluation.conditions import FORMS, TASKS, Task, form_preset_key
from training.evaluation.engines import respondent
from training.evaluation.preset_rules import dev_scores, harm
from training.evaluation.tuner import OFF, SearchSettings, Trial, Tuner, figures, in_short

_PAPER = Preset(form="published", mode="exact", beta_up=0.9, beta_down=0.9, gamma=0.6, plausibility=0.8)
PAPER_PRESETS: dict[str, tuple[Preset, Task]] = {
    "paper_pope": (_PAPER.model_copy(update={"alpha": 0.8}), "questions"),
    "paper_chair": (_PAPER.model_copy(update={"alpha": 0.7}), "captions"),
}
"""The authors' settings and the task they are for; their temperature of 1 is the caller's to set."""


class TuningSettings(SearchSettings):
    """How thoroughly presets are searched for; every form gets the same."""

    json_file: Path | None = Field(default=None, alias="json")
    """Where every trial's scores go."""


async def tune(
    settings: TuningSettings, report: Callable[[str], None] = print
) -> tuple[ArtifactConfig, list[dict[str, Any]]]:
    """Search, write the artifact's config, and return it with all trials."""
    check_options(settings, settings.benchmark)
    config = read_config(settings.artifact)
    passed, figures = alignment_gate(config.alignment, config.faithfulness)
    report(f"alignment gate {'passed' if passed else 'FAILED'}: {figures}")
    presets = {"off": OFF} | dict.fromkeys(TASKS, OFF)
    if not passed:
        return _write(settings.artifact, config, presets, {}, "off", report), []
    if config.default_preset not in config.presets:  # an engine refuses an artifact whose default is missing
        config = write_config(
            settings.artifact, config.model_copy(update={"presets": presets, "default_preset": "off"})
        )
    async with respondent(settings) as answers:
        tuner = Tuner(settings, answers, report)
        by_form: dict[str, Preset] = {}
        for task in TASKS:
            best = [await tuner.best_of_form(form, task) for form in FORMS]
            presets[task] = choose(best)
            by_form |= {form_preset_key(task, form): trial.preset for form, trial in zip(FORMS, best, strict=True)}
        default = await choose_default(tuner, presets, report)
        for name, (preset, task) in PAPER_PRESETS.items():
            scores = dev_scores(await tuner.compared(preset, task, thorough=False), task)
            presets[name] = preset.model_copy(update={"dev_scores": scores})
    return _write(settings.artifact, config, presets, by_form, default, report), tuner.trials


def choose(best: list[Trial]) -> Preset:
    """The fittest that nothing speaks against; else the least bad one, switched off."""
    allowed = [trial for trial in best if not trial.against]
    fittest = min(allowed or best, key=lambda trial: trial.fitness).preset
    return fittest if allowed else fittest.model_copy(update={"strength": 0.0})


async def choose_default(tuner: Tuner, presets: dict[str, Preset], report: Callable[[str], None]) -> str:
    """The preset that helps its own task and is shown not to harm the other one, else `off`."""
    other: dict[Task, Task] = {"captions": "questions", "questions": "captions"}
    for name, task in other.items():
        if presets[name].strength == 0:
            continue
        reasons = harm(await tuner.compared(presets[name], task), "own", task)
        if not reasons:
            return name
        report(f"{name} cannot be the default: {'; '.join(reasons)}")
    return "off"


def _write(
    folder: Path,
    config: ArtifactConfig,
    presets: dict[str, Preset],
    by_form: dict[str, Preset],
    default: str,
    report: Callable[[str], None],
) -> ArtifactConfig:
    update = {"presets": presets, "form_presets": by_form, "default_preset": default}
    config = write_config(folder, config.model_copy(update=update))
    for name, preset in presets.items():
        report(f"{name}: {'off' if preset.strength == 0 else in_short(preset)} {figures(preset.dev_scores)}")
    report(f"default: {default}; fingerprint {config.fingerprint[:12]}")
    return config


def main() -> None:
    settings = parse_settings(TuningSettings, program="python -m training.tune_presets")
    config, trials = asyncio.run(tune(settings, lambda line: print(line, flush=True)))
    if settings.json_file:
        report = {"trials": trials, "alignment": config.alignment, "fingerprint": config.fingerprint}
        write_json(settings.json_file, report)


if __name__ == "__main__":
    run_stage(main)
