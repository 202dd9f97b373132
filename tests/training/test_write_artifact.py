"""Every stage on a handful of pairs, for each family: what comes out is an artifact that its own model steers with."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

from steering.artifact import Artifact, load_artifact
from steering.engines.base import GenerationEnd, GenerationRequest, Sampling
from steering.engines.huggingface.engine import HuggingFaceEngine
from steering.errors import BadArtifact
from steering.request import RequestedSteering, SteeringRequest
from tests.tiny_models import drawn_image
from training import interpret_concepts, train_auxiliary_autoencoder, train_sparse_autoencoder
from training.alignment import alignment_gate, measure_alignment
from training.collection.lvlm import LvlmSettings
from training.collection.placing import PROMPTS
from training.collection.run import CollectionOptions, collect_store
from training.durable_files import write_tensors
from training.errors import InvalidTraining
from training.evaluation.asking import InProcess, Question
from training.interpret_concepts import interpret_store
from training.pairs import open_pairs
from training.run_folder import read_auxiliary, read_centre
from training.store.reader import open_store
from training.write_artifact import ArtifactSettings, collected_with, make_canary, write_artifact

LAYER, HELD_OUT, CONCEPTS = 1, 8, 16
TEXTS = ("a red circle", "a star", "an arrow in green, a moon", "nothing")


@dataclass(frozen=True, kw_only=True)
class Made:
    """What the stages before left."""

    model: Path
    folder: Path

    def settings(self, **changes) -> ArtifactSettings:
        given = {
            "model": self.model,
            "representations": self.folder / "store",
            "auxiliary": self.folder / "auxiliary",
            "sparse": self.folder / "vl_sae",
            "concepts": self.folder / "concepts",
            "control_images": 4,
            "output": self.folder / "artifact",
        }
        return ArtifactSettings.model_validate(given | changes)


def write_pairs(folder: Path) -> str:
    """The last two are the same."""
    folder.mkdir(parents=True)
    rows = []
    for index in range(40):
        drawn_image(index, (40 + index, 60)).save(folder / f"{index}.png")
        rows.append(json.dumps({"image": f"{index}.png", "text": f"{TEXTS[index % 4]} {index}"}))
    (folder / "pairs.jsonl").write_text("\n".join([*rows[:-1], rows[-2]]) + "\n")
    return f"jsonl:{folder / 'pairs.jsonl'}"


def run_stages(model: Path, folder: Path) -> Made:
    spec, where = write_pairs(folder / "pairs"), {"representations": folder / "store", "held_out": HELD_OUT}
    wanted = LvlmSettings(model=model, layers=(LAYER,))
    collect_store(folder / "store", spec, wanted, CollectionOptions(workers=(0,), batch_size=8), print)
    auxiliary = train_auxiliary_autoencoder.CommandLine(
        **where, output=folder / "auxiliary", shared_size=12, batch_size=16, epochs=30, learning_rate=1e-2
    )
    train_auxiliary_autoencoder.train_auxiliary_autoencoder(auxiliary)
    for kind in ("vl_sae", "sae_d"):
        sparse = train_sparse_autoencoder.CommandLine.model_validate(
            where
            | {"auxiliary": folder / "auxiliary", "output": folder / kind, "kind": kind, "num_concepts": CONCEPTS,
               "active_concepts": 4, "batch_size": 16, "epochs": 20, "learning_rate": 1e-2, "centre": True}
        )  # fmt: skip
        train_sparse_autoencoder.train_sparse_autoencoder(sparse)
    interpret_store(
        interpret_concepts.CommandLine(
            representations=folder / "store",
            auxiliary=folder / "auxiliary",
            sparse=folder / "vl_sae",
            top_texts=2,
            top_images=1,
            output=folder / "concepts",
        )
    )
    return Made(model=model, folder=folder)


@pytest.fixture(scope="module")
def made(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return run_stages(tiny_llava, tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def made_of_family(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return run_stages(tiny_family, tmp_path_factory.mktemp("stages_of_family"))


def check_it_is_whole(made: Made) -> None:
    config = write_artifact(made.settings())
    artifact = load_artifact(made.folder / "artifact")
    assert artifact.config == config
    assert (config.hook_layer, config.num_concepts, config.active_concepts) == (LAYER, CONCEPTS, 4)
    assert config.presets.keys() == {"off"}
    assert len(artifact.canary.images) == 4
    assert artifact.control_image_MD.shape == (4, config.hidden_size)
    assert [concept["id"] for concept in artifact.concepts] == list(range(CONCEPTS))
    check_how_texts_stood(made, artifact)


def check_how_texts_stood(made: Made, artifact: Artifact) -> None:
    """The canary's prompts are served ones, with the beginning of an answer; the record says so."""
    config = artifact.config
    assert config.text_in == "answer"
    assert (len(config.training["prompts"]), config.training["prefixes"], config.training["shortest_prefix"]) == (
        len(PROMPTS), 3, 1,
    )  # fmt: skip
    tokenizer = AutoProcessor.from_pretrained(made.model).tokenizer
    served = [served_prompt(made.model, prompt) for prompt in PROMPTS]
    for row, token_ids in enumerate(artifact.canary.token_ids):
        (asked,) = [one for one in served if token_ids[: len(one)] == one]
        assert tokenizer.decode(token_ids[len(asked) :]).removeprefix(" ") == f"{TEXTS[row]} {row}"


