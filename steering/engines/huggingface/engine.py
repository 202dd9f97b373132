"""A steered LVLM on Hugging Face transformers: any device, no extra install; its numbers define 'correct'.

Concurrent requests share decode steps: one thread runs prefills and steps, and each request's events travel back to
the event loop that asked. What happens in a step is `batch_runner.py`; what happens at the hook, `intervention.py`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Rows
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from steering.engines.base import (
    Capabilities,
    GenerationEnd,
    GenerationRequest,
    Health,
    SampledToken,
    TextDelta,
    TokenLogprob,
)
from steering.engines.huggingface.batch_runner import BatchRunner
from steering.engines.huggingface.loaded_model import load_model
from steering.engines.preparation import expand_prompt, prepare_with_pixels
from steering.engines.sampling import top_logprobs
from steering.engines.sequence import RunningRequest, Sequence
from steering.engines.text_stream import TokenBytes
from steering.errors import EngineUnavailable
from steering.hooks import output_hook
from steering.intervention import Intervention

log = logging.getLogger(__name__)
MAX_PREFILL_BATCH = 8
"""Prompts run together: bounds how long running streams wait for new ones."""
MAX_FAILURES = 3
"""So many failed steps in a row, and `health` calls the engine dead: another process may fare better."""
CANCELLED = "the request was cancelled"


class HuggingFaceEngine:
    """See `Engine` in base.py."""

    def __init__(
        self,
        model: str | Path,
        artifact: str | Path | None,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        max_batch_size: int = 16,
        max_context_tokens: int | None = None,
    ) -> None:
        self._model_path, self._artifact_path = str(model), artifact
        self._device, self._dtype = device, dtype
        self._max_batch_size, self._max_context_tokens = max_batch_size, max_context_tokens
        self._hook = ExitStack()
        self._wake = threading.Condition()
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._cancelled: list[RunningRequest] = []
        self._preparing: list[str] = []
        """Ids of requests that are not sequences yet; one that is cancelled leaves the list."""
        self._failures = 0
        """Steps that failed since one last succeeded."""
        self._stopping = False
        self._last_progress = time.monotonic()
        self._thread: threading.Thread | None = None

    # -- life cycle ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load model and artifact, check the canary, attach the hook, start the loop. Raises BadArtifact."""
        await asyncio.to_thread(self._load)
        self._thread = threading.Thread(target=self._loop, name="huggingface-engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End the loop and detach the hook; what still runs fails with EngineUnavailable."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        self.detach_hook()

    def detach_hook(self) -> None:
        """Take steering off the model; receipts then say `hook_detached`."""
        self._hook.close()

    def _load(self) -> None:
        loaded = load_model(self._model_path, self._artifact_path, self._device, self._dtype, self._max_context_tokens)
        self._checkpoint = loaded.checkpoint
        intervention, hook_layer = None, len(loaded.decoder.layers) - 1
        if self._checkpoint.artifact is not None:
            hook_layer = self._checkpoint.artifact.config.hook_layer
            intervention = Intervention(self._checkpoint.artifact, loaded.model.device)
            self._hook.enter_context(output_hook(loaded.decoder.layers[hook_layer], intervention))
        self._runner = BatchRunner(loaded.model, loaded.decoder, intervention, hook_layer)
        self._token_bytes = TokenBytes(self._checkpoint.processor.tokenizer)

    # -- what callers see ----------------------------------------------------------------------------------------

    @property
    def processor(self):
        """The checkpoint's processor: its tokenizer, image processor and chat template."""
        return self._checkpoint.processor

    def capabilities(self) -> Capabilities:
        return self._checkpoint.capabilities(
            "huggingface", modes=("causal", "exact"), branches=(1, 2), response_format=False
        )

    def health(self) -> Health:
        with self._wake:
            busy = bool(self._running or self._waiting)
            return Health(
                alive=self._is_serving() and self._failures < MAX_FAILURES,
                running=len(self._running),
                waiting=len(self._waiting),
                seconds_since_progress=time.monotonic() - self._last_progress if busy else 0.0,
            )

    def count_prompt_tokens(self, images: Rows[Image], token_ids: Rows[int]) -> int:
        """Length of a prompt with its image tokens expanded."""
        return len(expand_prompt(self._checkpoint, images, token_ids))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TextDelta | GenerationEnd, None]:
        """See `Engine`. Closing the iterator cancels the request."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[TextDelta | GenerationEnd | Exception] = asyncio.Queue()
        with self._wake:
            self._preparing.append(request.request_id)
        try:
            prepared = await asyncio.to_thread(
                prepare_with_pixels, self._checkpoint, request, partial(_hand_over, loop, events)
            )
        finally:
            with self._wake:
                was_cancelled = request.request_id not in self._preparing
                self._preparing = [one for one in self._preparing if one != request.request_id]
        if was_cancelled:
            raise EngineUnavailable(CANCELLED)
        try:
            self._submit(prepared)
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, GenerationEnd):
                    return
        finally:
            self._cancel([prepared])

    def cancel(self, request_id: str) -> None:
        """See `Engine`; takes effect before the next step. Who still iterates `generate` gets EngineUnavailable."""
        with self._wake:
            self._preparing = [one for one in self._preparing if one != request_id]
            active = [sequence.request for sequence in (*self._running, *self._waiting)]
        self._cancel([one for one in active if one.request_id == request_id])

    def _cancel(self, requests: list[RunningRequest]) -> None:
        with self._wake:
            self._cancelled.extend(requests)
            self._wake.notify()

    # -- the loop ------------------------------------------------------------------------------------------------

    def _is_serving(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._stopping

    def _submit(self, prepared: RunningRequest) -> None:
        with self._wake:
            if not self._is_serving():
                raise EngineUnavailable("the engine is not running; try again later")
            self._waiting.extend(prepared.sequences)
            self._last_progress = time.monotonic() if not self._running else self._last_progress
            self._wake.notify()

    @torch.inference_mode()
    def _loop(self) -> None:
        try:
            while self._wait_for_work():
                try:
                    self._step()
                    self._failures = 0
                except Exception as error:  # its requests fail and the loop goes on; `health` tells of many in a row
                    log.exception("a step failed; its requests are lost")
                    self._failures += 1
                    self._fail_all(f"the engine failed on this batch ({type(error).__name__}); try again")
        finally:
            self._stopping = True
            self._fail_all("the engine is stopping; try again later")

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._drop_cancelled()
            while not (self._stopping or self._running or self._waiting):
                self._runner.clear()
                self._wake.wait()
                self._drop_cancelled()
            return not self._stopping

    def _drop_cancelled(self) -> None:
        if not self._cancelled:
            return
        cancelled = {id(request) for request in self._cancelled}
        self._waiting = deque(one for one in self._waiting if id(one.request) not in cancelled)
        for sequence in [one for one in self._running if id(one.request) in cancelled]:
            self._remove(sequence)
        for request in self._cancelled:
            request.emit(EngineUnavailable(CANCELLED))
        self._cancelled.clear()

    def _step(self) -> None:
        with self._wake:
            room = min(self._max_batch_size - len(self._running), MAX_PREFILL_BATCH, len(self._waiting))
            new = [self._waiting.popleft() for _ in range(room)]
            first_slot = len(self._running)
            self._running.extend(new)
        if new:
            self._accept(new, self._runner.prefill(new, first_slot))
        if self._running:
            self._accept(list(self._running), self._runner.decode(self._running))
        self._last_progress = time.monotonic()

    def _accept(self, sequences: list[Sequence], logits_BV: Tensor) -> None:
        greedy = logits_BV.argmax(-1).tolist()
        for sequence, logits_V, best in zip(sequences, logits_BV, greedy, strict=True):
            try:
                self._extend(sequence, logits_V, best)
            except Exception as error:  # one request's sampling must not cost its neighbours theirs
                log.exception("sampling failed for one request")
                sequence.request.emit(EngineUnavailable(f"sampling failed ({type(error).__name__}); try again"))
                self._cancel([sequence.request])
        with self._wake:
            for sequence in [one for one in sequences if one.finish_reason]:
                self._remove(sequence)

    def _extend(self, sequence: Sequence, logits_V: Tensor, best: int) -> None:
        sampler = sequence.sampler
        token = best if sampler.is_plain_greedy else sampler.sample(logits_V)
        wanted = sampler.sampling.top_logprobs
        logprobs = None if wanted is None else self._logprobs(logits_V, token, wanted)
        sequence.append(token, logprobs, self._checkpoint.end_tokens)
        if sequence.finish_reason:
            sequence.tally = self._runner.tally(sequence)
        if sequence.request.finished:
            sequence.request.emit(sequence.request.end())

    def _remove(self, sequence: Sequence) -> None:
        """Free a slot by moving the last running sequence into it."""
        slot, last = self._running.index(sequence), len(self._running) - 1
        if slot != last:
            self._runner.move(last, slot)
            self._running[slot] = self._running[last]
        self._running.pop()

    def _logprobs(self, logits_V: Tensor, token: int, top: int) -> SampledToken:
        own, others = top_logprobs(logits_V, token, top)
        return SampledToken(
            chosen=self._token_logprob(token, own), top=tuple(self._token_logprob(*other) for other in others)
        )

    def _token_logprob(self, token: int, logprob: float) -> TokenLogprob:
        utf8 = self._token_bytes(token)
        return TokenLogprob(token_id=token, text=utf8.decode(errors="replace"), utf8=utf8, logprob=logprob)

    def _fail_all(self, message: str) -> None:
        with self._wake:
            requests = {id(one.request): one.request for one in (*self._running, *self._waiting)}
            self._running.clear()
            self._waiting.clear()
        for request in requests.values():
            request.emit(EngineUnavailable(message))
        self._runner.clear()


def _hand_over(loop: asyncio.AbstractEventLoop, events: asyncio.Queue, event: object) -> None:
    """From the engine's thread to the loop that asked; where that has closed, nobody listens any more."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(events.put_nowait, event)
