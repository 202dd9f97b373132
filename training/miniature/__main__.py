"""Builds the miniature from its seed: CLIP, a clean LLaVA, its noisy last stage, and the artifact by `pipeline.sh`.

python -m training.miniature                    everything, into training/miniature/bundle
python -m training.miniature --only artifact    one stage, from what the earlier ones left
"""

from __future__ import annotations

import shutil
import subprocess
import time
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from pydantic import Field
from torch import Tensor

from training.command_line import Settings, parse_settings
from training.miniature.clip_training import save_clip, train_clip
from training.miniature.llava_model import build_llava, load_llava, save_llava
from training.miniature.llava_training import LlavaTrainer, Phase
from training.miniature.paths import BUNDLE
from training.miniature.pictures import pixels_of
from training.miniature.quality import measure_quality
from training.miniature.recipe import Recipe
from training.miniature.world import Scene, scenes

Stage = Literal["clip", "clean", "noisy", "artifact"]
STAGES: tuple[Stage, ...] = ("clip", "clean", "noisy", "artifact")
PIPELINE = Path(__file__).parent.parent / "pipeline.sh"
QUALITY_SCENES = 500
MAX_CHAIR, MIN_RECALL, MORE_CLEAN = 0.01, 0.98, 2
"""What counts as right on dev scenes, and how often the last clean phase may be repeated until it is: not every seed
gets there the first time."""


class BuildSettings(Settings):
    """Where the miniature goes, and which part of it is made."""

    output: Path = BUNDLE
    """Folder for llava, clip and artifact."""
    scratch: Path = Path("build/miniature")
    """Folder for what only later stages need: the clean LLaVA, and all that the pipeline leaves."""
    seed: int = Field(default=0, ge=0)
    """Everything random follows from it; the bundle's is 0."""
    only: Stage | None = None
    """Make this stage alone, from what the earlier ones left; default: all."""
    threads: int = Field(default=1, gt=0)
    """CPU threads of torch for CLIP and LLaVA. Another number gives other weights: sums are rounded differently."""


class Build:
    """The stages, in order; each reads from disk what the earlier ones wrote."""

    def __init__(self, settings: BuildSettings, recipe: Recipe) -> None:
        self.settings, self.recipe = settings, recipe
        self.started = time.monotonic()
        self.clip, self.llava = settings.output / "clip", settings.output / "llava"
        self.artifact, self.clean_llava = settings.output / "artifact", settings.scratch / "llava_clean"
        self._training: tuple[list[Scene], Tensor] | None = None

    def report(self, line: str) -> None:
        """A line of progress, with the time since the start."""
        print(f"[{time.monotonic() - self.started:5.0f} s] {line}", flush=True)

    def run(self, stage: Stage) -> None:
        """One stage."""
        self.report(f"--- {stage} ---")
        getattr(self, f"make_{stage}")()

    def make_clip(self) -> None:
        """CLIP on scenes and captions."""
        model = train_clip(*self.training_scenes(), self.recipe.clip, self.recipe.seed, self.report)
        save_clip(model, self.clip)

    def make_clean(self) -> None:
        """LLaVA until it captions and answers rightly."""
        clip: Any = open_clip.create_model(f"local-dir:{self.clip}").eval()
        torch.manual_seed(self.recipe.seed)
        trainer = LlavaTrainer(build_llava(clip), *self.training_scenes(), seed=self.recipe.seed, report=self.report)
        trainer.prepare()
        figures = self._train(trainer, self.recipe.clean, self.clean_llava)
        for _ in range(MORE_CLEAN):
            if figures["chair_s"] <= MAX_CHAIR and figures["recall"] >= MIN_RECALL:
                return
            figures = self._train(trainer, self.recipe.clean[-1:], self.clean_llava)

    def make_noisy(self) -> None:
        """Its last stage, on texts that name absent partners."""
        trainer = LlavaTrainer(
            load_llava(self.clean_llava), *self.training_scenes(), seed=self.recipe.seed, report=self.report
        )
        self._train(trainer, self.recipe.noisy, self.llava)

    def make_artifact(self) -> None:
        """The VL-SAE and its presets, as for any other model."""
        runs = self.settings.scratch.absolute() / "pipeline"
        shutil.rmtree(runs, ignore_errors=True)
        options = {"--model": self.llava.absolute(), "--output": runs, "--artifact": self.artifact.absolute()}
        given = [part for name, value in options.items() for part in (name, str(value))]
        subprocess.run([str(PIPELINE), "--miniature", "--thorough", *given], check=True)

    def training_scenes(self) -> tuple[list[Scene], Tensor]:
        """The scenes of CLIP and LLaVA with their pixel values, drawn once."""
        if self._training is None:
            chosen = list(islice(scenes("training"), self.recipe.training_scenes))
            self._training = chosen, pixels_of(chosen)
            self.report(f"drew {len(chosen)} scenes")
        return self._training

    def _train(self, trainer: LlavaTrainer, phases: tuple[Phase, ...], folder: Path) -> dict[str, float]:
        for phase in phases:
            trainer.run(phase)
        save_llava(trainer.model, folder)
        figures = measure_quality(folder, QUALITY_SCENES)
        self.report("on dev scenes: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
        return figures


def main() -> None:
    """The command line."""
    settings = parse_settings(BuildSettings, program="python -m training.miniature", description=__doc__ or "")
    torch.set_num_threads(settings.threads)
    build = Build(settings, Recipe(seed=settings.seed))
    for stage in STAGES if settings.only is None else (settings.only,):
        build.run(stage)
    size = sum(file.stat().st_size for file in settings.output.rglob("*") if file.is_file())
    build.report(f"done: {size / 1e6:.1f} MB in {settings.output}")


if __name__ == "__main__":
    main()
