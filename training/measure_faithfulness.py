"""After stage 4: does the VL-SAE hold while text is generated? Written into the artifact, where the gate looks.

    python -m training.measure_faithfulness --model M --artifact A

The model describes pictures that the autoencoders were not trained on, plainly and once more with the reconstruction of
the text's mean in the mean's place (free-running); its own words are then read once more (teacher forcing), see
`training.evaluation.faithfulness`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from pydantic import Field
from transformers import AutoModelForImageTextToText, AutoProcessor

from steering.artifact import load_artifact
from steering.artifact_config import ArtifactConfig, read_config, write_config
from steering.request import SteeringRequest
from training.alignment import alignment_gate, check_finite
from training.collection.placing import PROMPTS, check_prompts, read_prompts, special_tokens
from training.collection.prefill import prompt_inputs
from training.command_line import parse_settings, run_stage
from training.errors import InvalidTraining
from training.evaluation.asking import InProcess, Question, ask_all
from training.evaluation.engines import EngineSettings, respondent
from training.evaluation.faithfulness import Answered, Faithfulness
from training.pairs import Pair, PairSource, open_pairs

PORTION = 64
"""Pairs that the source is asked to plan in."""
MIN_PICTURES = 2
"""Of one there is no variance."""
PLAIN = SteeringRequest(enabled=False)
SPLICED = SteeringRequest(
    enabled=True, strength=1.0, form="published", mode="causal", alpha=1.0, beta_up=0.0, beta_down=0.0, gamma=1.0,
    plausibility=0.0, min_answer_tokens=1,
)  # fmt: skip
"""The reconstruction instead of the mean, at each position of the answer."""


class FaithfulnessSettings(EngineSettings):
    """On how much it is measured."""

    pairs: str | None = None
    """Where the pictures are, if not where the artifact's pairs were collected from; none that was trained on."""
    prompts: Path | None = None
    """What the model answers, one prompt a line, as for collect_representations."""
    pictures: int = Field(default=200, ge=MIN_PICTURES)
    """Pictures at the source's end that are described; at most as many as the pairs show that training kept for
    measuring."""
    max_tokens: int = Field(default=128, ge=2)
    """Longest answer."""


def measure_faithfulness(settings: FaithfulnessSettings) -> ArtifactConfig:
    """Measures, and writes it into the artifact's config. Raises InvalidTraining where there is nothing to measure."""
    config = read_config(settings.artifact)
    if settings.engine != "huggingface":
        raise InvalidTraining(f"--engine {settings.engine}: hidden states are read, which only huggingface gives")
    pictures = unseen_pictures(settings, config)
    prompts = PROMPTS if settings.prompts is None else read_prompts(settings.prompts)
    plain, spliced = asyncio.run(_ask(settings, config.family, pictures, prompts))
    model: Any = AutoModelForImageTextToText.from_pretrained(settings.model, dtype=getattr(torch, settings.dtype))
    faithfulness = Faithfulness(model.eval().to(settings.device), load_artifact(settings.artifact))
    measured = faithfulness.measure(_batches(plain, settings.batch), splice=True)
    free = faithfulness.measure(_batches(spliced, settings.batch), splice=False)
    measured |= {"text_unexplained_free": free["text_unexplained"], "pictures": float(len(pictures))}
    check_finite(measured)
    return write_config(settings.artifact, config.model_copy(update={"faithfulness": measured}))


def unseen_pictures(settings: FaithfulnessSettings, config: ArtifactConfig) -> list[Image]:
    """The last ones of the source, each once. Raises InvalidTraining where training has seen some of them."""
    trained_on = config.training.get("source", {})
    spec = settings.pairs or trained_on.get("spec")
    if spec is None:
        raise InvalidTraining("--pairs is needed: the artifact does not say what it was trained on")
    source = open_pairs(spec)
    if _contents(source.describe()) != _contents(trained_on):
        if settings.pairs is None:
            raise InvalidTraining(f"{spec} no longer holds the pairs that were collected from it; give --pairs")
        kept = None
    else:
        kept = min((config.training.get(part, {}).get("held_out", 0) for part in ("auxiliary", "sparse")), default=0)
    found = list(islice(_from_the_end(source, kept), settings.pictures))
    if kept is not None and len(found) < settings.pictures:
        raise InvalidTraining(
            f"--pictures is {settings.pictures}, but the last {kept} pairs, which both trainings were not given, show "
            f"{len(found)}; give fewer, or other --pairs"
        )
    if len(found) < MIN_PICTURES:
        raise InvalidTraining(f"{spec}: {len(found)} pictures can be read there, at least {MIN_PICTURES} are needed")
    return found


def _contents(described: dict[str, Any]) -> dict[str, Any]:
    """What a source holds, wherever it lies."""
    return {name: value for name, value in described.items() if name != "spec"}


def _from_the_end(source: PairSource, count: int | None) -> Iterator[Image]:
    """Pictures of the last `count` pairs, or of all, from the last one backwards; each once."""
    seen: set[str] = set()
    places = reversed(source.portions(PORTION))
    for pair in islice((pair for place in places for _, pair in reversed(list(source.read(place)))), count):
        if isinstance(pair, Pair) and pair.reference not in seen:
            seen.add(pair.reference)
            yield pair.image.convert("RGB")


async def _ask(
    settings: FaithfulnessSettings, family: str, pictures: Sequence[Image], prompts: Sequence[str]
) -> tuple[list[Answered], list[Answered]]:
    """What the model says to the pictures, plain and spliced."""
    processor = AutoProcessor.from_pretrained(settings.model)
    check_prompts(prompts, special_tokens(processor.tokenizer))
    found: dict[str, list[Answered]] = {}
    async with respondent(settings) as answers:
        assert isinstance(answers, InProcess)
        for name, steering in (("plain", PLAIN), ("spliced", SPLICED)):
            asked = [
                Question(image=picture, text=text, max_tokens=settings.max_tokens, steering=steering)
                for picture, text in zip(pictures, cycle(prompts), strict=False)
            ]
            replies = await ask_all(answers, asked, total=len(asked), concurrency=2 * settings.batch, label=name)
            found[name] = []
            for question, reply in zip(asked, replies, strict=True):
                if len(reply.token_ids) > 1:
                    said = (*answers.prompt(question), *reply.token_ids)
                    inputs = prompt_inputs(processor, family, said, question.image)
                    found[name].append(Answered(prompt=inputs, answer_tokens=len(reply.token_ids)))
    if not all(found.values()):
        raise InvalidTraining("the model says nothing to these pictures; are --model and --prompts right?")
    return found["plain"], found["spliced"]


def _batches(answered: Sequence[Answered], size: int) -> Iterator[Sequence[Answered]]:
    return (answered[start : start + size] for start in range(0, len(answered), size))


def main() -> None:
    """The command line."""
    program = "python -m training.measure_faithfulness"
    config = measure_faithfulness(parse_settings(FaithfulnessSettings, program=program, description=__doc__))
    for name, value in config.faithfulness.items():
        print(f"  {name:28s} {value:.4g}")
    try:
        passed, figures = alignment_gate(config.alignment, config.faithfulness)
    except InvalidTraining as error:
        print(f"gate not judged: {error}")
    else:
        print(f"gate {'passed' if passed else 'NOT passed'}: {figures}")


if __name__ == "__main__":
    run_stage(main)
