"""What every engine takes and gives: the protocol and its plain data. No torch, no HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from PIL.Image import Image

from steering.explanation import Explanation, Mismatch
from steering.request import ConceptEdit, RequestedSteering

FinishReason = Literal["stop", "length"]
MASKED_LOGPROB = -9999.0
"""Logprob reported for a token that the plausibility mask has dropped."""
IMPLAUSIBLE = 1e5
"""Taken off an implausible token's logit. Its probability is then 0 in float32, yet a grammar that allows only
implausible tokens still has one to choose, which with -inf it had not."""


@dataclass(frozen=True, kw_only=True)
class ResponseFormat:
    """Structured output: the text is one JSON value."""

    json_schema: str | None = None
    """The JSON schema it follows, as JSON text; None: any JSON object."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. Ranges are checked by the service; engines rely on them."""

    max_tokens: int
    """Upper bound on generated tokens per choice; at least 1."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus mass in (0, 1]."""
    top_k: int = 0
    """Number of most likely tokens kept; 0 keeps all."""
    seed: int | None = None
    """Choice i draws from a generator seeded with seed + i; None draws a fresh seed."""
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these strings; they are not part of the text."""
    n: int = 1
    """Number of choices."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token generated so far."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once per time it was generated."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Token id to a bias added to its logit."""
    top_logprobs: int | None = None
    """None: no logprobs. 0 or more: the sampled token's logprob and that many most likely ones."""
    response_format: ResponseFormat | None = None
    """None: free text."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One request as an engine sees it."""

    request_id: str
    """Unique among running requests; names it to `cancel`."""
    prompt_token_ids: tuple[int, ...]
    """The prompt, with ONE image token per image; the engine expands each to the image's number of tokens."""
    images: tuple[Image, ...]
    """RGB images, in the order of their tokens."""
    sampling: Sampling
    steering: RequestedSteering
    tenant: str = ""
    """Requests of different tenants share no cached prompt: how long an answer took must not tell of a neighbour's."""


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability, before temperature."""

    token_id: int
    text: str
    """The token as text; a replacement character stands where it is only part of a character."""
    utf8: bytes
    """The token's exact bytes."""
    logprob: float


@dataclass(frozen=True, kw_only=True)
class SampledToken:
    """The logprobs of one generated token: itself, then the most likely alternatives."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """New text of one choice. Never ends inside a UTF-8 character or inside a possible stop string."""

    choice: int
    text: str
    """May be empty while bytes or a possible stop string are held back."""
    token_ids: tuple[int, ...]
    """Tokens generated since the last delta of this choice (end-of-sequence token not among them)."""
    logprobs: tuple[SampledToken, ...] = ()
    """One per token in `token_ids` when `top_logprobs` was set."""
    finish_reason: FinishReason | None = None
    """Set on the last delta of a choice."""


CanaryKind = Literal["verified", "synthetic"]


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What steering did to one request, counted where it happened (design, section 6)."""

    applied: bool
    """True only if a delta was added to at least one position."""
    reason: str | None
    """Why not, where `applied` is false: one of `steering.settings.Reason`."""
    artifact: str | None
    """Fingerprint of the artifact."""
    canary: CanaryKind | None
    """Whether the model is known to be the artifact's: `verified` at start; `synthetic` where weights were imported and
    there was nothing to compare with."""
    layer: int | None
    """Hook layer, zero-based."""
    preset: str | None
    form: str | None
    mode: str | None
    branches: int | None
    """1: steered in place. 2: base and steered branch blended."""
    strength: float | None
    alpha: float | None
    beta_up: float | None
    beta_down: float | None
    gamma: float | None
    plausibility: float | None
    min_answer_tokens: int | None
    """None: the artifact's `min_text_tokens` alone said where steering begins."""
    control: str | None
    """The experimental control in place of the realignment, or None."""
    positions: list[int]
    """By choice: positions to which a delta was added (in 'exact', at the last step).

    Counted where it happens, with those that came steered out of a prefix cache.
    """
    relative_shift: list[float]
    """By choice: mean of |delta| / |hidden state| over the positions steered for it; 0 where there are none."""
    arm: str | None
    max_shift: float | None = None
    """Most that |delta| / |hidden state| could be; None: unbounded."""
    edits: dict[str, ConceptEdit] | None = None
    """By the concept's id; None: there were none."""
    clamped_positions: list[int] = field(default_factory=list)
    """By choice: positions whose delta was shortened to `max_shift`; those out of a prefix cache do not count."""
    mismatch: list[Mismatch | None] | None = None
    """By choice, at its end; None where nobody looked: the request was neither steered nor explained. On vLLM, where an
    answer is not explained and a stop string ended it, a few positions later."""
    explanation: list[Explanation | None] | None = None
    """By choice; None where it was not asked for."""


@dataclass(frozen=True, kw_only=True)
class GenerationEnd:
    """The last event of a generation."""

    prompt_tokens: int
    """Prompt length with every image token counted."""
    completion_tokens: list[int]
    """By choice; the end-of-sequence token counts, as the model generated it."""
    receipt: Receipt


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What an engine can do with the model and artifact it has loaded."""

    engine: str
    model_family: str
    context_tokens: int
    """Most tokens of prompt and answer together."""
    forms: tuple[str, ...]
    modes: tuple[str, ...]
    branches: tuple[int, ...]
    response_format: bool
    """Whether `Sampling.response_format` is supported."""
    artifact: str | None
    """Fingerprint, or None when no artifact is loaded."""
    presets: tuple[str, ...]
    alignment: dict[str, float] | None
    """How far image and text agree in the artifact's held-out pairs, for the start-up report."""
    faithfulness: dict[str, float] | None
    """What its autoencoders lose while text is generated; empty where that was not measured."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """A look at the engine's progress; cheap enough to ask for every second."""

    alive: bool
    """The engine's loop is running."""
    running: int
    """Sequences in the batch."""
    waiting: int
    """Sequences not yet admitted."""
    seconds_since_progress: float
    """Since a step last finished; 0 while there is nothing to do."""


class Engine(Protocol):
    """One loaded LVLM with its VL-SAE. `generate` may be called from many tasks of one event loop at once."""

    async def start(self) -> None:
        """Load, verify the artifact's canary, and begin to serve. Raises BadArtifact, EngineUnavailable."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TextDelta | GenerationEnd, None]:
        """Deltas of all choices as they come, then one GenerationEnd. Raises InvalidSteering before the first.

        Closing the iterator cancels the request within a step.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Stop a request and free what it holds; unknown ids are ignored."""
        ...

    def count_prompt_tokens(self, images: Sequence[Image], token_ids: Sequence[int]) -> int:
        """Length of a prompt once its image tokens are expanded."""
        ...

    def health(self) -> Health: ...

    def capabilities(self) -> Capabilities: ...

    async def stop(self) -> None:
        """End the loop; running requests fail with EngineUnavailable."""
        ...
