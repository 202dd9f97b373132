"""Where an interrupted run goes on: parameters, statistics and the optimiser's state after some step.

RUN/checkpoint/state-00001200.safetensors   `objective.NAME`, `optimizer.INDEX.NAME`
RUN/checkpoint/checkpoint.json              written last: the step, and which of the files is meant
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from training.durable_files import write_json, write_tensors
from training.errors import InvalidTraining

CHECKPOINT_FOLDER, INDEX_FILE = "checkpoint", "checkpoint.json"


def trained_state(objective: nn.Module) -> dict[str, Tensor]:
    """What a run changes: parameters that have a gradient, and buffers."""
    frozen = {name for name, parameter in objective.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in objective.state_dict().items() if name not in frozen}


def save_checkpoint(run: Path, step: int, objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """After `step` steps. The checkpoint before is there until this one is."""
    tensors = {f"objective.{name}": tensor for name, tensor in trained_state(objective).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    file = run / CHECKPOINT_FOLDER / f"state-{step:08d}.safetensors"
    write_tensors(file, {name: tensor.detach().cpu() for name, tensor in tensors.items()})
    write_json(run / CHECKPOINT_FOLDER / INDEX_FILE, {"step": step, "file": file.name})
    for older in file.parent.glob("state-*.safetensors"):
        if older != file:
            older.unlink()


def load_checkpoint(run: Path, objective: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Puts both where they were; gives the steps done, 0 where there is no checkpoint."""
    index_file = run / CHECKPOINT_FOLDER / INDEX_FILE
    if not index_file.exists():
        return 0
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        tensors = load_file(run / CHECKPOINT_FOLDER / index["file"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InvalidTraining(
            f"{index_file}: the checkpoint cannot be read ({error}); remove {run} and train again"
        ) from error
    state = {name.removeprefix("objective."): tensor for name, tensor in tensors.items() if name.startswith("obj")}
    objective.load_state_dict({**objective.state_dict(), **state})
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, place, entry = name.split(".", 2)
            moments.setdefault(int(place), {})[entry] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return index["step"]


def drop_checkpoints(run: Path) -> None:
    """A finished run needs none."""
    shutil.rmtree(run / CHECKPOINT_FOLDER, ignore_errors=True)
