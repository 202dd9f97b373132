"""Which text to collect: by collection, what is explained while text is generated, and how much less is invented.

    python -m tests.benchmarks.hallucination.faithful_collection --json FILE          three seeds, 1,000 dev scenes
    python -m tests.benchmarks.hallucination.faithful_collection --seeds 0 --captions 200 --json FILE

Rows: the text in the user's turn (the paper's way); as an answer, whole; as an answer, whole and at three prefixes.
Each with two contrastive weights, each trained from several seeds on the bundled LLaVA and its pairs, and steered with
the same few settings on the same dev scenes, without controls, which `training.evaluate_hallucination` has. A ratio is
CHAIR_s by plain's (or recall by plain's), a mean over seeds; its spread is the range of the seeds.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pydantic import Field

from steering.artifact import load_artifact, save_artifact
from steering.request import Form
from steering.settings import Preset
from training import collect_representations
from training.centre_columns import centre_text_columns
from training.collection.run import CollectionOptions, collect_store
from training.command_line import Settings, parse_settings, run_stage
from training.durable_files import write_json
from training.evaluation.conditions import TASKS, Condition, as_request
from training.evaluation.engines import EngineSettings, respondent
from training.evaluation.manifest import describe_run
from training.evaluation.measuring import measure
from training.evaluation.miniature_benchmark import miniature_benchmark
from training.evaluation.scores import Scoreboard
from training.fitting.batches import sample_batches
from training.interpretation.scan import ConceptEncoder
from training.measure_faithfulness import FaithfulnessSettings, measure_faithfulness
from training.miniature.paths import ARTIFACT, LLAVA
from training.run_folder import read_auxiliary, read_sparse
from training.store.reader import open_store
from training.sweep_layers import train_both

COLLECTIONS = {
    "in the user's turn": ["--text-in", "user_turn"],
    "answer, whole": ["--prefixes", "0"],
    "answer, whole and prefixes": ["--prefixes", "3"],
}
WEIGHTS = (0.05, 1.0)
FORMS: tuple[Form, ...] = ("difference", "published")
HELD_OUT = ["--held-out", "500", "--device", "cpu"]
AUXILIARY = ["--shared-size", "128", "--learning-rate", "1e-3", "--batch-size", "512", "--epochs", "60", *HELD_OUT]
SPARSE = ["--num-concepts", "1024", "--active-concepts", "32", "--learning-rate", "2e-3", "--batch-size", "256",
          "--epochs", "20", *HELD_OUT]  # fmt: skip
"""As in training/pipeline.sh."""
OFF = Preset(strength=0.0, alpha=0.0)
STEERED = {
    f"{form} {alpha:g}": Preset(form=form, alpha=alpha, beta_up=1.0, beta_down=0.0, min_answer_tokens=3)
    for form in FORMS
    for alpha in (1.5, 2.5)
}


class ComparisonSettings(Settings):
    """How much is trained and asked."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of both autoencoders."""
    captions: int = Field(default=1000, ge=1)
    """Dev scenes captioned under every setting."""
    pairs: int = Field(default=6000, ge=1000)
    """Pairs trained on, 500 of them kept for measuring."""
    work: Path | None = None
    """Folder of stores and runs, kept and gone on with; by default a temporary one."""
    json_file: Path | None = Field(default=None, alias="json")
    """Where the numbers go."""


def compare(settings: ComparisonSettings, work: Path) -> list[dict[str, Any]]:
    """A row for each collection, contrastive weight and seed."""
    rows: list[dict[str, Any]] = []
    plain: dict[str, float] = {}
    for collection, options in COLLECTIONS.items():
        store = work / collection.replace(" ", "_").replace("'", "").replace(",", "")
        collect(store, options, settings.pairs)
        for weight in WEIGHTS:
            for seed in settings.seeds:
                artifact = train(store, weight, seed, work / f"{store.name}-{weight:g}-{seed}")
                found = measure_faithfulness(FaithfulnessSettings(artifact=artifact)).faithfulness
                lost = {name: found[name] for name in ("image_unexplained", "text_unexplained")}
                plain = plain or asyncio.run(steer(artifact, settings.captions, {"plain": OFF}))
                scores = plain | asyncio.run(steer(artifact, settings.captions, STEERED))
                rows.append({"collection": collection, "contrastive_weight": weight, "seed": seed, **lost, **scores})
                print(", ".join(f"{name} {_shown(value)}" for name, value in rows[-1].items()), flush=True)
    return rows


