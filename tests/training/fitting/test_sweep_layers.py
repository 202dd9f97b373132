"""A sweep trains each layer of a store as the stages do, shows what each logged, and goes on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.command_line import parse_settings
from training.compare_runs import read_metrics
from training.errors import InvalidTraining
from training.store.layout import EMBEDDING
from training.sweep_layers import MEASURES, SweepSettings, sweep_layers

AUXILIARY = "--shared-size 16 --batch-size 64 --epochs 2 --held-out 100"
SPARSE = "--num-concepts 64 --active-concepts 4 --batch-size 64 --epochs 2 --warmup-epochs 1 --held-out 100"


def sweep(store: Path, output: Path, sparse: str = SPARSE) -> SweepSettings:
    return SweepSettings(representations=store, output=output, device="cpu", auxiliary=AUXILIARY, sparse=sparse)


@pytest.mark.slow
def test_every_layer_is_trained_measured_and_drawn_and_a_second_sweep_trains_nothing(make_store, tmp_path):
    store = make_store(tmp_path / "store", names=("layer_1", "layer_3"))
    told: list[str] = []
    found = sweep_layers(sweep(store, tmp_path / "sweep"), told.append)
    assert told == ["== layer 1", "== layer 3"]
    for layer in ("1", "3"):
        logged = read_metrics(tmp_path / "sweep" / f"layer_{layer}" / "sparse")
        assert found[layer] == {name: logged[key] for name, key in MEASURES.items()}
    assert json.loads((tmp_path / "sweep" / "layers.json").read_text()) == found
    assert (tmp_path / "sweep" / "layers.png").read_bytes().startswith(b"\x89PNG")
    weights = {file: file.stat().st_mtime_ns for file in (tmp_path / "sweep").rglob("model.safetensors")}
    assert len(weights) == 4
    assert sweep_layers(sweep(store, tmp_path / "sweep"), told.append) == found
    assert {file: file.stat().st_mtime_ns for file in weights} == weights


def test_what_cannot_be_swept_is_named(make_store, tmp_path, capsys):
    clip = make_store(tmp_path / "clip", names=(EMBEDDING,), family="open_clip", num_layers=None)
    with pytest.raises(InvalidTraining, match="states of no layer are there to sweep"):
        sweep_layers(sweep(clip, tmp_path / "none"))
    store = make_store(tmp_path / "store")
    with pytest.raises(SystemExit):
        sweep_layers(sweep(store, tmp_path / "sweep", sparse="--concepts 5"))
    assert "train_sparse_autoencoder: error: unrecognized arguments: --concepts 5" in capsys.readouterr().err


def test_the_command_line_takes_the_options_of_both_stages():
    argv = ["--representations", "a", "--output", "b", "--auxiliary", AUXILIARY, "--sparse", SPARSE, "--device", "cpu"]
    assert parse_settings(SweepSettings, program="x", argv=argv) == sweep(Path("a"), Path("b"))