def served_prompt(model: Path, prompt: str) -> tuple[int, ...]:
    engine: Any = None
    question = Question(image=drawn_image(0), text=prompt, max_tokens=1, steering=SteeringRequest())
    return InProcess(engine, AutoProcessor.from_pretrained(model)).prompt(question)


async def steered_shift(made: Made) -> float:
    """Mean relative shift of an answer; the engine's start has then judged the canary."""
    engine = HuggingFaceEngine(model=str(made.model), artifact=str(made.folder / "artifact"), device="cpu")
    await engine.start()
    try:
        asked = SteeringRequest(enabled=True, form="difference", alpha=1.0, strength=1.0)
        request = GenerationRequest(
            request_id="one",
            prompt_token_ids=served_prompt(made.model, "what is this?"),
            images=(drawn_image(3, (64, 64)),),
            sampling=Sampling(max_tokens=6, temperature=0.0),
            steering=RequestedSteering(settings=asked, explicit=True),
        )
        (end,) = [event async for event in engine.generate(request) if isinstance(event, GenerationEnd)]
        assert end.receipt.applied, end.receipt
        return end.receipt.relative_shift[0]
    finally:
        await engine.stop()


@pytest.mark.slow
async def test_an_artifact_of_llava_steers_it(made: Made) -> None:
    check_it_is_whole(made)
    assert await steered_shift(made) > 0


@pytest.mark.slow
async def test_an_artifact_of_the_other_families_steers_them(made_of_family: Made) -> None:
    check_it_is_whole(made_of_family)
    assert await steered_shift(made_of_family) > 0


