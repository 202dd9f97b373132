"""What an artifact folder promises, and what is said when it is broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steering.artifact import load_artifact, save_artifact
from steering.artifact_config import compute_fingerprint, read_config, write_config
from steering.errors import BadArtifact

BUNDLED = Path(__file__).parents[2] / "training/miniature/bundle/artifact"


@pytest.fixture
def folder(tiny_artifact, tmp_path):
    return shutil.copytree(tiny_artifact, tmp_path / "artifact")


def test_what_is_written_is_read_back(folder, tmp_path):
    first = load_artifact(folder)
    save_artifact(tmp_path / "again", first)
    again = load_artifact(tmp_path / "again")
    assert again.config == first.config
    assert tuple(again.concepts) == tuple(first.concepts)
    for ours, theirs in zip(first.sae.parameters(), again.sae.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [image.tobytes() for image in again.canary.images] == [image.tobytes() for image in first.canary.images]


def test_the_fingerprint_follows_weights_concepts_and_presets_but_not_records(folder):
    config = read_config(folder)
    before = config.fingerprint
    assert write_config(folder, config.model_copy(update={"card": {"data": "other"}})).fingerprint == before
    preset = config.presets["captions"]
    scored = {**config.presets, "captions": preset.model_copy(update={"dev_scores": {"chair_s": 0.1}})}
    assert write_config(folder, config.model_copy(update={"presets": scored})).fingerprint == before
    stronger = {**config.presets, "captions": preset.model_copy(update={"alpha": 3.0})}
    assert write_config(folder, config.model_copy(update={"presets": stronger})).fingerprint != before


def test_a_place_in_the_answer_is_part_of_the_fingerprint_and_none_leaves_no_trace(folder):
    config = read_config(folder)
    preset = config.presets["captions"]
    for wait in (0, 6):
        later = {**config.presets, "captions": preset.model_copy(update={"min_answer_tokens": wait})}
        written = write_config(folder, config.model_copy(update={"presets": later}))
        assert written.fingerprint != config.fingerprint
        assert load_artifact(folder).config.presets["captions"].min_answer_tokens == wait
    assert write_config(folder, config).fingerprint == config.fingerprint
    assert "min_answer_tokens" not in (folder / "config.json").read_text()


def test_an_artifact_from_before_a_place_in_the_answer_could_be_named_keeps_its_fingerprint():
    """The relevant keys are then what they were: a preset without such a place does not mention it."""
    recorded = read_config(BUNDLED)
    assert compute_fingerprint(BUNDLED, recorded) == recorded.fingerprint
    asked = {name: preset.model_dump() for name, preset in recorded.presets.items()}
    assert asked["captions"]["min_answer_tokens"] is not None
    assert "min_answer_tokens" not in asked["paper_pope"]


def _flip_byte(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))


def _drop_tensor(file):
    tensors = load_file(file)
    del tensors["sae.encoder"]
    save_file(tensors, file)


def _edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


BREAKAGES = {
    "a flipped byte in the weights": (lambda f: _flip_byte(f / "model.safetensors"), "changed or damaged"),
    "a missing tensor": (lambda f: _drop_tensor(f / "model.safetensors"), "changed or damaged"),
    "truncated weights": (lambda f: (f / "model.safetensors").write_bytes(b"short"), "changed or damaged"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors cannot be read"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "not a valid artifact configuration"),
    "an unknown key": (lambda f: _edit(f / "config.json", surprise=1), "surprise"),
    "another format": (lambda f: _edit(f / "config.json", format_version=2), "format_version"),
    "another layer": (lambda f: _edit(f / "config.json", hook_layer=1), "changed or damaged"),
    "changed concepts": (lambda f: (f / "concepts.jsonl").write_text("{}\n"), "changed or damaged"),
    "no canary": (lambda f: (f / "canary" / "pooled.safetensors").unlink(), "changed or damaged"),
    "a canary image less": (lambda f: (f / "canary" / "image_2.png").unlink(), "changed or damaged"),
    "a canary declared synthetic": (lambda f: _edit(f / "config.json", canary_synthetic=True), "changed or damaged"),
    "more active concepts than there are": (lambda f: _edit(f / "config.json", active_concepts=97), "active_concepts"),
    "a default preset that is missing": (lambda f: _edit(f / "config.json", default_preset="best"), "default_preset"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_artifact_is_refused_and_the_file_named(folder, breakage):
    break_it, message = BREAKAGES[breakage]
    break_it(folder)
    with pytest.raises(BadArtifact, match=message):
        load_artifact(folder)


@pytest.mark.parametrize("token_ids", [[], [["a"]], [[1, -2]], [[1]] * 3], ids=str)
def test_a_canary_that_checks_nothing_is_refused(folder, token_ids):
    (folder / "canary" / "prompts.json").write_text(json.dumps({"token_ids": token_ids}))
    write_config(folder, read_config(folder))
    with pytest.raises(BadArtifact, match="not a readable canary"):
        load_artifact(folder)


def test_weights_that_do_not_fit_the_configuration_are_refused(folder):
    config = read_config(folder)
    write_config(folder, config.model_copy(update={"num_concepts": 97}))
    with pytest.raises(BadArtifact, match="does not fit"):
        load_artifact(folder)
