"""The decode step inside a captured graph: what it may not do, what it launches, and that it serves every batch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steering.engines.vllm.plugin.wire import WireSteering
from steering.slot_tables import Stream
from tests.steering.engines.vllm.layer_world import (
    PROMPT,
    SETTINGS,
    TEXT_TOKENS,
    announce,
    copied,
    make_layer,
    random_stream,
)

HERE = Path(__file__).parent
ROOT = HERE.parents[3]
ROWS, HIDDEN, CONCEPTS, ACTIVE = 32, 4096, 32768, 256
WEIGHT_BYTES = 4 * (HIDDEN * HIDDEN + CONCEPTS * HIDDEN)
"""Text projection and directions, which any steered row makes a step read."""
FREE = {"device", "view", "slice", "select", "alias", "detach", "unsqueeze"}
"""Operations that launch nothing."""
ONE_BRANCH = ["aten.clamp.default", "aten.add.Tensor", "aten.to.dtype", "aten.index_copy_.default"]
"""Besides the kernels and the pooling: what class a row asks for, the stream, and the means that are kept."""
TWO_BRANCHES = [*ONE_BRANCH, "aten.clone.default", "aten.clone.default", "aten.add.Tensor", "aten.index.Tensor",
                "aten.cat.default"]  # fmt: skip
"""Besides: the steered branch's stream, what stands in for its tail, its settings, and both branches side by side."""
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch came without Triton")


class HostSeen(Exception):
    """An operation of a captured step touched the host."""


class DeviceOnly(TorchDispatchMode):
    """Counts operations; refuses those between devices. Host reads and unknown shapes, fake tensors refuse anyway."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs, made)) if isinstance(one, torch.Tensor)]
        if any(one.device.type != "cuda" for one in tensors):
            raise HostSeen(str(func))
        self.operations.append(str(func))
        return made


class Recorder:
    """In the place of a Triton kernel: what it is launched with."""

    def __init__(self, launches: list[tuple[str, Any, tuple]], name: str) -> None:
        self._launches, self._name = launches, name

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **_options: self._launches.append((self._name, grid, arguments))


def as_it_is(stream_ND: torch.Tensor, _class_N: torch.Tensor, _asked_N: torch.Tensor) -> torch.Tensor:
    return stream_ND


def trace(monkeypatch, branches: int = 1, pool: Callable[..., Any] = as_it_is) -> tuple[list, list[str]]:
    """Launches and other operations of one step, at LLaVA-1.5-7B's shape, on tensors that have no contents."""
    from steering.kernels import launch

    launches: list[tuple[str, Any, tuple]] = []
    for name in ("product_kernel", "select_kernel", "accumulate_kernel", "finish_kernel"):
        monkeypatch.setattr(launch, name, Recorder(launches, name))
    device = torch.device("cuda")
    with FakeTensorMode(), torch.inference_mode():
        layer = make_layer(
            device=device, dtype=torch.bfloat16, with_kernels=True, branches=branches, hidden=HIDDEN,
            concepts=CONCEPTS, active=ACTIVE, max_sequences=ROWS,
        )  # fmt: skip
        layer.pool = pool  # pyright: ignore[reportAttributeAccessIssue]
        stream = Stream(*(torch.empty(ROWS, HIDDEN, dtype=torch.bfloat16, device=device) for _ in range(2)))
        positions = torch.zeros(ROWS, dtype=torch.int64, device=device)
        with DeviceOnly() as seen:
            layer.begin()
            layer._change(stream, positions, None)
            layer.join(stream.hidden)
    return launches, seen.operations


@pytest.mark.parametrize("branches", [1, 2])
def test_a_step_never_looks_at_the_host(monkeypatch, branches):
    launches, operations = trace(monkeypatch, branches)
    assert [name.removesuffix("_kernel") for name, _, _ in launches] == [
        "product", "product", "select", "accumulate", "finish",
    ]  # fmt: skip
    weights = {id(one): one for _, _, arguments in launches[:2] for one in arguments if isinstance(one, torch.Tensor)}
    read = sum(one.nbytes for one in weights.values() if one.dtype == torch.float32 and one.numel() >= HIDDEN**2)
    assert read == WEIGHT_BYTES
    computing = [name for name in operations if name.split(".")[1] not in FREE]
    assert computing == (ONE_BRANCH if branches == 1 else TWO_BRANCHES)


def test_what_is_launched_does_not_depend_on_the_step(monkeypatch):
    def described(launches):
        return [
            (name, grid, [one.shape if isinstance(one, torch.Tensor) else one for one in arguments])
            for name, grid, arguments in launches
        ]

    assert described(trace(monkeypatch)[0]) == described(trace(monkeypatch)[0])


@pytest.mark.parametrize(
    "look",
    [
        lambda stream, classes: stream * float(classes.max()),
        lambda stream, classes: stream[classes.nonzero()[:, 0]],
        lambda stream, classes: stream * torch.tensor([2.0], device="cpu").to(stream.device),
        lambda stream, classes: stream[classes > 0],
        lambda stream, classes: stream.cpu().to(stream.device),
        lambda stream, classes: stream if bool((classes == 0).all()) else stream * 2,
    ],
    ids=["a value", "nonzero", "a host tensor", "a mask", "there and back", "a decision"],
)
def test_the_trace_finds_a_look_at_the_host(monkeypatch, look):
    with pytest.raises((HostSeen, DataDependentOutputException, DynamicOutputShapeException)):
        trace(monkeypatch, pool=lambda stream, classes, _asked: look(stream, classes))


@pytest.mark.slow
def test_one_captured_step_serves_every_batch(tmp_path):
    """Interpreted, in a process of its own: whether Triton interprets is decided once, when it is imported."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(HERE / "second_runner"), str(ROOT)]),
        "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    pytest_alone = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*pytest_alone, str(HERE / "layer_steps.py")], env=environment, capture_output=True, text=True, timeout=250
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


@torch.inference_mode()
def test_4096_sequences_that_never_ask_for_their_receipt_take_no_more_memory():
    layer = make_layer(device=torch.device("cpu"), dtype=torch.float32, with_kernels=False, max_sequences=2)
    tables = [*layer.tables.code, layer.tables.settings_MC, layer.tables.direction_MD, layer.tables.tally_T3]
    places = [(table.data_ptr(), table.nbytes) for table in tables]
    stream = random_stream(len(PROMPT), layer, 1, torch.float32)
    for number in range(4200):
        layer.batch.enter(number % 2, WireSteering(id=str(number), **SETTINGS[0]), PROMPT)
        step = announce(layer, [number % 2], [0], [len(PROMPT)])
        layer._change(copied(stream), torch.zeros(len(PROMPT)), step)
    now = [*layer.tables.code, layer.tables.settings_MC, layer.tables.direction_MD, layer.tables.tally_T3]
    assert [(table.data_ptr(), table.nbytes) for table in now] == places
    assert layer.batch.sequences < layer.batch.tallies <= 4096 + 2 * 2 + 1
    oldest, latest = layer.finish([("0", None), ("4199", None)])
    assert oldest is None
    assert latest is not None
    assert latest["positions"] == TEXT_TOKENS - 1
