"""A steered LVLM on Hugging Face transformers: any device, no extra install; its numbers define 'correct'.

Concurrent requests share decode steps on one thread (`generation_loop.py`); each request's events travel back to the
event loop that asked. What happens in a step is `batch_runner.py`; what happens at the hook, `intervention.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Rows
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL.Image import Image

from steering.engines.base import Capabilities, GenerationEnd, GenerationRequest, Health, TextDelta
from steering.engines.grammar_trial import GrammarTrials
from steering.engines.huggingface.batch_runner import BatchRunner
from steering.engines.huggingface.generation_loop import CANCELLED, GenerationLoop
from steering.engines.huggingface.grammar import Grammars
from steering.engines.huggingface.loaded_model import load_model
from steering.engines.preparation import expand_prompt, prepare_with_pixels
from steering.engines.sequence import Emit, RunningRequest
from steering.engines.text_stream import TokenBytes
from steering.errors import EngineUnavailable, InvalidSteering
from steering.hooks import output_hook
from steering.intervention import Intervention


@dataclass(kw_only=True)
class _Asked:
    """One request from the call of `generate` to its end."""

    prepared: RunningRequest | None = None
    """None while its images and tokens are being prepared."""
    cancelled: bool = False


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
        self._asked: dict[str, _Asked] = {}
        self._loop: GenerationLoop | None = None

    # -- life cycle ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load model and artifact, check the canary, attach the hook, start the loop. Raises BadArtifact."""
        await asyncio.to_thread(self._load)
        self._loop = GenerationLoop(
            self._runner,
            TokenBytes(self._checkpoint.processor.tokenizer),
            self._checkpoint.end_tokens,
            self._max_batch_size,
        )
        self._loop.start()

    async def stop(self) -> None:
        """End the loop and detach the hook; what still runs fails with EngineUnavailable."""
        if self._loop is not None:
            await asyncio.to_thread(self._loop.stop)
            self._trials.close()
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
        known = self._checkpoint
        vocabulary = known.processor.tokenizer, known.vocabulary_size, known.end_tokens
        self._trials, self._grammars = GrammarTrials(*vocabulary), Grammars(*vocabulary)
        self._runner = BatchRunner(loaded.model, loaded.decoder, intervention, hook_layer)

    # -- what callers see ----------------------------------------------------------------------------------------

    @property
    def processor(self):
        """The checkpoint's processor: its tokenizer, image processor and chat template."""
        return self._checkpoint.processor

    def capabilities(self) -> Capabilities:
        return self._checkpoint.capabilities(
            "huggingface", modes=("causal", "exact"), branches=(1, 2), response_format=True
        )

    def health(self) -> Health:
        if self._loop is None:
            return Health(alive=False, running=0, waiting=0, seconds_since_progress=0.0)
        return self._loop.health()

    def count_prompt_tokens(self, images: Rows[Image], token_ids: Rows[int]) -> int:
        """Length of a prompt with its image tokens expanded."""
        return len(expand_prompt(self._checkpoint, images, token_ids))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TextDelta | GenerationEnd, None]:
        """See `Engine`. Closing the iterator cancels the request."""
        if self._loop is None:
            raise EngineUnavailable("the engine has not been started; try again later")
        asked = _Asked()
        if self._asked.setdefault(request.request_id, asked) is not asked:
            raise InvalidSteering(
                f"request_id {request.request_id!r} is running already; use another one", field="request_id"
            )
        events: asyncio.Queue[TextDelta | GenerationEnd | Exception] = asyncio.Queue()
        emit = partial(_hand_over, asyncio.get_running_loop(), events)
        try:
            await self._trials.check(request.sampling.response_format)
            asked.prepared = await asyncio.to_thread(self._prepare, request, emit)
            if asked.cancelled:
                raise EngineUnavailable(CANCELLED)
            self._loop.submit(asked.prepared)
            while not isinstance(event := await events.get(), GenerationEnd):
                if isinstance(event, Exception):
                    raise event
                yield event
            yield event
        finally:
            del self._asked[request.request_id]
            if asked.prepared is not None:
                self._loop.cancel(asked.prepared)

    def _prepare(self, request: GenerationRequest, emit: Emit) -> RunningRequest:
        prepared = prepare_with_pixels(self._checkpoint, request, emit)
        if request.sampling.response_format is not None:
            for sequence in prepared.sequences:
                sequence.grammar = self._grammars.begin(request.sampling.response_format)
        return prepared

    def cancel(self, request_id: str) -> None:
        """See `Engine`; takes effect before the next step. Who still iterates `generate` gets EngineUnavailable."""
        asked = self._asked.get(request_id)
        if asked is None:
            return
        asked.cancelled = True
        if asked.prepared is not None:
            assert self._loop is not None, "requests are taken by a loop only"
            self._loop.cancel(asked.prepared)


def _hand_over(loop: asyncio.AbstractEventLoop, events: asyncio.Queue, event: object) -> None:
    """From the engine's thread to the loop that asked; where that has closed, nobody listens any more."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(events.put_nowait, event)
