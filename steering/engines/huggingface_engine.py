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
from collections.abc import AsyncIterator
from collections.abc import Sequence as Rows
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from steering.artifact import Artifact, load_artifact
from steering.decoder_layers import Decoder, find_decoder
from steering.engines.base import (
    Capabilities,
    GenerationEnd,
    GenerationRequest,
    Health,
    SampledToken,
    TextDelta,
    TokenLogprob,
)
from steering.engines.batch_runner import BatchRunner
from steering.engines.canary import check_canary
from steering.engines.sampling import Sampler, top_logprobs
from steering.engines.sequence import RunningRequest, Sequence
from steering.engines.text_stream import TextStream, TokenBytes
from steering.errors import BadArtifact, EngineUnavailable, InvalidSteering
from steering.hooks import check_fits, output_hook
from steering.intervention import Intervention, SequenceSteering
from steering.realignment import Realignment
from steering.resolution import ResolvedSteering, resolve
from steering.token_spans import expand_image_tokens, find_spans

log = logging.getLogger(__name__)
MAX_PREFILL_BATCH = 8
"""Prompts run together: bounds how long running streams wait for new ones."""


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
        torch.set_float32_matmul_precision("highest")
        try:
            self._processor = AutoProcessor.from_pretrained(self._model_path)
            model = AutoModelForImageTextToText.from_pretrained(
                self._model_path, dtype=getattr(torch, self._dtype, self._dtype), attn_implementation="sdpa"
            )
        except (OSError, ValueError) as error:
            raise BadArtifact(f"no model could be loaded from {self._model_path}: {error}", field="model") from error
        self._model = model.to(self._device).eval()
        self._decoder: Decoder = find_decoder(self._model)
        self.artifact: Artifact | None = None
        intervention, hook_layer = None, len(self._decoder.layers) - 1
        if self._artifact_path is not None:
            self.artifact = self._load_artifact()
            intervention, hook_layer = self._make_intervention(self.artifact), self.artifact.config.hook_layer
            self._hook.enter_context(output_hook(self._decoder.layers[hook_layer], intervention))
        self._runner = BatchRunner(self._model, self._decoder, intervention, hook_layer)
        self._token_bytes = TokenBytes(self._processor.tokenizer)
        self._end_tokens = _end_tokens(self._model)
        limit = self._max_context_tokens or self._decoder.context_tokens
        self._context_tokens = min(limit, self._decoder.context_tokens)

    def _load_artifact(self) -> Artifact:
        artifact = load_artifact(self._artifact_path)
        decoder = self._decoder
        check_fits(artifact, family=decoder.family, hidden_size=decoder.hidden_size, num_layers=len(decoder.layers))
        report = check_canary(artifact, self._model, decoder, self._processor)
        log.info("artifact %s fits the model: canary %s", artifact.config.fingerprint[:12], report)
        return artifact

    def _make_intervention(self, artifact: Artifact) -> Intervention:
        return Intervention(
            Realignment(artifact.auxiliary, artifact.sae).to(self._device),
            min_text_tokens=artifact.config.min_text_tokens,
            control_image_MD=artifact.control_image_MD.to(self._device),
        )

    # -- what callers see ----------------------------------------------------------------------------------------

    @property
    def processor(self):
        """The checkpoint's processor: its tokenizer, image processor and chat template."""
        return self._processor

    def capabilities(self) -> Capabilities:
        config = self.artifact.config if self.artifact else None
        return Capabilities(
            engine="huggingface",
            model_family=self._decoder.family,
            context_tokens=self._context_tokens,
            forms=("published", "difference", "union"),
            modes=("causal", "exact"),
            branches=(1, 2),
            response_format=False,
            artifact=config.fingerprint if config else None,
            presets=tuple(config.presets) if config else (),
            alignment=config.alignment if config else None,
        )

    def health(self) -> Health:
        with self._wake:
            busy = bool(self._running or self._waiting)
            return Health(
                alive=self._thread is not None and self._thread.is_alive() and not self._stopping,
                running=len(self._running),
                waiting=len(self._waiting),
                seconds_since_progress=time.monotonic() - self._last_progress if busy else 0.0,
            )

    def count_prompt_tokens(self, images: Rows, token_ids: Rows[int]) -> int:
        """Length of a prompt with its image tokens expanded."""
        return len(self._expand(images, token_ids))

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TextDelta | GenerationEnd]:
        """See `Engine`. Closing the iterator cancels the request."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[TextDelta | GenerationEnd | Exception] = asyncio.Queue()
        prepared = await asyncio.to_thread(self._prepare, request)
        prepared.emit = lambda event: loop.call_soon_threadsafe(events.put_nowait, event)
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
        """See `Engine`; takes effect before the next step."""
        with self._wake:
            active = [sequence.request for sequence in (*self._running, *self._waiting)]
        self._cancel([one for one in active if one.request_id == request_id])

    def _cancel(self, requests: list[RunningRequest]) -> None:
        with self._wake:
            self._cancelled.extend(requests)
            self._wake.notify()

    # -- from a request to sequences -----------------------------------------------------------------------------

    def _prepare(self, request: GenerationRequest) -> RunningRequest:
        tokens = self._expand(request.images, request.prompt_token_ids)
        self._check_length(len(tokens), request.sampling.max_tokens)
        spans = find_spans(tokens, self._model.config.image_token_id)
        settings = self._resolve(request, has_image=spans.has_image)
        pixels = None
        if request.images:
            pixels = self._processor.image_processor(images=list(request.images), return_tensors="pt")["pixel_values"]
        running = RunningRequest(
            request_id=request.request_id,
            prompt_length=len(tokens),
            spans=spans,
            pixel_values=pixels,
            settings=settings,
            artifact=self.artifact.config.fingerprint if self.artifact else None,
            layer=self.artifact.config.hook_layer if self.artifact else None,
            emit=lambda _event: None,
        )
        running.sequences = [
            Sequence(
                request=running,
                choice=choice,
                sampler=Sampler(request.sampling, choice),
                text=TextStream(tokenizer=self._processor.tokenizer, stop=request.sampling.stop),
                steering=SequenceSteering(settings=settings),
                tokens=list(tokens),
            )
            for choice in range(request.sampling.n)
        ]
        return running

    def _expand(self, images: Rows, token_ids: Rows[int]) -> list[int]:
        sizes = [(image.height, image.width) for image in images]
        counts = self._processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens if sizes else []
        return expand_image_tokens(token_ids, self._model.config.image_token_id, counts)

    def _check_length(self, prompt_tokens: int, max_tokens: int) -> None:
        if prompt_tokens >= self._context_tokens:
            raise InvalidSteering(
                f"the prompt has {prompt_tokens} tokens, images included; the model's context is "
                f"{self._context_tokens}: shorten it",
                field="messages",
            )
        if prompt_tokens + max_tokens > self._context_tokens:
            raise InvalidSteering(
                f"the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}; together they may be at most "
                f"{self._context_tokens}: ask for at most {self._context_tokens - prompt_tokens}",
                field="max_tokens",
            )

    def _resolve(self, request: GenerationRequest, *, has_image: bool) -> ResolvedSteering:
        config = self.artifact.config if self.artifact else None
        settings = resolve(
            request.steering,
            presets=config.presets if config else None,
            default_preset=config.default_preset if config else "",
            has_image=has_image,
        )
        if settings.active and settings.control == "other_image" and not len(self.artifact.control_image_MD):
            raise InvalidSteering("the artifact has no images for control 'other_image'", field="steering.control")
        return settings

    def _submit(self, prepared: RunningRequest) -> None:
        with self._wake:
            if self._thread is None or not self._thread.is_alive() or self._stopping:
                raise EngineUnavailable("the engine is not running; try again later")
            self._waiting.extend(prepared.sequences)
            self._last_progress = time.monotonic() if not self._running else self._last_progress
            self._wake.notify()

    # -- the loop ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _loop(self) -> None:
        while self._wait_for_work():
            try:
                self._step()
            except Exception as error:  # one bad step must not end the service: its requests fail, the loop goes on
                log.exception("a step failed; its requests are lost")
                self._fail_all(
                    EngineUnavailable(f"the engine failed on this batch ({type(error).__name__}); try again")
                )
        self._fail_all(EngineUnavailable("the engine is stopping; try again later"))

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._drop_cancelled()
            while not (self._stopping or self._running or self._waiting):
                self._runner.clear()
                self._wake.wait()
                self._drop_cancelled()
            return not self._stopping

    def _drop_cancelled(self) -> None:
        cancelled = {id(request) for request in self._cancelled}
        self._waiting = deque(one for one in self._waiting if id(one.request) not in cancelled)
        for sequence in [one for one in self._running if id(one.request) in cancelled]:
            self._remove(sequence)
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
            sampler = sequence.sampler
            token = best if sampler.is_plain_greedy else sampler.sample(logits_V)
            wanted = sampler.sampling.top_logprobs
            logprobs = None if wanted is None else self._logprobs(logits_V, token, wanted)
            sequence.append(token, logprobs, self._end_tokens)
        with self._wake:
            for sequence in [one for one in sequences if one.finish_reason]:
                self._remove(sequence)

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

    def _fail_all(self, error: EngineUnavailable) -> None:
        with self._wake:
            requests = {one.request.request_id: one.request for one in (*self._running, *self._waiting)}
            self._running.clear()
            self._waiting.clear()
            self._runner.clear()
        for request in requests.values():
            request.emit(error)


def _end_tokens(model: torch.nn.Module) -> frozenset[int]:
    end = model.generation_config.eos_token_id
    if end is None:
        end = model.config.get_text_config().eos_token_id
    return frozenset([end] if isinstance(end, int) else end or [])
