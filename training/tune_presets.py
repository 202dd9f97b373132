"""Stage 5: chooses the presets of an artifact on dev scenes and writes them into it. Never sees held-out scenes.

    python -m training.tune_presets --model M --artifact A
    python -m training.tune_presets --model M --artifact A --benchmark coco --annotations annotations --images train2014

1. The alignment gate: where the codes of a pair overlap hardly more than those of strangers there is nothing to
   realign to, and every preset stays off.
2. Each form gets the same budget: a grid, the neighbours of its best settings, a shortlist that is also fed another
   scene's image, and a final on fresh dev scenes.
3. A setting may become the preset `captions` only if it lowers CHAIR_s beyond its interval, costs at most .02 of
   recall (its interval included), and is better than the same setting fed another scene's image; `questions` likewise
   by the accuracy on adversarial questions, with no split worse. Otherwise the preset is off.
4. The server's default is `captions` where that harms no questions, else `questions` where that harms no captions,
   else `off`.

On COCO the dev scenes are photographs of a split that no evaluation uses (train2014), the questions built from it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from steering.artifact_config import ArtifactConfig, read_config, write_config
from steering.request import Control, Form
from steering.settings import Preset
from training.alignment import alignment_gate
from training.command_line import parse_settings, run_stage
from training.durable_files import write_json
from training.evaluate_hallucination import EngineSettings, respondent
from training.evaluation.asking import Respondent
from training.evaluation.benchmark import Benchmark
from training.evaluation.benchmark_settings import PhotographSettings, check_options, coco_photographs
from training.evaluation.conditions import FORMS, TASKS, Condition, Task, as_request, form_preset_key
from training.evaluation.measuring import Measurement, measure
from training.evaluation.miniature_benchmark import miniature_benchmark
from training.evaluation.preset_rules import AGAINST, FITNESS, FORGETS, dev_scores, harm
from training.evaluation.scores import RESAMPLES, Scoreboard

BETAS = ((1.0, 0.0), (0.9, 0.9), (1.0, 0.5), (0.0, 1.0))
"""(beta_up, beta_down) of the grid: only add, the paper's, mostly add, only remove."""
OFF = Preset(strength=0.0, alpha=0.0)
_PAPER = Preset(form="published", mode="exact", beta_up=0.9, beta_down=0.9, gamma=0.6, plausibility=0.8)
PAPER_PRESETS: dict[str, tuple[Preset, Task]] = {
    "paper_pope": (_PAPER.model_copy(update={"alpha": 0.8}), "questions"),
    "paper_chair": (_PAPER.model_copy(update={"alpha": 0.7}), "captions"),
}
"""The authors' settings and the task they are for; their temperature of 1 is the caller's to set."""
SOFTENINGS = 3
"""How often the step of a form's best setting is made smaller where only recall speaks against it."""
Stage = Literal["search", "final"]
SEEDS: dict[Stage, int] = {"search": 20, "final": 21}
"""Windows of the miniature's dev scenes: the final is held on scenes that the search has not seen."""


class TuningSettings(EngineSettings, PhotographSettings):
    """How thoroughly presets are searched for; every form gets the same."""

    benchmark: Literal["miniature", "coco"] = "miniature"
    """Where the dev scenes come from."""
    coco_split: str = "train2014"
    """Split of COCO that the dev scenes are drawn from; evaluate on another."""
    alphas: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """Steps of the grid."""
    search_captions: int = Field(default=160, ge=1)
    """Dev scenes captioned per setting of the search."""
    search_questions: int = Field(default=160, ge=2)
    """Dev questions per POPE split and setting of the search; even."""
    refined: int = Field(default=2, ge=0)
    """Best settings of the grid whose neighbours are tried too."""
    finalists: int = Field(default=3, ge=1)
    """Settings per form that reach the final, from a shortlist of twice as many."""
    final_captions: int = Field(default=500, ge=1)
    """Dev scenes captioned in the final."""
    final_questions: int = Field(default=1000, ge=2)
    """Dev questions per POPE split in the final; even."""
    json_file: Path | None = Field(default=None, alias="json")
    """Where every trial's scores go."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting and how it did; `against` is empty where it may become a preset."""

    preset: Preset
    fitness: float
    """Lower is better."""
    scores: dict[str, float] = field(default_factory=dict)
    against: tuple[str, ...] = ()


