"""The model deployment: one engine, and the conversation turned into its prompt. Torch lives here.

Importing this module loads no torch: the ingress imports it to describe the application. Knows no HTTP.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from service.draining import WorkLock
from service.errors import ApiError, from_steering_error
from service.fair_threads import FairThreads
from service.model.job import ModelJob
from service.settings import Settings, SettingsError
from steering.artifact_config import ArtifactConfig, read_config
from steering.engines.base import Capabilities, Engine, GenerationEnd, GenerationRequest, Health, TextDelta
from steering.errors import SteeringError

if TYPE_CHECKING:
    from service.model.conversation import ChatTokenizer

log = logging.getLogger(__name__)
FINGERPRINTED_BYTES = 1024 * 1024
"""So much of each file of a checkpoint enters its fingerprint: configurations whole, weights by their header."""

PREPARING_THREADS = 2
"""A long text is a second's work that nothing can interrupt: tenants take turns, and no other work waits for them."""

NO_USAGE_REPORTS = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
"""vLLM reads these when it is imported."""


@dataclass(frozen=True, kw_only=True)
class AnswerStart:
    """First event of every answer: which model gives it, and what it was asked."""

    system_fingerprint: str
    prompt_tokens: int
    """Length of the prompt, images included: known though the answer may never end."""


@dataclass(frozen=True, kw_only=True)
class ModelStatus:
    """What the ingress tells about the model."""

    health: Health
    capabilities: Capabilities
    system_fingerprint: str
    checkpoint: str
    """Digest of the model without its artifact."""


def build_engine(settings: Settings) -> Engine:
    """The engine that the settings name; its dependencies are imported here and nowhere else."""
    asked = settings.engine.settled()
    common: dict[str, Any] = {
        "model": settings.model,
        "artifact": settings.loaded_artifact,
        "device": asked.device,
        "dtype": asked.dtype,
        "max_batch_size": asked.max_batch_size,
        "max_context_tokens": asked.max_context_tokens,
    }
    if asked.name == "vllm":
        os.environ.update(NO_USAGE_REPORTS, OMP_NUM_THREADS=str(asked.cpu_threads))  # Ray has set the latter to 1
        from steering.engines.vllm.engine import VllmEngine

        return VllmEngine(
            **common,
            branches=asked.branches,
            cuda_graphs=asked.cuda_graphs,
            cpu_threads=asked.cpu_threads,
            kv_cache_gib=asked.kv_cache_gib,
            gpu_memory_share=asked.gpu_memory_share,
            tensor_parallel_size=asked.tensor_parallel_size,
            compile=asked.compile,
        )
    import torch

    from steering.engines.huggingface.engine import HuggingFaceEngine

    torch.set_num_threads(asked.cpu_threads)
    return HuggingFaceEngine(**common)


