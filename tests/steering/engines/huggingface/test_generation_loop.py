"""What a failure costs: the requests that it belongs to, and nobody else. Real prompts, real caches."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable

import pytest
import torch

from steering.engines.base import GenerationRequest
from steering.errors import EngineUnavailable
from tests.steering.engines.contract import assert_soon_idle
from tests.steering.engines.driving import Answer, ask, make_request, send

NEIGHBOURS = [{}, {"strength": 0.5, "gamma": 0.6, "plausibility": 0.2}, {"mode": "exact"}, {"enabled": False}]
NO_END = {257: -100.0}
"""An answer that runs into its limit."""


@pytest.fixture
def break_prompts(engine, monkeypatch) -> Callable[..., list[list[str]]]:
    """Prompts of these requests fail at the very end of their prefill, when it has left all its traces.

    Returns the prefills that failed, as they come, by the ids of their requests.
    """
    prefill = engine._runner.prefill

    def break_these(requests: list[GenerationRequest], error: Exception | None = None) -> list[list[str]]:
        broken, failed = {request.request_id for request in requests}, []

        def half_run(new, first_slot):
            logits_BV = prefill(new, first_slot)
            ids = [sequence.request.request_id for sequence in new]
            if broken & set(ids):
                failed.append(ids)
                raise error or RuntimeError("at fault")
            return logits_BV

        monkeypatch.setattr(engine._runner, "prefill", half_run)
        return failed

    return break_these


async def send_together(engine, requests: list[GenerationRequest], monkeypatch) -> list[Answer | BaseException]:
    """All of them wait when the next prefill begins; something must be running."""
    decode, held, gate = engine._runner.decode, threading.Event(), threading.Event()

    def held_back(running):
        held.set()
        gate.wait()
        return decode(running)

    monkeypatch.setattr(engine._runner, "decode", held_back)
    await asyncio.to_thread(held.wait)
    sent = [asyncio.create_task(send(engine, request)) for request in requests]
    while engine.health().waiting < sum(request.sampling.n for request in requests):
        await asyncio.sleep(0.001)
    monkeypatch.setattr(engine._runner, "decode", decode)
    gate.set()
    return await asyncio.gather(*sent, return_exceptions=True)


def assert_same(answer: Answer, expected: Answer) -> None:
    """The same text, and the same done to it."""
    got, wanted = answer.end.receipt, expected.end.receipt
    assert answer.tokens() == expected.tokens()
    assert got.positions == wanted.positions
    assert got.relative_shift == pytest.approx(wanted.relative_shift, rel=1e-5)


@pytest.mark.slow
async def test_a_prompt_that_cannot_be_run_costs_nobody_else_anything(engine, break_prompts, monkeypatch):
    streams = [make_request(engine, "running", steering=one, max_tokens=150, logit_bias=NO_END) for one in NEIGHBOURS]
    new = [make_request(engine, "new", steering=one, max_tokens=20) for one in NEIGHBOURS]
    alone = [await send(engine, request) for request in streams + new]

    running = [asyncio.create_task(send(engine, request)) for request in streams]
    while engine.health().running < len(streams):
        await asyncio.sleep(0.001)
    at_fault = [make_request(engine, "y" * 100), make_request(engine, "twice", n=2)]
    failed = break_prompts(at_fault)
    together = [new[0], at_fault[0], new[1], at_fault[1], new[2], new[3]]
    outcomes = await send_together(engine, together, monkeypatch)

    for request, outcome in zip(together, outcomes, strict=True):
        if request in at_fault:
            assert isinstance(outcome, EngineUnavailable)
            assert "failed on this prompt (RuntimeError)" in outcome.message
    answers = [*await asyncio.gather(*running), *(one for one in outcomes if isinstance(one, Answer))]
    for answer, expected in zip(answers, alone, strict=True):
        assert_same(answer, expected)
    ids = [request.request_id for request in together]
    assert sorted(failed[0]) == sorted([*ids, ids[3]]), "together"
    assert sorted(failed[1:]) == sorted([[ids[1]], [ids[3]]]), "then each request at fault once"
    assert engine.health().alive
    assert engine.health().waiting == 0
    await assert_soon_idle(engine)


async def test_prompts_that_fail_beside_running_streams_do_not_make_the_engine_dead(engine, break_prompts):
    stream = engine.generate(make_request(engine, max_tokens=200, logit_bias=NO_END))
    await anext(stream)
    at_fault = [make_request(engine, "bad") for _ in range(10)]
    break_prompts(at_fault)
    for request in at_fault:
        with pytest.raises(EngineUnavailable):
            await send(engine, request)
        assert engine.health().alive
    await stream.aclose()


async def test_an_engine_on_which_nothing_runs_any_more_is_not_called_alive(engine, break_prompts, monkeypatch):
    at_fault = [make_request(engine) for _ in range(3)]
    break_prompts(at_fault)
    for request in at_fault:
        assert engine.health().alive
        with pytest.raises(EngineUnavailable, match="failed on this prompt"):
            await send(engine, request)
    assert not engine.health().alive
    monkeypatch.undo()
    await ask(engine)
    assert engine.health().alive


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
)
async def test_prompts_too_large_for_the_memory_never_make_the_engine_dead(engine, break_prompts, error):
    at_fault = [make_request(engine) for _ in range(5)]
    break_prompts(at_fault, error)
    for request in at_fault:
        with pytest.raises(EngineUnavailable, match="shorten it, send fewer images"):
            await send(engine, request)
        assert engine.health().alive


async def test_a_failed_prompt_gives_its_memory_back_while_others_run(engine, break_prompts):
    def allocated() -> int:
        layers = engine._runner._cache._layers.values()
        return sum(store.numel() for stored in layers for store in stored)

    stream = engine.generate(make_request(engine, max_tokens=60, logit_bias=NO_END))
    await anext(stream)
    before = allocated()
    long = make_request(engine, "y" * 180, n=7)
    break_prompts([long])
    with pytest.raises(EngineUnavailable):
        await send(engine, long)
    assert allocated() == before
    assert len([event async for event in stream]) > 1


async def test_a_failed_step_gives_all_memory_back_and_the_next_request_runs(engine, monkeypatch):
    def broken(_running):
        raise RuntimeError("lost")

    expected = await ask(engine)
    monkeypatch.setattr(engine._runner, "decode", broken)
    with pytest.raises(EngineUnavailable, match="failed on this batch"):
        await ask(engine)
    assert engine._runner._cache._layers == {}
    monkeypatch.undo()
    assert (await ask(engine)).tokens() == expected.tokens()


async def test_a_request_that_has_ended_leaves_the_tables_to_the_next(engine):
    """Also while somebody holds it, and while no garbage is collected."""
    tables = engine._runner.intervention.tables
    await ask(engine, "first", max_tokens=2)
    slots = tables.slots
    held = [await ask(engine, f"number {number}", max_tokens=2) for number in range(2 * slots)]
    gc.disable()
    try:
        held += [await ask(engine, f"uncollected {number}", max_tokens=2) for number in range(2 * slots)]
    finally:
        gc.enable()
    assert all(answer.end.receipt.applied for answer in held)
    assert tables.slots == slots
