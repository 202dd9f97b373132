"""Tries settings of steering on dev scenes and judges them. Writes no artifact.

Every form gets the same budget: a grid, the neighbours of its best settings, a shortlist that is also fed other scenes'
images, and a final on fresh dev scenes, where the step is set more finely. Questions are asked in first and in second
turns throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, NamedTuple

from pydantic import Field

from steering.request import Control, Form
from steering.settings import Preset
from training.evaluation.asking import Respondent
from training.evaluation.benchmark import TURNS, Benchmark, Turn
from training.evaluation.benchmark_settings import PhotographSettings, coco_photographs, with_suffix
from training.evaluation.conditions import TASKS, Condition, Task, as_request, control_seeds
from training.evaluation.engines import EngineSettings
from training.evaluation.measuring import Measurement, measure
from training.evaluation.miniature_benchmark import miniature_benchmark
from training.evaluation.non_inferiority import ACCURACY_MARGIN
from training.evaluation.preset_rules import AGAINST, FITNESS, FOREIGN, FORGETS, dev_scores
from training.evaluation.scores import RESAMPLES, Scoreboard, is_zero

BETAS = ((1.0, 0.0), (1.0, 0.1), (1.0, 0.2), (0.9, 0.9), (0.0, 1.0))
"""(beta_up, beta_down) of the grid: only add, hardly remove, mostly add, the paper's, only remove."""
STARTS: dict[Task, tuple[int | None, ...]] = {"captions": (3, 1, 6), "questions": (0, None)}
"""Where steering may begin, in tokens of the answer (None: with the text behind the image). The grid has the first, its
best settings are tried with the others. The answer to a yes/no question is over where that to a request for a caption
has hardly begun: what begins later cannot touch it, and earlier turns are left alone."""
OFF = Preset(strength=0.0, alpha=0.0)
SOFTENINGS = 3
"""How often the step of a form's best setting is made smaller where only recall speaks against it."""
CLIMBS = 3
"""How often the step of a form's best setting is made larger, or smaller, in the final."""
FIRST_LOOK = 1000
"""Questions per split and turn with which a final begins. Where none of their answers changes, none of the others is
asked: if more than one answer in 300 did, one of 1,000 would have with a probability of .96."""
Stage = Literal["search", "final"]
SEEDS: dict[Stage, int] = {"search": 20, "final": 21}
"""Windows of the miniature's dev scenes: the final is held on scenes that the search has not seen."""


class SearchSettings(EngineSettings, PhotographSettings):
    """How thoroughly presets are searched for; every form gets the same."""

    benchmark: Literal["miniature", "coco"] = "miniature"
    """Where the dev scenes come from."""
    coco_split: str = "train2014"
    """Split of COCO that the dev scenes are drawn from; evaluate on another."""
    alphas: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0, 4.0)
    """Steps of the grid."""
    search_captions: int = Field(default=160, ge=1)
    """Dev scenes captioned per setting of the search."""
    search_questions: int = Field(default=160, ge=2)
    """Dev questions per POPE split, turn and setting of the search; even."""
    refined: int = Field(default=2, ge=0)
    """Best settings of the grid whose neighbours are tried too."""
    finalists: int = Field(default=3, ge=1)
    """Settings per form that reach the final, from a shortlist of twice as many."""
    final_captions: int = Field(default=500, ge=1)
    """Dev scenes captioned in the final."""
    final_questions: int = Field(default=8000, ge=2)
    """Dev questions per POPE split and turn in the final and in the check of the default; even.

    'Worse by no more than a point' needs many: where one answer in twenty changes, as many for better as for worse, the
    difference of 8,000 paired answers has a standard error of sqrt(.05 / 8,000) = .0025, and such a preset passes with
    a probability of .98 (of 2,000: .52); where one in thirteen changes, with .90. One that costs 3 points would have to
    be measured 10 standard errors too well."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting and how it did; `against` is empty where it may become a preset."""

    preset: Preset
    fitness: float
    """Lower is better."""
    scores: dict[str, float] = field(default_factory=dict)
    against: tuple[str, ...] = ()


class Portion(NamedTuple):
    """Dev scenes that are asked about in one go."""

    task: Task
    stage: Stage
    turn: Turn
    amount: int
    """Captions, or questions per split."""


def grid(form: Form, alphas: Iterable[float], task: Task) -> list[Preset]:
    """The same steps and betas for every form."""
    start = STARTS[task][0]
    return [
        Preset(form=form, alpha=alpha, beta_up=up, beta_down=down, min_answer_tokens=start)
        for alpha, (up, down) in product(alphas, BETAS)
    ]


