"""The thread that runs prefills and decode steps, and who shares them. Knows the model only through `BatchRunner`.

Requests come in and events go out; a failure costs the requests that it belongs to, and nobody else.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence as Rows
from typing import NamedTuple

import torch
from torch import Tensor

from steering.engines.base import Health, SampledToken, TokenLogprob
from steering.engines.huggingface.batch_runner import BatchRunner
from steering.engines.sampling import top_logprobs
from steering.engines.sequence import RunningRequest, Sequence
from steering.engines.text_stream import TokenBytes
from steering.errors import EngineUnavailable, InvalidSteering

log = logging.getLogger(__name__)
MAX_PREFILL_BATCH = 8
"""Prompts run together: bounds how long running streams wait for new ones."""
MAX_FAILURES = 3
"""So many failed steps in a row, and `health` calls the engine dead: another process may fare better."""
CANCELLED = "the request was cancelled"


class PrefillFailure(NamedTuple):
    """Why prompts could not be run. The error itself would keep all its tensors in memory."""

    message: str
    """For the request at fault."""
    out_of_memory: bool


class GenerationLoop:
    """All running sequences of an engine; sequence i of the running ones has slot i of the runner's caches."""

    def __init__(
        self, runner: BatchRunner, token_bytes: TokenBytes, end_tokens: frozenset[int], max_batch_size: int
    ) -> None:
        self._runner, self._token_bytes, self._end_tokens = runner, token_bytes, end_tokens
        self._max_batch_size = max_batch_size
        self._wake = threading.Condition()
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._cancelled: list[RunningRequest] = []
        self._failures = 0
        """Steps in which nothing ran, since one last did."""
        self._stopping = False
        self._last_progress = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="huggingface-engine", daemon=True)

    # -- what the engine calls -----------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns once the thread has ended; what still runs fails with EngineUnavailable."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def health(self) -> Health:
        with self._wake:
            busy = bool(self._running or self._waiting)
            return Health(
                alive=self._is_serving() and self._failures < MAX_FAILURES,
                running=len(self._running),
                waiting=len(self._waiting),
                seconds_since_progress=time.monotonic() - self._last_progress if busy else 0.0,
            )

    def submit(self, prepared: RunningRequest) -> None:
        """Its events follow. Raises EngineUnavailable where nobody would make them."""
        with self._wake:
            if not self._is_serving():
                raise EngineUnavailable("the engine is not running; try again later")
            self._waiting.extend(prepared.sequences)
            self._last_progress = time.monotonic() if not self._running else self._last_progress
            self._wake.notify()

    def cancel(self, request: RunningRequest) -> None:
        """Takes effect before the next step."""
        with self._wake:
            self._cancelled.append(request)
            self._wake.notify()

    def _is_serving(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    # -- what the thread does ------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while self._wait_for_work():
                try:
                    self._step()
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
        self._drop(self._cancelled)
        for request in self._cancelled:
            request.emit(EngineUnavailable(CANCELLED))
        self._cancelled.clear()

    def _drop(self, requests: Rows[RunningRequest]) -> None:
        """All choices of these requests go, wherever they are."""
        dropped = {id(request) for request in requests}
        self._waiting = deque(one for one in self._waiting if id(one.request) not in dropped)
        for sequence in [one for one in self._running if id(one.request) in dropped]:
            self._remove(sequence)

    def _step(self) -> None:
        """New prompts, then a token for everybody.

        A step counts as failed where nothing ran in it. A prompt that does not fit into memory never counts: a fresh
        engine would have no room for it either, and who sends it must not end the engine for others.
        """
        with self._wake:
            room = min(self._max_batch_size - len(self._running), MAX_PREFILL_BATCH, len(self._waiting))
            new = [self._waiting.popleft() for _ in range(room)]
            self._running.extend(new)
        failures = self._prefill(new) if new else {}
        ran = bool(self._running) or len(failures) < len({one.request for one in new})
        if not ran and not all(failure.out_of_memory for failure in failures.values()):
            self._failures += 1
        for request, failure in failures.items():
            request.emit(EngineUnavailable(failure.message))
        if self._running:
            self._accept(list(self._running), self._runner.decode(self._running))
        if ran:
            self._failures = 0
        self._last_progress = time.monotonic()

    def _prefill(self, new: list[Sequence]) -> dict[RunningRequest, PrefillFailure]:
        """Prompts together, and where that fails each alone; requests whose prompts cannot be run are dropped."""
        failures: dict[RunningRequest, PrefillFailure] = {}
        failure = self._try_prefill(new)
        for sequence in new if failure is not None else []:
            if sequence.request in failures:
                continue
            if len(new) > 1:
                failure = self._try_prefill([sequence])
            if failure is not None:
                failures[sequence.request] = failure
                with self._wake:
                    self._drop([sequence.request])
        return failures

    def _try_prefill(self, new: list[Sequence]) -> PrefillFailure | None:
        """Why these prompts could not be run in their slots; then all is as it was before."""
        try:
            logits_BV = self._runner.prefill(new, self._running.index(new[0]))
        except Exception as error:
            log.exception("%d prompts could not be run", len(new))
            failure = _prefill_failure(error)
        else:
            self._accept(new, logits_BV)
            return None
        for sequence in new:
            sequence.steering = None  # the next try makes a new one
        filled = [slot for slot, sequence in enumerate(self._running) if sequence.completion_tokens]
        longest = max((len(self._running[slot].tokens) for slot in filled), default=0)
        try:
            self._runner.shrink(slots=max(filled, default=-1) + 1, tokens=longest)
        except torch.OutOfMemoryError:
            log.warning("no memory to make the caches smaller: they stay as large as they are")
        return failure

    def _accept(self, sequences: list[Sequence], logits_BV: Tensor) -> None:
        greedy = logits_BV.argmax(-1).tolist()
        for sequence, logits_V, best in zip(sequences, logits_BV, greedy, strict=True):
            try:
                self._extend(sequence, logits_V, best)
            except InvalidSteering as error:
                sequence.request.emit(error)
                self.cancel(sequence.request)
            except Exception as error:  # one request's sampling must not cost its neighbours theirs
                log.exception("sampling failed for one request")
                sequence.request.emit(EngineUnavailable(f"sampling failed ({type(error).__name__}); try again"))
                self.cancel(sequence.request)
        with self._wake:
            for sequence in [one for one in sequences if one.finish_reason]:
                self._remove(sequence)

    def _extend(self, sequence: Sequence, logits_V: Tensor, best: int) -> None:
        sampler, grammar = sequence.sampler, sequence.grammar
        if grammar is not None:
            logits_V = grammar.mask(logits_V)
            best = int(logits_V.argmax())
        token = best if sampler.is_plain_greedy else sampler.sample(logits_V)
        wanted = sampler.sampling.top_logprobs
        logprobs = None if wanted is None else self._logprobs(logits_V, token, wanted)
        if grammar is not None:
            grammar.advance(token)
        sequence.append(token, logprobs, self._end_tokens)
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
        sequence.steering = None  # whoever still holds the request must not hold its place in the tables

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
            for sequence in self._running:
                sequence.steering = None
            self._running.clear()
            self._waiting.clear()
        self._runner.clear()
        for request in requests.values():
            request.emit(EngineUnavailable(message))


def _prefill_failure(error: Exception) -> PrefillFailure:
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
        message = "the prompt does not fit into the memory left; shorten it, send fewer images or try again later"
        return PrefillFailure(message=message, out_of_memory=True)
    message = f"the engine failed on this prompt ({type(error).__name__}); try again, or with another prompt"
    return PrefillFailure(message=message, out_of_memory=False)