def test_what_was_taken_off_between_the_autoencoders_is_in_the_artifact(made: Made) -> None:
    """Trained with --centre: the artifact's auxiliary gives centred states, whose mean over training pairs is small."""
    write_artifact(made.settings())
    artifact, centre = load_artifact(made.folder / "artifact"), read_centre(made.folder / "vl_sae")
    assert centre is not None
    batch = open_store(made.folder / "store").read(range(10))
    with torch.no_grad():
        plain = read_auxiliary(made.folder / "auxiliary")(batch.image_ND, batch.text_ND)
        folded = artifact.auxiliary(batch.image_ND, batch.text_ND)
    torch.testing.assert_close(folded[0], plain[0] - centre.image_S, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(folded[1], plain[1] - centre.text_S, atol=1e-5, rtol=1e-5)


def test_text_columns_add_nothing_that_every_picture_would(made: Made) -> None:
    """The mean column of the pictures' codes is in the bias, and what is rebuilt from a text stays nearly the same."""
    config = write_artifact(made.settings(centre_columns=False))
    assert config.training["centre_columns"] is False
    as_trained = load_artifact(made.folder / "artifact")
    assert write_artifact(made.settings()).training["centre_columns"] is True
    centred = load_artifact(made.folder / "artifact")
    batch = open_store(made.folder / "store").read(range(40 - HELD_OUT))
    with torch.no_grad():
        image, text = (centred.sae.encode(part) for part in centred.auxiliary(batch.image_ND, batch.text_ND))
        added_S = (centred.sae.decode(image, "text") - centred.sae.text_decoder.bias).mean(0)
        before_S = (as_trained.sae.decode(image, "text") - as_trained.sae.text_decoder.bias).mean(0)
        rebuilt_NS, trained_NS = centred.sae.decode(text, "text"), as_trained.sae.decode(text, "text")
    assert added_S.norm() < 1e-4 * before_S.norm()
    torch.testing.assert_close(rebuilt_NS.mean(0), trained_NS.mean(0), atol=1e-5, rtol=1e-4)
    assert torch.equal(centred.sae.encoder, as_trained.sae.encoder)
    assert torch.equal(centred.sae.vision_decoder.weight, as_trained.sae.vision_decoder.weight)


def test_the_card_is_what_its_maker_says_and_what_is_known(made: Made, tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text('{"licence": "Apache-2.0", "data": "drawn"}')
    card = write_artifact(made.settings(card=tmp_path / "card.json")).card
    assert (card["licence"], card["data"]) == ("Apache-2.0", "drawn")
    assert "MiB" in card["memory"]


def test_parts_that_do_not_belong_together_are_named(made: Made, untrained_llava, tmp_path: Path) -> None:
    from training.miniature.llava_model import save_llava

    save_llava(untrained_llava, tmp_path / "other")
    with pytest.raises(InvalidTraining, match="--model"):
        write_artifact(made.settings(model=tmp_path / "other"))
    with pytest.raises(InvalidTraining, match="kind is 'sae_d'"):
        write_artifact(made.settings(sparse=made.folder / "sae_d"))
    with pytest.raises(InvalidTraining, match="run interpret_concepts"):
        write_artifact(made.settings(concepts=tmp_path))
    again = shutil.copytree(made.folder / "vl_sae", tmp_path / "trained_again")
    weights = load_file(again / "model.safetensors")
    write_tensors(again / "model.safetensors", weights | {"encoder": -weights["encoder"]})
    with pytest.raises(InvalidTraining, match=r"are those of another run than --sparse .*trained_again"):
        write_artifact(made.settings(sparse=again))
    shutil.copy(made.folder / "concepts" / "interpreted.json", tmp_path)
    (tmp_path / "concepts.jsonl").write_text('{"id": 0}\n')
    with pytest.raises(InvalidTraining, match=f"{CONCEPTS} concepts"):
        write_artifact(made.settings(concepts=tmp_path))
    with pytest.raises(InvalidTraining, match="--card"):
        write_artifact(made.settings(card=tmp_path / "none.json"))
    with pytest.raises(InvalidTraining, match=f"last {HELD_OUT} pairs"):
        write_artifact(made.settings(held_out=HELD_OUT + 1))
    with pytest.raises(InvalidTraining, match="layer 3 was not collected"):
        write_artifact(made.settings(layer=3))


def test_texts_in_the_user_s_turn_are_collected_and_recorded_too(made: Made, tmp_path: Path) -> None:
    """As far as the canary; a store of theirs and runs on answers are not put together, nor the other way round."""
    wanted = LvlmSettings(model=made.model, layers=(LAYER,), text_in="user_turn", prefixes=0)
    options = CollectionOptions(workers=(0,), batch_size=8)
    collect_store(tmp_path / "store", f"jsonl:{made.folder / 'pairs' / 'pairs.jsonl'}", wanted, options, print)
    settings = made.settings(representations=tmp_path / "store")
    with pytest.raises(InvalidTraining, match=r"manifest\.json: text_in is 'user_turn', but .*was trained on 'answer'"):
        write_artifact(settings)
    store = open_store(tmp_path / "store")
    canary = make_canary(collected_with(store, settings), open_pairs(store.manifest.collected.source["spec"]))
    tokenizer = AutoProcessor.from_pretrained(made.model).tokenizer
    assert tokenizer.decode(canary.token_ids[0]) == f"USER: <image>\n{TEXTS[0]} 0 ASSISTANT:"
    for image_D, text_D, row in zip(canary.image_ND, canary.text_ND, range(4), strict=True):
        stored = store.read([row])  # of pictures that are small enough as they are
        torch.testing.assert_close(image_D, stored.image_ND[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(text_D, stored.text_ND[0], atol=1e-5, rtol=1e-4)


def test_the_gate_s_figures_are_those_of_the_held_out_pairs(made: Made) -> None:
    config = write_artifact(made.settings(held_out=5))
    artifact, store = load_artifact(made.folder / "artifact"), open_store(made.folder / "store")
    measured = measure_alignment(artifact.auxiliary, artifact.sae, store.read(range(35, 40)))
    assert config.alignment == pytest.approx(measured.as_dict(), rel=1e-3, abs=1e-5)
    assert config.alignment["pairs"] == 5
    assert config.faithfulness == {}
    with pytest.raises(InvalidTraining, match=r"no faithfulness .*run training\.measure_faithfulness"):
        alignment_gate(config.alignment, config.faithfulness)


def test_held_out_pairs_that_are_all_the_same_make_no_artifact(made: Made) -> None:
    """What is unexplained is then a share of nothing, which no config.json holds: it could not be read again."""
    with pytest.raises(InvalidTraining, match=r"image_unexplained is (inf|nan)"):
        write_artifact(made.settings(held_out=2, output=made.folder / "none"))
    assert not (made.folder / "none").exists()


def test_nothing_but_an_artifact_is_replaced_by_one(made: Made) -> None:
    """The folder of a run has a config.json too."""
    before = sorted(path.name for path in (made.folder / "vl_sae").iterdir())
    for folder in (made.folder / "vl_sae", made.folder):
        with pytest.raises(BadArtifact, match="will not be replaced"):
            write_artifact(made.settings(output=folder))
    assert sorted(path.name for path in (made.folder / "vl_sae").iterdir()) == before
    assert (made.folder / "store" / "manifest.json").exists()


def test_line_ends_that_only_unicode_knows_are_no_line_ends(made: Made, tmp_path: Path) -> None:
    records = [{"id": number, "label": "", "texts": ["a\u2028b\u0085c"], "images": []} for number in range(CONCEPTS)]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (tmp_path / "concepts.jsonl").write_text(lines, encoding="utf-8")
    shutil.copy(made.folder / "concepts" / "interpreted.json", tmp_path)
    write_artifact(made.settings(concepts=tmp_path, output=tmp_path / "artifact"))
    assert next(iter(load_artifact(tmp_path / "artifact").concepts))["texts"] == ["a\u2028b\u0085c"]