def collect(store: Path, options: list[str], pairs: int) -> None:
    """The pairs of the miniature's VL-SAE, at the layer that it steers."""
    command = collect_representations.CommandLine
    pairs_options = ["--pairs", f"miniature:vl_sae_pairs:{pairs}", "--batch-size", "64", "--portion-size", "1000"]
    argv = ["--model", str(LLAVA), "--layers", "3", "--output", str(store), "--workers", "0", *pairs_options, *options]
    asked = parse_settings(command, program="collect_representations", argv=argv)
    chosen = CollectionOptions.model_validate(asked.model_dump(include=set(CollectionOptions.model_fields)))
    collect_store(store, asked.pairs, asked.representer(), chosen)


def train(store: Path, weight: float, seed: int, runs: Path) -> Path:
    """An artifact like the bundled one, but for its autoencoders."""
    seeded = ["--seed", str(seed)]
    sparse = train_both(store, runs, [*seeded, "--contrastive-weight", str(weight), *AUXILIARY], [*seeded, *SPARSE])
    bundled = load_artifact(ARTIFACT)
    auxiliary, opened = read_auxiliary(runs / "auxiliary"), open_store(store)
    trained = ConceptEncoder(sae=read_sparse(sparse), auxiliary=auxiliary)
    sae = centre_text_columns(trained, sample_batches(opened, held_out=500, seed=seed))
    made = replace(bundled, auxiliary=auxiliary, sae=sae)
    save_artifact(runs / "artifact", made)
    return runs / "artifact"


async def steer(artifact: Path, captions: int, asked: dict[str, Preset]) -> dict[str, float]:
    """CHAIR_s and recall of each."""
    benchmark = miniature_benchmark(captions=captions, questions=0, seed=24, scene_range="dev")
    measured = {}
    async with respondent(EngineSettings(artifact=artifact)) as answers:
        for name, preset in asked.items():
            condition = Condition(name=name, requests=dict.fromkeys(TASKS, as_request(preset)))
            measured[name] = await measure(benchmark, condition, answers, concurrency=128, report=lambda line: None)
    board = Scoreboard(measured, seed=0, resamples=1)
    return {
        f"{name}: {metric}": board.scores(name).chair[metric].value
        for name in measured
        for metric in ("chair_s", "recall")
    }


def summary(rows: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Steered by plain, over the seeds."""
    ratios, spread = {}, {}
    for collection in COLLECTIONS:
        for weight in WEIGHTS:
            own = [row for row in rows if (row["collection"], row["contrastive_weight"]) == (collection, weight)]
            for name in STEERED:
                for metric in ("chair_s", "recall"):
                    values = [row[f"{name}: {metric}"] / row[f"plain: {metric}"] for row in own]
                    key = f"{collection}, weight {weight:g}, {name}: {metric}"
                    ratios[key], spread[key] = statistics.mean(values), [min(values), max(values)]
    return ratios, spread


def _shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    """The command line."""
    settings = parse_settings(ComparisonSettings, program="faithful_collection.py", description=__doc__)
    with tempfile.TemporaryDirectory() as temporary:
        rows = compare(settings, settings.work or Path(temporary))
    ratios, spread = summary(rows)
    for name, value in ratios.items():
        print(f"{name}: {value:.3f} {[round(one, 3) for one in spread[name]]}")
    if settings.json_file:
        manifest = describe_run(settings.model_dump(mode="json"))
        write_json(settings.json_file, {"ratios": ratios, "spread": spread, "table": rows, "manifest": manifest})


if __name__ == "__main__":
    run_stage(main)