class ModelReplica:
    """Serves `generate` as a stream of AnswerStart, TextDeltas and a GenerationEnd."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._at_work = WorkLock(settings.drain_file)
        self._engine = build_engine(settings)
        self._tokenizer: ChatTokenizer | None = None
        self._preparing = FairThreads(PREPARING_THREADS, "prepare")
        self._checkpoint = self._fingerprint = ""
        self._artifact: ArtifactConfig | None = None

    async def start(self) -> None:
        """Load everything; raises BadArtifact with what is wrong."""
        from transformers import AutoProcessor

        from service.model.conversation import ChatTokenizer

        await self._engine.start()
        capabilities = self._engine.capabilities()
        preset = self._settings.default_preset
        if preset and capabilities.artifact and preset not in capabilities.presets:
            raise SettingsError(
                f"--default-preset: the artifact has no {preset!r}; it has {list(capabilities.presets)}"
            )
        self._tokenizer = ChatTokenizer(AutoProcessor.from_pretrained(self._settings.model))
        self._checkpoint = checkpoint_digest(self._settings.model)
        self._fingerprint = system_fingerprint(self._settings, capabilities)
        if capabilities.artifact and self._settings.loaded_artifact:
            self._artifact = read_config(Path(self._settings.loaded_artifact))

    async def generate(self, job: ModelJob) -> AsyncGenerator[AnswerStart | TextDelta | GenerationEnd | ApiError, None]:
        """A refusal is yielded, not raised, and so is a failure: Ray Serve would log what the exception quotes."""
        with self._at_work.held():
            try:
                request, prompt_tokens = await self._preparing.run(job.tenant, self.prepare, job)
                yield AnswerStart(system_fingerprint=self._fingerprint, prompt_tokens=prompt_tokens)
                async with aclosing(self._engine.generate(request)) as events:
                    async for event in events:
                        yield event
            except SteeringError as error:
                yield from_steering_error(error)
            except ApiError as error:
                yield error
            except Exception:
                log.exception("a generation failed in a way nobody foresaw")
                yield ApiError("internal_error", "the server failed on this request")
            finally:
                self._engine.cancel(job.request_id)

    def prepare(self, job: ModelJob) -> tuple[GenerationRequest, int]:
        """Tokenise and bound: the engine's request, and the prompt's length in tokens. Raises ApiError."""
        assert self._tokenizer is not None
        images = tuple(Image.frombytes("RGB", (one.width, one.height), one.rows) for one in job.images)
        token_ids = tuple(self._tokenizer.encode(job.turns))
        self._check_token_ids(job.sampling.logit_bias)
        context = self._engine.capabilities().context_tokens
        prompt = self._engine.count_prompt_tokens(images, token_ids)
        default = self._settings.default_max_tokens
        max_tokens = max_tokens_for(job.max_tokens, prompt, context, default, field=job.max_tokens_field)
        request = GenerationRequest(
            request_id=job.request_id,
            prompt_token_ids=token_ids,
            images=images,
            sampling=replace(job.sampling, max_tokens=max_tokens),
            steering=job.steering,
            tenant=job.tenant,
        )
        return request, prompt

    def _check_token_ids(self, logit_bias: dict[int, float]) -> None:
        assert self._tokenizer is not None
        for token_id in logit_bias:
            if token_id >= self._tokenizer.vocabulary_size:
                last = self._tokenizer.vocabulary_size - 1
                raise ApiError("invalid_value", f"logit_bias: token ids end at {last}", param=f"logit_bias.{token_id}")

    def status(self) -> ModelStatus:
        return ModelStatus(
            health=self._engine.health(),
            capabilities=self._engine.capabilities(),
            system_fingerprint=self._fingerprint,
            checkpoint=self._checkpoint,
        )

    def artifact_config(self) -> ArtifactConfig | None:
        """Of the artifact that is loaded, read on the machine that has it."""
        return self._artifact

    def check_health(self) -> None:
        """Asked by Ray Serve; a replica that raises is replaced."""
        health = self._engine.health()
        if not health.alive:
            raise RuntimeError("the engine's loop has ended")
        if health.seconds_since_progress > self._settings.engine.stall_timeout_s:
            raise RuntimeError(f"the engine has made no step for {health.seconds_since_progress:.0f} s")

    async def stop(self) -> None:
        self._preparing.close()
        await self._engine.stop()


def max_tokens_for(asked: int | None, prompt: int, context: int, default: int, *, field: str = "max_tokens") -> int:
    """How many tokens a choice may have; a prompt or a wish that does not fit is refused with the numbers."""
    left = context - prompt
    if left < 1:
        raise ApiError(
            "context_length_exceeded",
            f"messages: the prompt has {prompt} tokens, images included, and the model's context is {context} tokens; "
            "shorten the conversation",
            param="messages",
        )
    if asked is None:
        return min(default, left)
    if asked > left:
        raise ApiError(
            "context_length_exceeded",
            f"{field}: the prompt has {prompt} tokens, images included, and {field} is {asked}; together they "
            f"exceed the model's context of {context} tokens: ask for at most {left}, or shorten the conversation",
            param=field,
        )
    return asked


def checkpoint_digest(model: str) -> str:
    """Of a checkpoint's folder: sha256 (hex) of names, sizes and beginnings of its files."""
    return _hash_files(model).hexdigest()


def _hash_files(model: str):
    digest = hashlib.sha256()
    for file in sorted(path for path in Path(model).iterdir() if path.is_file()):
        with file.open("rb") as content:
            digest.update(f"{file.name} {file.stat().st_size}".encode() + content.read(FINGERPRINTED_BYTES))
    return digest


def system_fingerprint(settings: Settings, capabilities: Capabilities) -> str:
    """Changes with the checkpoint, the artifact, the engine and the number format: all that can change an answer."""
    digest = _hash_files(settings.model)
    digest.update(f"{capabilities.artifact} {capabilities.engine} {settings.engine.settled().dtype}".encode())
    return "fp_" + digest.hexdigest()[:12]