def neighbours(preset: Preset, task: Task) -> list[Preset]:
    """A smaller and a larger step, another beginning, and one of the betas moved."""
    changes: list[dict[str, Any]] = [
        {"alpha": round(preset.alpha * 0.9, 3)},
        {"alpha": min(4.0, round(preset.alpha * 1.1, 3))},
        {"beta_up": max(0.0, round(preset.beta_up - 0.25, 3))},
        {"beta_down": max(0.0, round(preset.beta_down - 0.05, 3))},
        {"beta_down": min(1.0, round(preset.beta_down + 0.05, 3))},
        *({"min_answer_tokens": start} for start in STARTS[task] if start != preset.min_answer_tokens),
    ]
    return [preset.model_copy(update=change) for change in changes]


class Tuner:
    """Tries settings on dev scenes. All trials on one set of scenes are paired with the same plain measurement."""

    def __init__(self, settings: SearchSettings, answers: Respondent, report: Callable[[str], None] = print) -> None:
        self._settings, self._answers, self._report = settings, answers, report
        self._known: dict[tuple[Portion, str], Measurement] = {}
        self.trials: list[dict[str, Any]] = []
        """Every trial with its scores, for the report."""
        self._plain_told: set[tuple[Task, Stage]] = set()

    async def best_of_form(self, form: Form, task: Task) -> Trial:
        """Grid, neighbours of the best, shortlist against other images, final on fresh scenes."""
        tried = await self._search(grid(form, self._settings.alphas, task), task)
        nearby = [near for trial in tried[: self._settings.refined] for near in neighbours(trial.preset, task)]
        tried += await self._search(_new(nearby, [trial.preset for trial in tried]), task)
        likely = sorted(tried, key=lambda trial: trial.fitness)[: 2 * self._settings.finalists]
        shortlist = [await self._try(trial.preset, task, "search", foreign=True) for trial in likely]
        shortlist.sort(key=lambda trial: (FOREIGN in trial.against, trial.fitness))
        finalists = [trial.preset for trial in shortlist[: self._settings.finalists]]
        finals = [await self._try(preset, task, "final", foreign=True) for preset in finalists]
        best = min(finals, key=lambda trial: (bool(trial.against), trial.fitness))
        for _ in range(SOFTENINGS):
            if best.against == (FORGETS,):  # a smaller step keeps more of what is there
                smaller = best.preset.model_copy(update={"alpha": round(best.preset.alpha * 0.85, 3)})
                best = await self._try(smaller, task, "final", foreign=True)
        if not best.against:
            best = await self._climb(best, task)
        verdict = "; ".join(best.against) or "may become a preset"
        self._report(f"{task}, {form}: best {in_short(best.preset)}, {figures(best.scores)}: {verdict}")
        return best

    async def _climb(self, best: Trial, task: Task) -> Trial:
        """A larger step, or a smaller one, for as long as the final's scenes find it fitter and nothing is against it:
        neighbours differ by less than the search's few scenes can tell."""
        for factor in (1.1, 0.9):
            for _ in range(CLIMBS):
                moved = best.preset.model_copy(update={"alpha": min(4.0, round(best.preset.alpha * factor, 3))})
                trial = await self._try(moved, task, "final", foreign=True)
                if trial.against or trial.fitness >= best.fitness:
                    break
                best = trial
        return best

    async def compared(self, preset: Preset, task: Task, *, thorough: bool = True) -> Scoreboard:
        """`plain` and `own` on the final's scenes; without `thorough` on as many questions as a first look takes."""
        portions = self._first_looks(task) if not thorough else await self._portions(preset, task, "final")
        return await self._board(preset, portions)

    async def _search(self, presets: Iterable[Preset], task: Task) -> list[Trial]:
        trials = [await self._try(preset, task, "search") for preset in presets]
        return sorted(trials, key=lambda trial: trial.fitness)

    async def _try(self, preset: Preset, task: Task, stage: Stage, *, foreign: bool = False) -> Trial:
        """One setting; `foreign` also with other scenes' images, without which nothing speaks for it.

        A final asks about those only where nothing else speaks against the setting.
        """
        portions = await self._portions(preset, task, stage)
        board = await self._board(preset, portions, resamples=RESAMPLES if foreign else 1)
        against = AGAINST[task](board) if foreign else ("not compared with other images",)
        if foreign and (stage == "search" or not against):
            board = await self._board(preset, portions, control="other_image")
            against = AGAINST[task](board)
        scores = dev_scores(board, task)
        trial = Trial(
            preset=preset.model_copy(update={"dev_scores": scores if stage == "final" else {}}),
            fitness=FITNESS[task](board),
            scores=scores,
            against=against,
        )
        return self._record(trial, task, stage)

    def _record(self, trial: Trial, task: Task, stage: Stage) -> Trial:
        if (task, stage) not in self._plain_told:
            self._plain_told.add((task, stage))
            plain = {name: value for name, value in trial.scores.items() if name.startswith("plain_")}
            self._report(f"  {stage}, {task}: {', '.join(f'{name} {value:.3f}' for name, value in plain.items())}")
        settings = trial.preset.model_dump(exclude={"dev_scores"})
        row = {"task": task, "stage": stage, "preset": settings, "fitness": trial.fitness, "scores": trial.scores}
        self.trials.append(row | {"against": trial.against})
        self._report(f"  {stage}, {task}, {in_short(trial.preset)}: {figures(trial.scores)}")
        return trial

    def _whole(self, task: Task, stage: Stage) -> list[Portion]:
        amount = getattr(self._settings, f"{stage}_{task}")
        return [Portion(task, stage, turn, amount) for turn in (TURNS if task == "questions" else TURNS[:1])]

    def _first_looks(self, task: Task) -> list[Portion]:
        whole = self._whole(task, "final")
        if task == "captions":
            return whole
        return [portion._replace(amount=min(FIRST_LOOK, portion.amount)) for portion in whole]

    async def _portions(self, preset: Preset, task: Task, stage: Stage) -> list[Portion]:
        """What must be asked to judge a setting: a first look will do for a turn in which it changes no answer, and
        for all turns where it shows that the setting does harm."""
        whole = self._whole(task, stage)
        if stage == "search" or task == "captions":
            return whole
        looks = self._first_looks(task)
        change = (await self._board(preset, looks)).difference("own", "plain")
        if any(metrics["accuracy"].below(-ACCURACY_MARGIN) for metrics in change.questions.values()):
            return looks
        return [
            look if all(map(is_zero, change.by_turn[look.turn].values())) else portion
            for look, portion in zip(looks, whole, strict=True)
        ]

    async def _board(
        self, preset: Preset, portions: list[Portion], *, control: Control = "none", resamples: int = RESAMPLES
    ) -> Scoreboard:
        """Plain, the setting, and if `control` is one, the setting under that."""
        measured = {"plain": await self._measure(OFF, portions), "own": await self._measure(preset, portions)}
        if control != "none":
            measured[control] = await self._measure(preset, portions, control)
        return Scoreboard(measured, seed=SEEDS[portions[0].stage], resamples=resamples)

    async def _measure(self, preset: Preset, portions: list[Portion], control: Control = "none") -> Measurement:
        """All portions together; each is asked once however often it is wanted."""
        request = as_request(preset, control=None if control == "none" else control)
        condition = Condition(name="trial", requests=dict.fromkeys(TASKS, request), seeds=control_seeds(control))
        counts = {}
        for portion in portions:
            known = (portion, request.model_dump_json())
            if known not in self._known:
                self._known[known] = await measure(
                    dev_benchmark(self._settings, portion),
                    condition,
                    self._answers,
                    concurrency=2 * self._settings.batch,
                    report=lambda line: None,
                )
            counts |= self._known[known].counts
        return Measurement(counts=counts, captions=[], receipts={}, seconds=0.0)


