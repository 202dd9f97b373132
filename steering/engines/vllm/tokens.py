"""Our sampling settings in vLLM's words, and vLLM's logprobs in ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from steering.engines.base import MASKED_LOGPROB, SampledToken, Sampling, TokenLogprob
from steering.engines.sampling import MIN_TEMPERATURE
from steering.engines.text_stream import TokenBytes
from steering.engines.vllm.plugin.wire import WireSteering

if TYPE_CHECKING:
    from vllm import SamplingParams


def sampling_params(
    sampling: Sampling, choice: int, wire: WireSteering | None, end_tokens: frozenset[int]
) -> SamplingParams:
    """One choice is one request of vLLM's. Text and stop strings are ours (`text_stream.py`), on every engine alike."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=0.0 if sampling.temperature < MIN_TEMPERATURE else sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=None if sampling.seed is None else (sampling.seed + choice) % 2**63,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        logprobs=sampling.top_logprobs,
        structured_outputs=_structured_outputs(sampling),
        ignore_eos=sampling.response_format is None,
        stop_token_ids=sorted(end_tokens),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=wire.extra_args() if wire is not None else None,
    )


def _structured_outputs(sampling: Sampling) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    wanted = sampling.response_format
    if wanted is None:
        return None
    if wanted.json_schema is None:
        return StructuredOutputsParams(json_object=True)
    return StructuredOutputsParams(json=wanted.json_schema)


def read_logprobs(position: Any, token: int, top: int | None, token_bytes: TokenBytes) -> SampledToken | None:
    """vLLM's {token id: Logprob} of one position: the sampled token, then the `top` most likely by rank."""
    if top is None:
        return None
    ranked = sorted(position.items(), key=lambda item: item[1].rank)[:top]
    return SampledToken(
        chosen=_token_logprob(token, position[token].logprob, token_bytes),
        top=tuple(_token_logprob(other, value.logprob, token_bytes) for other, value in ranked),
    )


def _token_logprob(token: int, logprob: float, token_bytes: TokenBytes) -> TokenLogprob:
    utf8 = token_bytes(token)
    return TokenLogprob(
        token_id=token, text=utf8.decode(errors="replace"), utf8=utf8, logprob=max(logprob, MASKED_LOGPROB)
    )
