"""One choice of one request on vLLM: from its prompt to its last token, and what steering did to it."""

from __future__ import annotations

import logging
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from steering.engines.base import GenerationRequest
from steering.engines.checkpoint import Checkpoint
from steering.engines.grammar_trial import bad_schema
from steering.engines.sequence import Sequence
from steering.engines.text_stream import TokenBytes
from steering.engines.vllm.plugin.wire import WireSteering, cache_salt, wire_steering
from steering.engines.vllm.tokens import read_logprobs, sampling_params
from steering.engines.vllm.worker_client import WorkerClient
from steering.errors import EngineUnavailable, InvalidSteering
from steering.explanation import Explanation
from steering.lvlm.token_spans import first_steered_position
from steering.tally import Tally

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

log = logging.getLogger(__name__)
EXPLANATION = TypeAdapter(Explanation)
GRAMMAR_WORDS = ("grammar", "schema", "structured", "regex")
"""One of these is in what vLLM says of a format it cannot follow."""


class ChoiceRunner:
    """Runs choices, each as a request of vLLM's own: vLLM's children of one request would share their parameters."""

    def __init__(self, vllm: AsyncLLM, workers: WorkerClient, checkpoint: Checkpoint, token_bytes: TokenBytes) -> None:
        self._vllm, self._workers, self._checkpoint, self._token_bytes = vllm, workers, checkpoint, token_bytes

    async def run(self, request: GenerationRequest, sequence: Sequence) -> None:
        """To the end; tokens go into the sequence as they come. Raises InvalidSteering, EngineUnavailable."""
        from vllm.exceptions import VLLMValidationError

        settings = sequence.request.settings
        name = f"{request.request_id}-{sequence.choice}"
        try:
            wire = wire_steering(name, settings) if settings.watched else None
            try:
                if not await self._generate(request, sequence, name, wire):
                    # vLLM asks for a second try when it has lost an image that it thought it had
                    await self._generate(request, sequence, f"{name}-again", wire, last_try=True)
            except BaseException:
                if wire is not None:
                    self._workers.forget(name)
                raise
            if wire is not None:
                end = sequence.request.prompt_length + sequence.completion_tokens - 2
                sequence.tally = self._tally(sequence, await self._workers.finish(name, end))
        except (InvalidSteering, EngineUnavailable):
            raise
        except VLLMValidationError as error:
            if request.sampling.response_format is not None and any(word in str(error) for word in GRAMMAR_WORDS):
                raise bad_schema(str(error)) from error
            raise InvalidSteering(f"vLLM refuses the request: {error}", field=error.parameter) from error
        except Exception as error:
            log.exception("vLLM failed on a request")
            raise EngineUnavailable(f"the engine failed on this request ({type(error).__name__}); try again") from error

    async def _generate(
        self,
        request: GenerationRequest,
        sequence: Sequence,
        name: str,
        wire: WireSteering | None,
        *,
        last_try: bool = False,
    ) -> bool:
        """False where vLLM gave up before the first token, and another try may do."""
        prompt = self._prompt(request, sequence, wire)
        parameters = sampling_params(request.sampling, sequence.choice, wire, self._checkpoint.end_tokens)
        async with aclosing(self._vllm.generate(prompt, parameters, name)) as outputs:  # pyright: ignore[reportArgumentType]
            async for output in outputs:
                self._check_expansion(sequence, output.prompt_token_ids)
                part = output.outputs[0]
                if part.finish_reason == "error" and not part.token_ids:
                    break
                all_logprobs: Any = part.logprobs or [None] * len(part.token_ids)
                for token, logprobs in zip(part.token_ids, all_logprobs, strict=True):
                    wanted = read_logprobs(logprobs, token, request.sampling.top_logprobs, self._token_bytes)
                    sequence.append(token, wanted, self._checkpoint.end_tokens)
                    if sequence.finish_reason:
                        return True
                if part.finish_reason == "stop":
                    sequence.end_here()
                    return True
        if sequence.completion_tokens:
            raise EngineUnavailable("vLLM ended the answer early; try again")
        if last_try and request.sampling.response_format is not None:
            raise bad_schema("it cannot be made into a grammar")
        if last_try:
            raise EngineUnavailable("vLLM ended the request before its first token; try again")
        return False

    def _tally(self, sequence: Sequence, told: dict[str, Any] | None) -> Tally:
        """What the worker counted, less what it computed ahead, behind the answer's end."""
        artifact, text_start = self._checkpoint.artifact, sequence.request.spans.text_start
        if told is None or artifact is None or text_start is None:
            return Tally()
        explanation = told["explanation"] and EXPLANATION.validate_python(told["explanation"])
        computed = sequence.request.prompt_length + sequence.completion_tokens - 1
        first = first_steered_position(
            text_start=text_start,
            prompt_length=sequence.request.prompt_length,
            min_text_tokens=artifact.config.min_text_tokens,
            min_answer_tokens=sequence.request.settings.min_answer_tokens,
        )
        if computed <= first:
            return Tally(visited=told["visited"], explanation=explanation)
        return Tally(
            positions=min(told["positions"], computed - first),
            relative_shift=told["relative_shift"],
            visited=told["visited"],
            visited_text=told["visited_text"],
            clamped=told["clamped"],
            explanation=explanation,
        )

    def _prompt(self, request: GenerationRequest, sequence: Sequence, wire: WireSteering | None) -> dict[str, Any]:
        text_start, artifact = sequence.request.spans.text_start, self._checkpoint.artifact
        prompt: dict[str, Any] = {"prompt_token_ids": list(request.prompt_token_ids)}
        if request.images:
            prompt["multi_modal_data"] = {"image": list(request.images)}
        salt = cache_salt(
            wire,
            fingerprint=artifact.config.fingerprint if artifact else None,
            last_image_index=text_start - 1 if text_start is not None else None,
            prompt_length=sequence.request.prompt_length,
            tenant=request.tenant,
        )
        return prompt if salt is None else prompt | {"cache_salt": salt}

    @staticmethod
    def _check_expansion(sequence: Sequence, token_ids: list[int] | None) -> None:
        """Salt and context check rest on vLLM's expanding image tokens as we do."""
        expected = sequence.request.prompt_length
        if token_ids is not None and len(token_ids) != expected:
            raise EngineUnavailable(
                f"vLLM made {len(token_ids)} tokens of a prompt that has {expected} by the checkpoint's processor"
            )
