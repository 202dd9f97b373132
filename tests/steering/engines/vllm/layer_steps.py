"""One captured decode step serves every batch: kernels interpreted on a CPU, a real CUDA graph where there is a GPU.

`test_steering_layer.py` runs this with TRITON_INTERPRET=1, which must stand before Python starts; on a GPU:

    python -m pytest --noconftest tests/steering/engines/vllm/layer_steps.py
"""

from __future__ import annotations

import pytest
import torch

from tests.steering.engines.vllm.layer_world import (
    PROMPT,
    SETTINGS,
    TWO,
    announce,
    copied,
    enter,
    make_layer,
    random_stream,
)

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
ROWS = 8
NOTHING = torch.zeros(ROWS, dtype=torch.int64, device=DEVICE)
on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")


def prefilled(branches: int, dtype: torch.dtype, **shape):
    """Six sequences, every form and control, behind their prompts; places 6 and 7 are off."""
    layer = make_layer(device=DEVICE, dtype=dtype, with_kernels=True, branches=branches, max_sequences=ROWS, **shape)
    for index, settings in enumerate(SETTINGS):
        enter(layer, index, settings | (TWO if branches == 2 and index % 2 else {}))
    prefill(layer, dtype)
    return layer


def prefill(layer, dtype: torch.dtype) -> None:
    lengths = [len(PROMPT)] * len(SETTINGS)
    step = announce(layer, list(range(len(SETTINGS))), [0] * len(SETTINGS), lengths)
    stream = random_stream(sum(lengths), layer, 1, dtype)
    layer._change(stream, torch.zeros(sum(lengths), dtype=torch.int64, device=DEVICE), step)


BATCHES = [
    [0, 1, 2, 3, 4, 5, 6, 7],
    [6, 7, 6, 7, 6, 7, 6, 7],
    [5, 3, 1],
    [2],
    [7, 0],
    [4, 6, 5, 7, 0, 2, 1, 3],
]
"""The runner's places in some steps one after the other."""


def decode(layer, number: int, places: list[int]):
    return announce(layer, places, [len(PROMPT) + number] * len(places), [1] * len(places), padded=ROWS)


@torch.inference_mode()
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_about_which_nothing_is_known_is_the_step_that_is_known(branches, dtype):
    """What a graph captures (no step on the host) against the eager step, and both against plain torch."""
    layer, plain = prefilled(branches, dtype), make_layer(
        device=DEVICE, dtype=dtype, with_kernels=False, branches=branches, max_sequences=ROWS
    )  # fmt: skip
    plain.batch, plain.tables = layer.batch, layer.tables
    for number, places in enumerate(BATCHES):
        step, before = decode(layer, number, places), random_stream(ROWS, layer, number, dtype)
        tallies, outcomes = layer.tables.tally_T3.clone(), []
        for one, known in ((layer, None), (layer, step), (plain, step)):
            layer.tables.tally_T3.copy_(tallies)
            plain._plan, stream = layer._plan, copied(before)
            one.begin()
            if one is layer or step is not None:
                one._change(stream, NOTHING, known)
            outcomes.append((stream, one._twin_ND, one._blend_N2, layer.tables.tally_T3.clone()))
        (captured, eager, reference) = outcomes
        steered = [] if step is None else step.row_R.tolist()
        off = [row for row in range(ROWS) if row not in steered]
        for part, known_part, before_part in zip(captured[0], eager[0], before, strict=True):
            assert torch.equal(part, known_part)
            assert torch.equal(part[off], before_part[off])
        moved, wanted = (sum(outcome[0], torch.zeros((), device=DEVICE)) for outcome in (captured, reference))
        torch.testing.assert_close(moved, wanted, atol=1e-4 if dtype == torch.float32 else 6e-2, rtol=2e-2)
        torch.testing.assert_close(captured[3], eager[3], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(captured[3], reference[3], atol=1e-2, rtol=1e-2)
        if step is not None and step.two_branches:
            assert torch.equal(captured[1], eager[1])
            assert torch.equal(captured[2], eager[2])


@on_gpu
@torch.inference_mode()
@pytest.mark.parametrize("branches", [1, 2])
def test_one_graph_replays_every_batch(branches):
    layer = prefilled(branches, torch.bfloat16, hidden=512, concepts=1024, active=32)
    held = random_stream(ROWS, layer, 0, torch.bfloat16)
    announce(layer, [6, 7], [0, 0], [1, 1])
    for _ in range(2):
        layer.begin()
        layer._change(held, NOTHING, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.begin()
        layer._change(held, NOTHING, None)
    twin_ND, blend_N2 = layer._twin_ND, layer._blend_N2
    for number, places in enumerate(BATCHES):
        step, before = decode(layer, number, places), random_stream(ROWS, layer, number, torch.bfloat16)
        tallies = layer.tables.tally_T3.clone()
        for part, new in zip(held, before, strict=True):
            part.copy_(new)
        graph.replay()
        replayed, counted = copied(held), layer.tables.tally_T3.clone()
        seen = None if twin_ND is None or blend_N2 is None else (twin_ND.clone(), blend_N2.clone())
        layer.tables.tally_T3.copy_(tallies)
        layer.begin()
        layer._change(before, NOTHING, step)
        assert all(torch.equal(*pair) for pair in zip(replayed, before, strict=True))
        torch.testing.assert_close(counted, layer.tables.tally_T3)
        if seen is not None and step is not None and step.two_branches:
            assert layer._twin_ND is not None
            assert layer._blend_N2 is not None
            assert torch.equal(seen[0], layer._twin_ND)
            assert torch.equal(seen[1], layer._blend_N2)


@on_gpu
@torch.inference_mode()
def test_nothing_waits_for_the_gpu():
    """Prefills with images and controls, images out of the cache, decode steps, under an error for every wait."""
    layer = prefilled(2, torch.bfloat16)
    everybody = list(range(len(SETTINGS)))
    stream = random_stream(len(PROMPT) * len(SETTINGS), layer, 1, torch.bfloat16)
    few, positions = type(stream)(*(part[:ROWS] for part in stream)), torch.zeros(len(stream[0]), device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(50):
            for index, settings in enumerate(SETTINGS):
                layer.batch.leave(f"sequence {index}")
                enter(layer, index, settings | (TWO if index % 2 else {}))
            if number % 2:
                lengths = [len(PROMPT)] * len(SETTINGS)
                layer._change(stream, positions, announce(layer, everybody, [0] * len(SETTINGS), lengths))
            step = decode(layer, number, everybody)
            assert step is not None
            assert bool(step.image_cached) == (number % 2 == 0)
            if step.recalls:
                layer.recall(step, ROWS)
            layer._change(few, NOTHING, layer._step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
