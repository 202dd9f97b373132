"""A steered LVLM on vLLM: continuous batching, paged and prefix-cached keys, torch.compile; for production.

vLLM's engine core runs in a process of its own; the steering happens in there (`plugin/`). This side prepares
requests, streams text, and asks the worker what was done to each sequence once it has ended.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from steering.engines.base import Capabilities, GenerationEnd, GenerationRequest, Health, TextDelta
from steering.engines.checkpoint import read_checkpoint
from steering.engines.grammar_trial import GrammarTrials
from steering.engines.preparation import expand_prompt, prepare
from steering.engines.sequence import RunningRequest
from steering.engines.text_stream import TokenBytes
from steering.engines.vllm.canary import check_canary
from steering.engines.vllm.choice import ChoiceRunner
from steering.engines.vllm.start import MAX_IMAGES, CudaGraphs, EngineOptions, Progress, start_vllm
from steering.engines.vllm.worker_client import WorkerClient
from steering.errors import EngineUnavailable, InvalidSteering
from steering.settings import ResolvedSteering

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

log = logging.getLogger(__name__)
CANCELLED = "the request was cancelled"


@dataclass(kw_only=True)
class _Running:
    """One request; its choices are vLLM's requests."""

    cancelled: bool = False
    choices: list[asyncio.Task[None]] = field(default_factory=list)

    def cancel(self) -> None:
        self.cancelled = True
        for choice in self.choices:
            choice.cancel()


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
        branches: int | None = None,
        cuda_graphs: CudaGraphs = "full",
        cpu_threads: int = 1,
        kv_cache_gib: float = 1,
        gpu_memory_share: float = 0.9,
        tensor_parallel_size: int = 1,
        compile: bool = False,
        vllm_arguments: dict[str, Any] | None = None,
    ) -> None:
        """`branches` 1 (default on a GPU) builds no second tail and refuses what needs one; 2 serves both kinds.

        `cuda_graphs`, on a GPU: 'full' captures decode steps whole, steering included; 'piecewise' leaves it outside.
        `kv_cache_gib` is memory for keys and values on a CPU, `gpu_memory_share` vLLM's share of a GPU (0..1),
        `compile` whether to compile on a CPU (on a GPU always). `vllm_arguments` are further ones of vLLM's engine.
        """
        self._model_path, self._artifact_path = str(model), artifact
        self._max_context_tokens = max_context_tokens
        self._options = EngineOptions(
            device=device,
            dtype=dtype,
            max_batch_size=max_batch_size,
            branches=branches or (2 if device == "cpu" else 1),
            cuda_graphs=cuda_graphs,
            cpu_threads=cpu_threads,
            kv_cache_gib=kv_cache_gib,
            gpu_memory_share=gpu_memory_share,
            tensor_parallel_size=tensor_parallel_size,
            compile=compile,
            vllm_arguments=vllm_arguments or {},
        )
        self._running: dict[str, _Running] = {}
        self.progress = Progress()
        """What vLLM last said of itself."""
        self._vllm: AsyncLLM | None = None
        self._workers: WorkerClient | None = None

    # -- life cycle ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load model and artifact, check the canary through vLLM. Raises BadArtifact, EngineUnavailable."""
        self._checkpoint = await asyncio.to_thread(
            read_checkpoint, self._model_path, self._artifact_path, self._max_context_tokens
        )
        starting = asyncio.ensure_future(asyncio.to_thread(start_vllm, self._checkpoint, self._options, self.progress))
        try:
            self._vllm = vllm = await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(_shut_down)
            raise
        self._workers = WorkerClient(vllm)
        known = self._checkpoint
        self._trials = GrammarTrials(known.processor.tokenizer, known.vocabulary_size, known.end_tokens)
        self._runner = ChoiceRunner(
            vllm, self._workers, self._checkpoint, TokenBytes(self._checkpoint.processor.tokenizer)
        )
        if self._checkpoint.artifact is not None:
            try:
                report = await check_canary(vllm, self._workers, self._checkpoint, self._options.dtype)
            except BaseException:
                await self.stop()
                raise
            log.info("artifact %s fits the model: canary %s", self._checkpoint.artifact.config.fingerprint[:12], report)

    async def stop(self) -> None:
        """End vLLM's processes; what still runs fails with EngineUnavailable."""
        vllm, self._vllm = self._vllm, None
        if vllm is None:
            return
        if self._workers is not None:
            self._workers.close()
            self._trials.close()
        for running in self._running.values():
            running.cancel()
        await asyncio.to_thread(vllm.shutdown)

    async def detach_hook(self) -> None:
        """Take steering off the model and what it has cached; receipts then say `hook_detached`."""
        assert self._workers is not None
        await self._workers.ask("detach_steering")
        await self.vllm.reset_prefix_cache()

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
        branches = (1, 2) if self._options.branches == 2 else (1,)
        return self._checkpoint.capabilities("vllm", modes=("causal",), branches=branches, response_format=True)

    def health(self) -> Health:
        vllm = self._vllm
        if vllm is None or vllm.errored:
            return Health(alive=False, running=0, waiting=0, seconds_since_progress=0.0)
        busy = vllm.get_num_unfinished_requests() > 0
        return Health(
            alive=True,
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
            self._running[request_id].cancel()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TextDelta | GenerationEnd, None]:
        """See `Engine`. Closing the iterator cancels the request."""
        vllm = self.vllm
        if request.request_id in self._running:
            raise InvalidSteering(
                f"request_id {request.request_id!r} is running already; use another one", field="request_id"
            )
        running = self._running[request.request_id] = _Running()
        events: asyncio.Queue[TextDelta | GenerationEnd | Exception | None] = asyncio.Queue()
        report: asyncio.Task[None] | None = None
        try:
            await self._trials.check(request.sampling.response_format)
            prepared = await asyncio.to_thread(prepare, self._checkpoint, request, events.put_nowait)
            self._check(request, prepared)
            if running.cancelled:
                raise EngineUnavailable(CANCELLED)
            if not vllm.get_num_unfinished_requests():
                self.progress.latest = time.monotonic()
            running.choices = [asyncio.create_task(self._runner.run(request, one)) for one in prepared.sequences]
            report = asyncio.create_task(_report(running.choices, events))
            while (event := await events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
            yield prepared.end()
        finally:
            running.cancel()
            await asyncio.gather(*running.choices, *([report] if report else []), return_exceptions=True)
            self._running.pop(request.request_id, None)

    def _check(self, request: GenerationRequest, prepared: RunningRequest) -> None:
        """Refuse what this engine cannot do, or, where only the server's default asks for it, leave it out and say so.

        Raises InvalidSteering, naming the field.
        """
        settings = prepared.settings
        if len(request.images) > MAX_IMAGES:
            raise InvalidSteering(f"{len(request.images)} images; at most {MAX_IMAGES} are taken", field="messages")
        if not settings.active:
            return
        field, message = None, ""
        if settings.mode != "causal":
            field, message = "mode", f"mode {settings.mode!r} is not supported by this engine; use 'causal'"
        elif settings.branches > self._options.branches:
            field = "gamma" if settings.gamma != 1 else "plausibility"
            message = f"this engine was started with one branch and {field} needs a second; use gamma 1, plausibility 0"
        if field is None:
            return
        if request.steering.explicit or request.steering.caller_fields & {field, "preset"}:
            raise InvalidSteering(message, field=f"steering.{field}")
        prepared.settings = ResolvedSteering(reason="unsupported", arm=settings.arm, explain=settings.explain)


async def _report(choices: list[asyncio.Task[None]], events: asyncio.Queue) -> None:
    """The end of all choices, or the first failure, as an event."""
    done, _ = await asyncio.wait(choices, return_when=asyncio.FIRST_EXCEPTION)
    for choice in done:
        if choice.cancelled():
            events.put_nowait(EngineUnavailable(CANCELLED))
            return
        if (error := choice.exception()) is not None:
            events.put_nowait(error)
            return
    events.put_nowait(None)


def _shut_down(starting: asyncio.Future[AsyncLLM]) -> None:
    """Nobody waits for this engine any more."""
    if not starting.cancelled() and starting.exception() is None:
        starting.result().shutdown()
