"""Two workers that share every batch train to the weights of one, and go on after an interruption."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training.train_auxiliary_autoencoder import CommandLine as AuxiliaryCommandLine
from training.train_auxiliary_autoencoder import train_auxiliary_autoencoder
from training.train_sparse_autoencoder import CommandLine as SparseCommandLine
from training.train_sparse_autoencoder import train_sparse_autoencoder

REPOSITORY = Path(__file__).parents[3]
EVERY_STAGE = {
    "learning_rate": 1e-3, "batch_size": 60, "epochs": 3, "held_out": 100, "evaluate_every": 5, "checkpoint_every": 8,
    "device": "cpu",
}  # fmt: skip
AUXILIARY = EVERY_STAGE | {"shared_size": 16, "contrastive_weight": 0.1, "weight_decay": 0.0}
SPARSE = EVERY_STAGE | {"num_concepts": 64, "active_concepts": 8, "warmup_epochs": 1}


@pytest.fixture(scope="module")
def auxiliary(store, tmp_path_factory):
    """Trained by one worker."""
    output = tmp_path_factory.mktemp("one") / "auxiliary"
    train_auxiliary_autoencoder(AuxiliaryCommandLine(**settings(AUXILIARY, store, output)), ignore)
    return output


@pytest.fixture(scope="module")
def sparse(store, auxiliary, tmp_path_factory):
    """Trained by one worker."""
    output = tmp_path_factory.mktemp("one") / "sparse"
    train_sparse_autoencoder(SparseCommandLine(**settings(SPARSE, store, output, auxiliary=str(auxiliary))), ignore)
    return output


def settings(options, store, output, **more):
    return options | {"representations": str(store), "output": str(output)} | more


def ignore(line):
    pass


def log(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "samples_per_s"} for row in rows]


def assert_alike(run, other):
    """What was learned, and all that was counted on the way."""
    found = load_file(other / "model.safetensors")
    for name, tensor in load_file(run / "model.safetensors").items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=lambda text, n=name: n + text)
    for row, other_row in zip(log(run), log(other), strict=True):
        assert row == pytest.approx(other_row, abs=1e-3)


@pytest.mark.slow
def test_two_workers_train_to_the_weights_of_one_and_go_on_where_they_were(store, auxiliary, sparse, tmp_path):
    outputs = [tmp_path / name for name in ("auxiliary", "sparse", "interrupted")]
    by_sparse = settings(SPARSE, store, outputs[1], auxiliary=str(auxiliary))
    again = {"stage": "sparse", "settings": by_sparse | {"output": str(outputs[2])}}
    runs = [
        {"stage": "auxiliary", "settings": settings(AUXILIARY, store, outputs[0])},
        {"stage": "sparse", "settings": by_sparse},
        again | {"interrupt_at": 10},
        again,
    ]
    command = [sys.executable, "-m", "tests.training.fitting.gloo_workers", json.dumps(runs), str(tmp_path / "meeting")]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=120)
    for one, two in zip((auxiliary, sparse, sparse), outputs, strict=True):
        assert_alike(one, two)
    assert log(outputs[2]) == log(outputs[1])


ON_RAY = """
import json, sys
from training import train_sparse_autoencoder as sparse

sparse.train_sparse_autoencoder(sparse.CommandLine(**json.loads(sys.argv[1])))
"""


@pytest.mark.slow
def test_two_workers_of_ray_train_to_the_weights_of_one(store, auxiliary, sparse, tmp_path):
    options = settings(SPARSE, store, tmp_path / "sparse", auxiliary=str(auxiliary), workers=2)
    command = [sys.executable, "-c", ON_RAY, json.dumps(options)]
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL, timeout=180)
    assert_alike(sparse, tmp_path / "sparse")
