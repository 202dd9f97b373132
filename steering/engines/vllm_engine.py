"""A steered LVLM on vLLM: continuous batching, paged and prefix-cached keys, torch.compile; for production.

vLLM's engine core runs in a process of its own; the steering happens in there (`vllm_plugin/`). This side prepares
requests, streams text, and asks the worker what was done to each sequence once it has ended.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from collections.abc import Sequence as Rows
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from steering.engines.base import (
    Capabilities,
    GenerationEnd,
    GenerationRequest,
    Health,
    TextDelta,
)
from steering.engines.checkpoint import read_checkpoint
from steering.engines.preparation import expand_prompt, prepare
from steering.engines.sequence import RunningRequest, Sequence
from steering.engines.text_stream import TokenBytes
from steering.engines.vllm_canary import check_canary
from steering.engines.vllm_plugin.wire import WireSteering, cache_salt, wire_steering
from steering.engines.vllm_start import EngineOptions, Progress, start_vllm
from steering.engines.vllm_tokens import read_logprobs, sampling_params
from steering.errors import EngineUnavailable, InvalidSteering

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

log = logging.getLogger(__name__)
CANCELLED = "the request was cancelled"


class VllmEngine:
    """See `Engine` in base.py. Belongs to the event loop that started it."""

    def __init__(
        self,
        model: str | Path,
        artifact: str | Path | None,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        max_batch_size: int = 16,
        max_context_tokens: int | None = None,
        branches: int = 2,
        cpu_threads: int = 1,
        kv_cache_gib: float = 1,
        gpu_memory_share: float = 0.9,
        tensor_parallel_size: int = 1,
        compile: bool = False,
        vllm_arguments: dict[str, Any] | None = None,
    ) -> None:
        """`branches` 1 builds no second tail and refuses requests that need one; 2 serves both kinds.

        `kv_cache_gib` is memory for keys and values on a CPU, `gpu_memory_share` vLLM's share of a GPU (0..1),
        `compile` whether to compile on a CPU (on a GPU always). `vllm_arguments` are further ones of vLLM's engine.
        """
        self._model_path, self._artifact_path = str(model), artifact
        self._max_context_tokens = max_context_tokens
        self._options = EngineOptions(
            device=device,
            dtype=dtype,
            max_batch_size=max_batch_size,
            branches=branches,
            cpu_threads=cpu_threads,
            kv_cache_gib=kv_cache_gib,
            gpu_memory_share=gpu_memory_share,
            tensor_parallel_size=tensor_parallel_size,
            compile=compile,
            vllm_arguments=vllm_arguments or {},
        )
        self._running: dict[str, asyncio.Event] = {}
        """By request id: set when the request is cancelled."""
        self.progress = Progress()
        """What vLLM last said of itself."""
        self._vllm: AsyncLLM | None = None

    # -- life cycle ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load model and artifact, check the canary through vLLM. Raises BadArtifact, EngineUnavailable."""
        self._checkpoint = await asyncio.to_thread(
            read_checkpoint, self._model_path, self._artifact_path, self._max_context_tokens
        )
        self._vllm = await asyncio.to_thread(start_vllm, self._checkpoint, self._options, self.progress)
        self._token_bytes = TokenBytes(self._checkpoint.processor.tokenizer)
        if self._checkpoint.artifact is not None:
            try:
                report = await check_canary(self._vllm, self._checkpoint, self._options.dtype)
            except BaseException:
                await self.stop()
                raise
            log.info("artifact %s fits the model: canary %s", self._checkpoint.artifact.config.fingerprint[:12], report)

    async def stop(self) -> None:
        """End vLLM's processes; what still runs fails with EngineUnavailable."""
        vllm, self._vllm = self._vllm, None
        if vllm is not None:
            for cancelled in self._running.values():
                cancelled.set()
            await asyncio.to_thread(vllm.shutdown)

    async def detach_hook(self) -> None:
        """Take steering off the model; receipts then say `hook_detached`."""
        await self.vllm.collective_rpc("detach_steering")

    @property
    def vllm(self) -> AsyncLLM:
        """vLLM itself. Raises EngineUnavailable while it does not run."""
        if self._vllm is None or self._vllm.errored:
            raise EngineUnavailable("the engine is not running; try again later")
        return self._vllm

    # -- what callers see ----------------------------------------------------------------------------------------

    @property
    def processor(self):
        """The checkpoint's processor: its tokenizer, image processor and chat template."""
        return self._checkpoint.processor

    def capabilities(self) -> Capabilities:
        checkpoint = self._checkpoint
        config = checkpoint.artifact.config if checkpoint.artifact else None
        return Capabilities(
            engine="vllm",
            model_family=checkpoint.family,
            context_tokens=checkpoint.context_tokens,
            forms=("published", "difference", "union"),
            modes=("causal",),
            branches=(1, 2) if self._options.branches == 2 else (1,),
            response_format=True,
            artifact=config.fingerprint if config else None,
            presets=tuple(config.presets) if config else (),
            alignment=config.alignment if config else None,
        )

    def health(self) -> Health:
        busy = bool(self._running)
        return Health(
            alive=self._vllm is not None and not self._vllm.errored,
            running=self.progress.running if busy else 0,
            waiting=self.progress.waiting if busy else 0,
            seconds_since_progress=time.monotonic() - self.progress.latest if busy else 0.0,
        )

    def count_prompt_tokens(self, images: Rows[Image], token_ids: Rows[int]) -> int:
        """Length of a prompt with its image tokens expanded."""
        return len(expand_prompt(self._checkpoint, images, token_ids))

    def cancel(self, request_id: str) -> None:
        """See `Engine`. Who still iterates `generate` gets EngineUnavailable."""
        if request_id in self._running:
            self._running[request_id].set()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TextDelta | GenerationEnd]:
        """See `Engine`. Closing the iterator cancels the request."""
        vllm = self.vllm
        if not self._running:
            self.progress.latest = time.monotonic()
        cancelled = self._running[request.request_id] = asyncio.Event()
        events: asyncio.Queue[TextDelta | GenerationEnd | Exception | None] = asyncio.Queue()
        tasks: list[asyncio.Task] = []
        try:
            prepared = await asyncio.to_thread(prepare, self._checkpoint, request, events.put_nowait)
            self._check(prepared)
            choices = asyncio.gather(*(self._run(vllm, request, one) for one in prepared.sequences))
            tasks = [asyncio.create_task(_report(choices, events)), asyncio.create_task(_watch(cancelled, events))]
            while (event := await events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
            yield prepared.end()
        finally:
            self._running.pop(request.request_id, None)
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.gather(*tasks, return_exceptions=True)

    def _check(self, prepared: RunningRequest) -> None:
        settings = prepared.settings
        if settings.active and settings.mode != "causal":
            raise InvalidSteering(
                f"mode {settings.mode!r} is not supported by this engine; use 'causal'", field="steering.mode"
            )
        if settings.active and settings.branches > self._options.branches:
            field = "steering.gamma" if settings.gamma != 1 else "steering.plausibility"
            raise InvalidSteering(
                f"this engine was started with one branch: {field} needs a second one; use gamma 1 and plausibility 0",
                field=field,
            )

    # -- one choice ------------------------------------------------------------------------------------------------

    async def _run(self, vllm: AsyncLLM, request: GenerationRequest, sequence: Sequence) -> None:
        """Generate one choice to its end, and learn what steering did to it."""
        settings = sequence.request.settings
        sequence_id = f"{request.request_id}-{sequence.choice}"
        wire = wire_steering(sequence_id, settings) if settings.active else None
        try:
            try:
                await self._generate(vllm, request, sequence, sequence_id, wire)
            finally:
                if wire is not None and not vllm.errored:
                    (told,) = (await asyncio.shield(vllm.collective_rpc("finish_steering", args=([sequence_id],))))[0]
                    _take_over(sequence, told)
        except Exception as error:
            raise _as_steering_error(error, request) from error

    async def _generate(
        self, vllm: AsyncLLM, request: GenerationRequest, sequence: Sequence, name: str, wire: WireSteering | None
    ) -> None:
        text_start, artifact = sequence.request.spans.text_start, self._checkpoint.artifact
        prompt: dict[str, Any] = {"prompt_token_ids": list(request.prompt_token_ids)}
        if request.images:
            prompt["multi_modal_data"] = {"image": list(request.images)}
        salt = cache_salt(
            wire,
            fingerprint=artifact.config.fingerprint if artifact else None,
            last_image_index=text_start - 1 if text_start is not None else None,
            tenant=request.tenant,
        )
        if salt is not None:
            prompt["cache_salt"] = salt
        parameters = sampling_params(request.sampling, sequence.choice, wire)
        async with aclosing(vllm.generate(prompt, parameters, name)) as outputs:  # pyright: ignore[reportArgumentType]
            async for output in outputs:
                part = output.outputs[0]
                all_logprobs: Rows[Any] = part.logprobs or [None] * len(part.token_ids)
                for token, logprobs in zip(part.token_ids, all_logprobs, strict=True):
                    wanted = read_logprobs(logprobs, token, request.sampling.top_logprobs, self._token_bytes)
                    sequence.append(token, wanted, self._checkpoint.end_tokens)
                    if sequence.finish_reason:
                        return
        if request.sampling.response_format is not None and not sequence.completion_tokens:
            raise _bad_format("it cannot be made into a grammar")
        raise EngineUnavailable("vLLM ended the answer early; try again")


async def _report(choices: asyncio.Future, events: asyncio.Queue) -> None:
    """The end of all choices, or the first failure, as an event."""
    try:
        await choices
    except Exception as error:
        events.put_nowait(error)
    else:
        events.put_nowait(None)


async def _watch(cancelled: asyncio.Event, events: asyncio.Queue) -> None:
    await cancelled.wait()
    events.put_nowait(EngineUnavailable(CANCELLED))


def _take_over(sequence: Sequence, told: dict[str, Any] | None) -> None:
    """What the worker counted, into the state from which the receipt is made."""
    if told is None:
        return
    state = sequence.steering
    state.positions, state.shift_sum = told["positions"], told["shift_sum"]
    state.visited, state.visited_text = told["visited"], told["visited_text"]


def _as_steering_error(error: Exception, request: GenerationRequest) -> Exception:
    from vllm.exceptions import VLLMValidationError

    if isinstance(error, (InvalidSteering, EngineUnavailable)):
        return error
    if isinstance(error, VLLMValidationError) and request.sampling.response_format is not None:
        return _bad_format(str(error))
    log.error("vLLM failed on a request", exc_info=error)
    return EngineUnavailable(f"the engine failed on this request ({type(error).__name__}); try again")


def _bad_format(why: str) -> InvalidSteering:
    field = "response_format.json_schema.schema"
    return InvalidSteering(f"{field}: vLLM cannot follow this schema: {why}", field=field)