def grid(form: Form, alphas: Iterable[float]) -> list[Preset]:
    """The same steps and betas for every form."""
    return [Preset(form=form, alpha=alpha, beta_up=up, beta_down=down) for alpha, (up, down) in product(alphas, BETAS)]


def neighbours(preset: Preset) -> list[Preset]:
    """A smaller and a larger step, and one of the betas moved."""
    changes: list[dict[str, float]] = [
        {"alpha": preset.alpha * 0.75},
        {"alpha": min(4.0, preset.alpha * 1.33)},
        {"beta_up": max(0.0, preset.beta_up - 0.25)},
        {"beta_down": max(0.0, preset.beta_down - 0.25)},
        {"beta_down": min(1.0, preset.beta_down + 0.25)},
    ]
    return [preset.model_copy(update={name: round(value, 3) for name, value in change.items()}) for change in changes]


class Tuner:
    """Tries settings on dev scenes. All trials on one set of scenes are paired with the same plain measurement."""

    def __init__(self, settings: TuningSettings, answers: Respondent, report: Callable[[str], None] = print) -> None:
        self._settings, self._answers, self._report = settings, answers, report
        self._plain: dict[tuple[Task, Stage], Measurement] = {}
        self.trials: list[dict[str, Any]] = []
        """Every trial with its scores, for the report."""

    async def best_of_form(self, form: Form, task: Task) -> Trial:
        """Grid, neighbours of the best, shortlist against another image, final on fresh scenes."""
        tried = await self._search(grid(form, self._settings.alphas), task)
        nearby = [near for trial in tried[: self._settings.refined] for near in neighbours(trial.preset)]
        tried += await self._search(_new(nearby, [trial.preset for trial in tried]), task)
        likely = sorted(tried, key=lambda trial: trial.fitness)[: 2 * self._settings.finalists]
        shortlist = _best_first([await self._try(trial.preset, task, "search", foreign=True) for trial in likely])
        finalists = [trial.preset for trial in shortlist[: self._settings.finalists]]
        best = _best_first([await self._try(preset, task, "final", foreign=True) for preset in finalists])[0]
        for _ in range(SOFTENINGS):
            if best.against == (FORGETS,):  # a smaller step keeps more of what is there
                smaller = best.preset.model_copy(update={"alpha": round(best.preset.alpha * 0.85, 3)})
                best = await self._try(smaller, task, "final", foreign=True)
        verdict = "; ".join(best.against) or "may become a preset"
        self._report(f"{task}, {form}: best {_short(best.preset)}, {_figures(best.scores)}: {verdict}")
        return best

    async def scores(self, preset: Preset, task: Task) -> Scoreboard:
        """Plain and this preset on the final's scenes, for a task that it was not chosen for."""
        measured = {"plain": await self._plain_on(task, "final"), "own": await self._measure(preset, task, "final")}
        return Scoreboard(measured, seed=SEEDS["final"])

    async def _search(self, presets: Iterable[Preset], task: Task) -> list[Trial]:
        trials = [await self._try(preset, task, "search") for preset in presets]
        return sorted(trials, key=lambda trial: trial.fitness)

    async def _try(self, preset: Preset, task: Task, stage: Stage, *, foreign: bool = False) -> Trial:
        """One setting; `foreign` also with another scene's image, without which nothing speaks for it."""
        measured = {"plain": await self._plain_on(task, stage), "own": await self._measure(preset, task, stage)}
        if foreign:
            measured["other_image"] = await self._measure(preset, task, stage, control="other_image")
        board = Scoreboard(measured, seed=SEEDS[stage], resamples=RESAMPLES if foreign else 1)
        scores = dev_scores(board, task)
        trial = Trial(
            preset=preset.model_copy(update={"dev_scores": scores if stage == "final" else {}}),
            fitness=FITNESS[task](board.scores("own"), board.scores("plain")),
            scores=scores,
            against=AGAINST[task](board) if foreign else ("not compared with another image",),
        )
        return self._record(trial, task, stage)

    def _record(self, trial: Trial, task: Task, stage: Stage) -> Trial:
        settings = trial.preset.model_dump(exclude={"dev_scores"})
        row = {"task": task, "stage": stage, "preset": settings, "fitness": trial.fitness, "scores": trial.scores}
        self.trials.append(row | {"against": trial.against})
        self._report(f"  {stage}, {task}, {_short(trial.preset)}: {_figures(trial.scores)}")
        return trial

    async def _plain_on(self, task: Task, stage: Stage) -> Measurement:
        """Measured once: all trials on the same scenes are paired with it."""
        if (task, stage) not in self._plain:
            measured = self._plain[task, stage] = await self._measure(OFF, task, stage)
            figures = dev_scores(Scoreboard({"own": measured}, seed=0, resamples=1), task)
            self._report(f"  {stage}, {task}, plain: {_figures(figures)}")
        return self._plain[task, stage]

    async def _measure(self, preset: Preset, task: Task, stage: Stage, control: Control | None = None) -> Measurement:
        benchmark = dev_benchmark(self._settings, task, stage)
        condition = Condition(name="trial", requests=dict.fromkeys(TASKS, as_request(preset, control=control)))
        concurrency = 2 * self._settings.batch
        return await measure(benchmark, condition, self._answers, concurrency=concurrency, report=lambda line: None)


