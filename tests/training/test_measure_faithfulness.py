"""What is measured on whom, and written where; pictures that training saw are refused, and what cannot be used."""

from __future__ import annotations

import asyncio
import json
import shutil
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from steering.artifact import load_artifact
from steering.artifact_config import read_config, write_config
from steering.request import SteeringRequest
from tests.tiny_models import drawn_image, save_tiny_artifact
from training.alignment import FAITHFULNESS, alignment_gate
from training.collection.prefill import prompt_inputs
from training.errors import InvalidTraining
from training.evaluation.asking import InProcess, Question
from training.evaluation.engines import respondent
from training.evaluation.faithfulness import Answered, Faithfulness
from training.measure_faithfulness import (
    PLAIN,
    SPLICED,
    FaithfulnessSettings,
    main,
    measure_faithfulness,
    unseen_pictures,
)
from training.miniature.paths import LLAVA
from training.pairs import Pair, open_pairs

SPEC = "miniature:vl_sae_pairs:40"


def trained_on(spec: str, *, held_out: int = 8, sparse_held_out: int | None = None) -> dict[str, Any]:
    """As write_artifact records it."""
    kept = {"auxiliary": held_out, "sparse": held_out if sparse_held_out is None else sparse_held_out}
    return {"source": open_pairs(spec).describe()} | {part: {"held_out": count} for part, count in kept.items()}


def copy(artifact: Path, folder: Path, training: dict[str, Any]) -> Path:
    shutil.copytree(artifact, folder)
    write_config(folder, read_config(folder).model_copy(update={"training": training, "faithfulness": {}}))
    return folder


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> Path:
    """Random autoencoders for the bundled LLaVA."""
    return save_tiny_artifact(tmp_path_factory.mktemp("known") / "artifact", LLAVA)


def answered(settings: FaithfulnessSettings, pictures, prompts, steering) -> list[Answered]:
    """Asked one by one."""
    processor: Any = AutoProcessor.from_pretrained(settings.model)

    async def ask() -> list[Answered]:
        found = []
        async with respondent(settings) as engine:
            assert isinstance(engine, InProcess)
            for picture, text in zip(pictures, cycle(prompts), strict=False):
                asked = Question(image=picture, text=text, max_tokens=settings.max_tokens, steering=steering)
                reply = await engine.reply(asked)
                said = (*engine.prompt(asked), *reply.token_ids)
                prompt = prompt_inputs(processor, "llava", said, picture)
                found.append(Answered(prompt=prompt, answer_tokens=len(reply.token_ids)))
        return found

    return asyncio.run(ask())


def test_the_last_pictures_answer_the_prompts_in_turn_and_the_artifact_keeps_the_figures(known, tmp_path):
    artifact = copy(known, tmp_path / "artifact", trained_on(SPEC))
    prompts = ("Describe the image.", "What do you see?")
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    settings = FaithfulnessSettings(
        artifact=artifact, pictures=3, max_tokens=16, batch=2, prompts=tmp_path / "prompts.txt"
    )
    before = read_config(artifact)
    config = measure_faithfulness(settings)
    assert read_config(artifact) == config == before.model_copy(update={"faithfulness": config.faithfulness})
    load_artifact(artifact)
    source = open_pairs(SPEC)
    pairs = [pair for place in source.portions(7) for _, pair in source.read(place) if isinstance(pair, Pair)]
    pictures = [pair.image for pair in pairs[:-4:-1]]
    plain, spliced = (answered(settings, pictures, prompts, steering) for steering in (PLAIN, SPLICED))
    assert [one.prompt.token_ids for one in plain] != [one.prompt.token_ids for one in spliced]
    model: Any = AutoModelForImageTextToText.from_pretrained(LLAVA, dtype=torch.float32).eval()
    faithfulness = Faithfulness(model, load_artifact(artifact))
    free = faithfulness.measure([spliced], splice=False)
    expected = faithfulness.measure([plain], splice=True)
    expected |= {"text_unexplained_free": free["text_unexplained"], "pictures": 3.0}
    assert config.faithfulness == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert set(FAITHFULNESS) <= config.faithfulness.keys()
    assert expected["text_unexplained"] != pytest.approx(expected["text_unexplained_free"], rel=1e-3)
    passed, figures = alignment_gate(config.alignment, config.faithfulness)
    assert not passed
    assert f"free-running {free['text_unexplained']:.3f}" in figures


