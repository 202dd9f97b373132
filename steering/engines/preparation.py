"""From a request to the sequences that will run: tokens expanded, length checked, steering resolved."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from itertools import pairwise

from PIL.Image import Image

from steering.engines.base import GenerationRequest
from steering.engines.checkpoint import Checkpoint
from steering.engines.sampling import Sampler
from steering.engines.sequence import Emit, RunningRequest, Sequence
from steering.engines.text_stream import TextStream
from steering.errors import InvalidSteering
from steering.lvlm.families import find_family, tokens_per_image
from steering.lvlm.token_spans import expand_image_tokens, find_spans
from steering.settings import ResolvedSteering, check_control, check_edits, resolve


def prepare(checkpoint: Checkpoint, request: GenerationRequest, emit: Emit) -> RunningRequest:
    """Everything that can be decided before the first step. Raises InvalidSteering naming the field."""
    tokens = expand_prompt(checkpoint, request.images, request.prompt_token_ids)
    _check_length(len(tokens), request.sampling.max_tokens, checkpoint.context_tokens)
    spans = find_spans(tokens, checkpoint.image_token_id)
    settings = _resolve(checkpoint, request, has_image=spans.has_image)
    running = RunningRequest(
        request_id=request.request_id,
        tenant=request.tenant,
        prompt_length=len(tokens),
        spans=spans,
        settings=settings,
        artifact=checkpoint.artifact.config.fingerprint if checkpoint.artifact else None,
        canary=checkpoint.canary,
        layer=checkpoint.artifact.config.hook_layer if checkpoint.artifact else None,
        emit=emit,
    )
    running.sequences = [
        Sequence(
            request=running,
            choice=choice,
            sampler=Sampler(request.sampling, choice),
            text=TextStream(tokenizer=checkpoint.processor.tokenizer, stop=request.sampling.stop),
            tokens=list(tokens),
        )
        for choice in range(request.sampling.n)
    ]
    return running


def prepare_with_pixels(checkpoint: Checkpoint, request: GenerationRequest, emit: Emit) -> RunningRequest:
    """As `prepare`, for an engine that runs the vision tower itself: images as the image processor makes them."""
    running = prepare(checkpoint, request, emit)
    family = find_family(checkpoint.family)
    if not family.images_may_touch:
        _check_gaps(request.prompt_token_ids, checkpoint.image_token_id)
    if request.images:
        running.image_inputs = family.image_inputs(checkpoint.processor.image_processor, list(request.images))
    return running


def expand_prompt(checkpoint: Checkpoint, images: Rows[Image], token_ids: Rows[int]) -> list[int]:
    """The prompt with as many image tokens as the checkpoint's processor gives each image."""
    return expand_image_tokens(token_ids, checkpoint.image_token_id, tokens_per_image(checkpoint.processor, images))


def _check_gaps(token_ids: Rows[int], image_token_id: int) -> None:
    if (image_token_id, image_token_id) in pairwise(token_ids):
        raise InvalidSteering(
            "two images follow each other with no token between them; the model's chat template puts some there",
            field="messages",
        )


def _check_length(prompt_tokens: int, max_tokens: int, context_tokens: int) -> None:
    if prompt_tokens >= context_tokens:
        raise InvalidSteering(
            f"the prompt has {prompt_tokens} tokens, images included; the model's context is {context_tokens}: "
            "shorten it",
            field="messages",
        )
    if prompt_tokens + max_tokens > context_tokens:
        raise InvalidSteering(
            f"the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}; together they may be at most "
            f"{context_tokens}: ask for at most {context_tokens - prompt_tokens}",
            field="max_tokens",
        )


def _resolve(checkpoint: Checkpoint, request: GenerationRequest, *, has_image: bool) -> ResolvedSteering:
    artifact = checkpoint.artifact
    settings = resolve(
        request.steering,
        presets=artifact.config.presets if artifact else None,
        default_preset=artifact.config.default_preset if artifact else "",
        has_image=has_image,
    )
    check_control(settings, control_images=len(artifact.control_image_MD) if artifact else 0)
    check_edits(settings, concepts=artifact.config.num_concepts if artifact else 0)
    return settings