def dev_benchmark(settings: TuningSettings, task: Task, stage: Stage) -> Benchmark:
    """What a stage asks for a task; the final's scenes are not the search's."""
    amount = getattr(settings, f"{stage}_{task}")
    amounts = {"captions": amount if task == "captions" else 0, "questions": amount if task == "questions" else 0}
    if settings.benchmark == "miniature":
        return miniature_benchmark(**amounts, seed=SEEDS[stage], scene_range="dev")
    searched = max(settings.search_captions, settings.search_questions // 2)
    return coco_photographs(settings, **amounts, skip=0 if stage == "search" else searched)


async def tune(settings: TuningSettings, report: Callable[[str], None] = print) -> tuple[ArtifactConfig, list[dict]]:
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
            scores = dev_scores(await tuner.scores(preset, task), task)
            presets[name] = preset.model_copy(update={"dev_scores": scores})
    return _write(settings.artifact, config, presets, by_form, default, report), tuner.trials


def choose(best: list[Trial]) -> Preset:
    """The fittest that nothing speaks against; else the least bad one, switched off."""
    allowed = [trial for trial in best if not trial.against]
    fittest = min(allowed or best, key=lambda trial: trial.fitness).preset
    return fittest if allowed else fittest.model_copy(update={"strength": 0.0})


async def choose_default(tuner: Tuner, presets: dict[str, Preset], report: Callable[[str], None]) -> str:
    """The preset that helps its own task and harms the other one by nothing beyond its interval, else `off`."""
    other: dict[Task, Task] = {"captions": "questions", "questions": "captions"}
    for name, task in other.items():
        if presets[name].strength == 0:
            continue
        reasons = harm(await tuner.scores(presets[name], task), "own", task)
        if not reasons:
            return name
        report(f"{name} cannot be the default: on {task} {', '.join(reasons)}")
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
        report(f"{name}: {'off' if preset.strength == 0 else _short(preset)} {_figures(preset.dev_scores)}")
    report(f"default: {default}; fingerprint {config.fingerprint[:12]}")
    return config


def _best_first(trials: Iterable[Trial]) -> list[Trial]:
    """Those that nothing speaks against come first, then the fittest."""
    return sorted(trials, key=lambda trial: (bool(trial.against), trial.fitness))


def _new(presets: Iterable[Preset], known: Iterable[Preset]) -> list[Preset]:
    fresh: list[Preset] = []
    for preset in presets:
        if preset not in fresh and preset not in list(known):
            fresh.append(preset)
    return fresh


def _short(preset: Preset) -> str:
    return f"{preset.form} alpha {preset.alpha:g}, beta {preset.beta_up:g} up {preset.beta_down:g} down"


def _figures(scores: dict[str, float]) -> str:
    """All but plain's, which are the same for every trial."""
    scores = {name: value for name, value in scores.items() if not name.startswith("plain_")}
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items())


def main() -> None:
    settings = parse_settings(TuningSettings, program="python -m training.tune_presets")
    config, trials = asyncio.run(tune(settings, lambda line: print(line, flush=True)))
    if settings.json_file:
        report = {"trials": trials, "alignment": config.alignment, "fingerprint": config.fingerprint}
        write_json(settings.json_file, report)


if __name__ == "__main__":
    run_stage(main)