def test_the_command_line_shows_the_figures_and_the_gate(known, tmp_path, monkeypatch, capsys):
    artifact = copy(known, tmp_path / "artifact", trained_on(SPEC))
    command = ["measure_faithfulness", "--artifact", str(artifact), "--pictures", "2", "--max-tokens", "4"]
    monkeypatch.setattr("sys.argv", command)
    main()
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in read_config(artifact).faithfulness)
    assert "gate NOT passed: codes of a pair overlap" in shown
    write_config(artifact, read_config(artifact).model_copy(update={"alignment": {}}))  # as imported weights have it
    main()
    assert "gate not judged: the artifact's config.json records no alignment" in capsys.readouterr().out
    assert read_config(artifact).faithfulness["pictures"] == 2


def described(folder: Path, pictures: int, captions: int) -> str:
    """A source of several captions of each picture, in order."""
    folder.mkdir()
    rows = []
    for picture in range(pictures):
        drawn_image(picture).save(folder / f"{picture}.png")
        rows += [{"image": f"{picture}.png", "text": f"caption {number}"} for number in range(captions)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{folder / 'pairs.jsonl'}"


def chosen(settings: FaithfulnessSettings) -> list[bytes]:
    """The pixels of each picture."""
    return [image.tobytes() for image in unseen_pictures(settings, read_config(settings.artifact))]


def drawn(*numbers: int) -> list[bytes]:
    return [drawn_image(number).tobytes() for number in numbers]


def test_pictures_are_counted_not_captions(tiny_artifact, tmp_path):
    """The last ten pairs show two pictures: what is before them was trained on, however few pictures are asked for."""
    spec = described(tmp_path / "pairs", pictures=6, captions=5)
    artifact = copy(tiny_artifact, tmp_path / "artifact", trained_on(spec, held_out=12, sparse_held_out=10))
    settings = FaithfulnessSettings(artifact=artifact, pictures=2)
    assert chosen(settings) == drawn(5, 4)
    with pytest.raises(
        InvalidTraining, match=r"--pictures is 3, but the last 10 pairs, .* show 2; give fewer, or other --pairs"
    ):
        chosen(FaithfulnessSettings(artifact=artifact, pictures=3))


def test_pairs_that_were_moved_are_still_those_that_were_trained_on(tiny_artifact, tmp_path):
    spec = described(tmp_path / "pairs", pictures=6, captions=2)
    artifact = copy(tiny_artifact, tmp_path / "artifact", trained_on(spec, held_out=4))
    (tmp_path / "pairs").rename(tmp_path / "moved")
    moved = f"jsonl:{tmp_path / 'moved' / 'pairs.jsonl'}"
    assert chosen(FaithfulnessSettings(artifact=artifact, pairs=moved, pictures=2)) == drawn(5, 4)
    with pytest.raises(InvalidTraining, match="--pictures is 3, but the last 4 pairs"):
        chosen(FaithfulnessSettings(artifact=artifact, pairs=moved, pictures=3))
    other = described(tmp_path / "other", pictures=5, captions=1)
    found = FaithfulnessSettings(artifact=artifact, pairs=other, pictures=4)
    assert chosen(found) == drawn(4, 3, 2, 1)
    assert len(chosen(FaithfulnessSettings(artifact=artifact, pairs=other, pictures=40))) == 5


def test_a_source_that_holds_something_else_now_is_not_taken_for_what_was_trained_on(tiny_artifact, tmp_path):
    spec = described(tmp_path / "pairs", pictures=6, captions=2)
    artifact = copy(tiny_artifact, tmp_path / "artifact", trained_on(spec))
    lines = (tmp_path / "pairs" / "pairs.jsonl").read_text().splitlines()
    (tmp_path / "pairs" / "pairs.jsonl").write_text("\n".join(reversed(lines)))
    with pytest.raises(InvalidTraining, match=r"pairs\.jsonl no longer holds the pairs .*; give --pairs"):
        chosen(FaithfulnessSettings(artifact=artifact, pictures=2))


def test_what_cannot_be_measured_is_named(tiny_llava, tiny_artifact, tmp_path):
    def refused(**given: Any) -> str:
        with pytest.raises(InvalidTraining) as caught:
            measure_faithfulness(FaithfulnessSettings(**{"model": tiny_llava, "artifact": tiny_artifact} | given))
        return str(caught.value)

    assert refused() == "--pairs is needed: the artifact does not say what it was trained on"
    for engine in ("vllm", "http://127.0.0.1:8000"):
        assert refused(engine=engine).startswith(f"--engine {engine}: hidden states are read, which only huggingface")
    untrained = copy(tiny_artifact, tmp_path / "untrained", {"source": open_pairs(SPEC).describe()})
    assert "the last 0 pairs" in refused(artifact=untrained)
    one = described(tmp_path / "one", pictures=1, captions=5)
    assert refused(pairs=one) == f"{one}: 1 pictures can be read there, at least 2 are needed"
    for picture in (tmp_path / "one").glob("*.png"):
        picture.write_bytes(b"no picture")
    assert "0 pictures can be read there" in refused(pairs=one)
    (tmp_path / "prompts.txt").write_text("What is this?\nSee <image>\n")
    assert "spells the special token <image>" in refused(pairs=SPEC, prompts=tmp_path / "prompts.txt", pictures=2)
    (tmp_path / "prompts.txt").write_text("\n")
    assert "no line holds a prompt" in refused(pairs=SPEC, prompts=tmp_path / "prompts.txt", pictures=2)
    assert read_config(tiny_artifact).training == {}


def test_a_model_that_says_nothing_is_named(tiny_llava, tiny_artifact, tmp_path):
    """Whatever it would say ends its answer."""
    silent = shutil.copytree(tiny_llava, tmp_path / "silent")
    generation = json.loads((silent / "generation_config.json").read_text())
    vocabulary = json.loads((silent / "config.json").read_text())["text_config"]["vocab_size"]
    (silent / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": list(range(vocabulary))}))
    artifact = copy(tiny_artifact, tmp_path / "artifact", {})
    before = read_config(artifact)
    with pytest.raises(InvalidTraining, match="the model says nothing to these pictures; are --model and --prompts"):
        measure_faithfulness(FaithfulnessSettings(model=silent, artifact=artifact, pairs=SPEC, pictures=2))
    assert read_config(artifact) == before


@pytest.mark.parametrize("image_token", [False, True])
def test_an_answer_that_spells_the_image_token_is_left_out(tiny_llava, tiny_artifact, tmp_path, image_token):
    """Its place in the prefill would be taken for a picture's; here each answer ends with it, or none has it."""
    model = shutil.copytree(tiny_llava, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    head = weights["language_model.lm_head.weight"]
    head[260] = 3 * head.abs().max() * head[ord("a")].sign() if image_token else 0.0
    head[257] = 0.0  # an answer does not end by itself
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    artifact = copy(tiny_artifact, tmp_path / "artifact", {})
    settings = FaithfulnessSettings(model=model, artifact=artifact, pairs=SPEC, pictures=4, max_tokens=12)
    if image_token:
        with pytest.raises(InvalidTraining, match="says nothing"):
            measure_faithfulness(settings)
    else:
        assert measure_faithfulness(settings).faithfulness["tokens"] == 4 * 12


def test_figures_that_no_json_holds_are_not_written(tiny_llava, tiny_artifact, tmp_path):
    """One picture twice, under two names: its state has no variance."""
    spec = described(tmp_path / "pairs", pictures=2, captions=1)
    shutil.copy(tmp_path / "pairs" / "0.png", tmp_path / "pairs" / "1.png")
    artifact = copy(tiny_artifact, tmp_path / "artifact", {})
    before = (artifact / "config.json").read_bytes()
    with pytest.raises(InvalidTraining, match=r"image_unexplained is (inf|nan): .*more varied pairs"):
        measure_faithfulness(
            FaithfulnessSettings(model=tiny_llava, artifact=artifact, pairs=spec, pictures=2, max_tokens=4)
        )
    assert (artifact / "config.json").read_bytes() == before


def test_what_is_spliced_begins_with_the_answer_whatever_the_artifact_waits_for():
    """And is the reconstruction alone: nothing of the image, no second branch."""
    assert SteeringRequest(
        enabled=True, strength=1.0, form="published", mode="causal", alpha=1.0, beta_up=0.0, beta_down=0.0, gamma=1.0,
        plausibility=0.0, min_answer_tokens=1,
    ) == SPLICED  # fmt: skip
    assert PLAIN.enabled is False
