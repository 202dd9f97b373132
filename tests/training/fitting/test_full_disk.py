"""A run on a full disk stops with the name of the file, and with room the same command goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
OWN_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]
ON_A_SMALL_DISK = """
import json, subprocess, sys
from pathlib import Path

import torch
from training.errors import InvalidTraining
from training.train_sparse_autoencoder import CommandLine, train_sparse_autoencoder

torch.set_num_threads(1)
disk, elsewhere, store = (Path(argument) for argument in sys.argv[1:])

def train(output):
    train_sparse_autoencoder(CommandLine(
        representations=store, output=output, num_concepts=128, active_concepts=8, batch_size=60, epochs=4,
        warmup_epochs=1, held_out=100, evaluate_every=1, checkpoint_every=3, device="cpu",
    ), lambda line: None)

said = []
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", disk], check=True)
for room in (8, 200, 320, 480, 620, 640, 660, 680, 10_000):  # KB: it fails here and there
    try:
        subprocess.run(["mount", "-o", f"remount,size={room}k", disk], check=True)
        train(disk / "run")
    except InvalidTraining as error:
        said.append(str(error))
    left = [str(file) for file in disk.rglob("*.part")]
    assert not left, left
train(elsewhere)
names = ("model.safetensors", "metrics.json")
same = all((disk / "run" / name).read_bytes() == (elsewhere / name).read_bytes() for name in names)
print(json.dumps({"said": said, "same": same}))
"""


@pytest.mark.slow
def test_a_full_disk_is_named_and_with_room_the_same_command_finishes(make_store, tmp_path):
    try:
        subprocess.run([*OWN_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", tmp_path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system of our own can be mounted here")
    make_store(tmp_path / "store", names=("embedding",), num_layers=None, text_in=None, prefixes=0)
    (tmp_path / "disk").mkdir()
    places = [str(tmp_path / name) for name in ("disk", "elsewhere", "store")]
    command = [*OWN_MOUNTS, sys.executable, "-c", ON_A_SMALL_DISK, *places]
    shown = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout.splitlines()[-1])
    run = tmp_path / "disk" / "run"
    for message in found["said"]:
        assert message.startswith(f"{run}/")
        assert "No space left on device" in message
    for named in ("metrics.jsonl", "tensorboard", "checkpoint/state-"):
        assert any(message.startswith(f"{run / named}") for message in found["said"]), (named, found["said"])
    assert found["same"]