def dev_benchmark(settings: SearchSettings, portion: Portion) -> Benchmark:
    """What a portion asks; the final's scenes are not the search's, and a first look takes the first of the final's."""
    amount = getattr(settings, f"{portion.stage}_{portion.task}")
    amounts = {task: amount if task == portion.task else 0 for task in TASKS}
    if settings.benchmark == "miniature":
        whole = miniature_benchmark(**amounts, seed=SEEDS[portion.stage], scene_range="dev")
    else:
        searched = max(settings.search_captions, settings.search_questions // 2)
        whole = coco_photographs(settings, **amounts, skip=0 if portion.stage == "search" else searched)
    if portion.task == "captions":
        return whole
    return with_suffix(whole, settings).part(scenes=portion.amount // 2, turn=portion.turn)


def in_short(preset: Preset) -> str:
    """A setting in a line of the log."""
    start = preset.min_answer_tokens
    begins = "the text" if start is None else f"answer token {start}"
    betas = f"beta {preset.beta_up:g} up {preset.beta_down:g} down"
    return f"{preset.form} alpha {preset.alpha:g}, {betas}, from {begins}"


def figures(scores: dict[str, float]) -> str:
    """All but plain's, which are the same for every trial on the same scenes."""
    scores = {name: value for name, value in scores.items() if not name.startswith("plain_")}
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items())


def _new(presets: Iterable[Preset], known: Iterable[Preset]) -> list[Preset]:
    fresh: list[Preset] = []
    for preset in presets:
        if preset not in fresh and preset not in list(known):
            fresh.append(preset)
    return fresh
