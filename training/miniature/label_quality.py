"""Are concept labels true? Scored against what is really in the scenes that activate a concept most.

    python -m training.miniature.label_quality [--concepts concepts.jsonl] [--json FILE]

    shown   share of a concept's top pictures that show what its label says, mean over the label's words
    told    share of concepts whose label holds the word that its pictures show most beyond the average picture

Labels come from texts and the pictures from the other modality, and the texts name shapes that are not there: neither
has to be 1. The control deals the labels out to the concepts at random. Intervals resample concepts.

Shapes: N concepts, W words (shapes and colours), C counts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from training.command_line import Settings, parse_settings, run_stage
from training.durable_files import write_json
from training.errors import InvalidTraining
from training.evaluation.paired_bootstrap import Interval, draw_scenes, intervals, paired_differences, ratio
from training.interpretation.phrases import find_phrases
from training.miniature.paths import ARTIFACT
from training.miniature.world import COLORS, SHAPES, scene_from_seed

WORDS = (*SHAPES, *COLORS)
PREFIX = "scene:"


class CommandLine(Settings):
    """Score labels."""

    concepts: Path = ARTIFACT / "concepts.jsonl"
    """Records written by interpret_concepts, or those of an artifact."""
    shuffles: int = Field(default=20, gt=0)
    """Times that the control's labels are dealt out."""
    seed: int = 0
    """Of the control and the intervals."""
    json_file: Path | None = Field(default=None, alias="json")
    """Where the numbers go."""


def label_quality(concepts: Sequence[dict[str, Any]], *, shuffles: int = 20, seed: int = 0) -> dict[str, Any]:
    """`labels`, `shuffled` and their paired `difference`, each with intervals. Raises InvalidTraining where no concept
    has both a label that names a shape or colour and pictures of scenes."""
    scored = [concept for concept in concepts if label_words(concept["label"]) and concept["images"]]
    if len(scored) < 2:
        raise InvalidTraining("fewer than two concepts have a label that names shapes or colours, and drawn pictures")
    shown_NW = np.array([_shares(concept) for concept in scored])
    says_NW = np.array([[word in label_words(concept["label"]) for word in WORDS] for concept in scored], dtype=float)
    generator = np.random.default_rng(seed)
    dealt = [generator.permutation(len(scored)) for _ in range(shuffles)]
    own_NC = _counts(says_NW, shown_NW)
    control_NC = np.mean([_counts(says_NW[order], shown_NW) for order in dealt], axis=0)
    weights_RN = draw_scenes(len(scored), seed=seed)
    return {
        "concepts": len(scored),
        "labels": intervals(_metrics, own_NC, weights_RN),
        "shuffled": intervals(_metrics, control_NC, weights_RN),
        "difference": paired_differences(_metrics, own_NC, control_NC, weights_RN),
    }


def label_words(label: str) -> frozenset[str]:
    """The shapes and colours that a label names."""
    return frozenset(find_phrases(label)) & frozenset(WORDS)


def _shares(concept: dict[str, Any]) -> list[float]:
    """Of the concept's pictures, how many show each word."""
    seen = []
    for image in concept["images"]:
        reference = image["reference"]
        if not reference.startswith(PREFIX):
            raise InvalidTraining(f"concept {concept['id']}: {reference!r} is no drawn scene; its truth is not known")
        scene = scene_from_seed(int(reference.removeprefix(PREFIX)))
        seen.append(scene.shapes | {item.color for item in scene.objects})
    return [sum(word in words for words in seen) / len(seen) for word in WORDS]


def _counts(says_NW: np.ndarray, shown_NW: np.ndarray) -> np.ndarray:
    """Per concept: what the label's words are shown, whether the most telling word is said, and 1."""
    beyond_NW = shown_NW - shown_NW.mean(0)
    telling_NW = beyond_NW >= beyond_NW.max(1, keepdims=True) - 1e-9
    shown_N = (says_NW * shown_NW).sum(1) / says_NW.sum(1)
    return np.stack([shown_N, (telling_NW * says_NW).any(1), np.ones(len(shown_N))], axis=1)


def _metrics(counts: np.ndarray) -> dict[str, np.ndarray]:
    return {"shown": ratio(counts[..., 0], counts[..., 2]), "told": ratio(counts[..., 1], counts[..., 2])}


def _in_words(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def main() -> None:
    """The command line."""
    settings = parse_settings(CommandLine, program="python -m training.miniature.label_quality", description=__doc__)
    try:
        lines = settings.concepts.read_text(encoding="utf-8").split("\n")
        concepts = [json.loads(line) for line in lines if line]
    except (OSError, ValueError) as error:
        raise InvalidTraining(f"{settings.concepts} is not readable JSON lines: {error}") from error
    found = label_quality(concepts, shuffles=settings.shuffles, seed=settings.seed)
    print(f"{found['concepts']} of {len(concepts)} concepts have a label to judge and pictures")
    for condition in ("labels", "shuffled", "difference"):
        print(f"{condition:>10}  " + "  ".join(f"{name} {_in_words(one)}" for name, one in found[condition].items()))
    if settings.json_file:
        named = {
            condition: {name: one._asdict() for name, one in found[condition].items()}
            for condition in ("labels", "shuffled", "difference")
        }
        write_json(settings.json_file, named | {"concepts": found["concepts"]})


if __name__ == "__main__":
    run_stage(main)
