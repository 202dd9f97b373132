"""One choice of one request while it runs: its tokens, its text, its steering state. Plain bookkeeping, no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from steering.engines.base import CanaryKind, FinishReason, GenerationEnd, Receipt, SampledToken, TextDelta
from steering.engines.sampling import Sampler
from steering.engines.text_stream import TextStream
from steering.lvlm.families import ImageInputs
from steering.lvlm.token_spans import TokenSpans
from steering.request import ConceptEdit
from steering.settings import Reason, ResolvedSteering
from steering.tally import Tally

if TYPE_CHECKING:
    from steering.engines.huggingface.grammar import ChoiceGrammar
    from steering.intervention import SequenceSteering

Emit = Callable[[TextDelta | GenerationEnd | Exception], object]


@dataclass(kw_only=True, eq=False)
class Sequence:
    """One choice. Its slot is its place in the engine's running list."""

    request: RunningRequest
    choice: int
    sampler: Sampler
    text: TextStream
    tokens: list[int]
    """Prompt (image tokens expanded) and everything generated."""
    grammar: ChoiceGrammar | None = None
    """What its text must follow, where this process masks the logits; None: nothing."""
    steering: SequenceSteering | None = None
    """Where this process steers: the state since the latest prefill, which makes it anew."""
    tally: Tally = Tally()
    """What steering did to it; known once it has ended."""
    position_shift: int = 0
    """What is added to the index of a token behind the prompt's last image to get its rotary position."""
    finish_reason: FinishReason | None = None
    completion_tokens: int = 0
    _unsent_tokens: list[int] = field(default_factory=list)
    _unsent_logprobs: list[SampledToken] = field(default_factory=list)

    def append(self, token: int, logprobs: SampledToken | None, end_tokens: frozenset[int]) -> None:
        """Take the token just sampled, send the text it completes, and finish where it ends the choice."""
        self.completion_tokens += 1
        if token in end_tokens:
            self._finish("stop", self.text.finish())
            return
        self.tokens.append(token)
        self._unsent_tokens.append(token)
        if logprobs is not None:
            self._unsent_logprobs.append(logprobs)
        text = self.text.push(token)
        if self.text.stopped:
            self._finish("stop", text)
        elif self.completion_tokens >= self.sampler.sampling.max_tokens:
            rest = self.text.finish()
            self._finish("stop" if self.text.stopped else "length", text + rest)
        elif text:
            self._send(text)

    def end_here(self) -> None:
        """End the choice after the tokens it has: the engine's own condition (a grammar) is met."""
        self._finish("stop", self.text.finish())

    def _finish(self, reason: FinishReason, text: str) -> None:
        self.finish_reason = reason
        self._send(text)

    def _send(self, text: str) -> None:
        self.request.emit(
            TextDelta(
                choice=self.choice,
                text=text,
                token_ids=tuple(self._unsent_tokens),
                logprobs=tuple(self._unsent_logprobs),
                finish_reason=self.finish_reason,
            )
        )
        self._unsent_tokens, self._unsent_logprobs = [], []


@dataclass(kw_only=True, eq=False)
class RunningRequest:
    """What the choices of a request share."""

    request_id: str
    tenant: str = ""
    """See `GenerationRequest`."""
    prompt_length: int
    spans: TokenSpans
    settings: ResolvedSteering
    artifact: str | None
    """Fingerprint of the artifact."""
    canary: CanaryKind | None
    """Of the artifact."""
    layer: int | None
    """Hook layer."""
    emit: Emit
    sequences: list[Sequence] = field(default_factory=list)
    image_inputs: ImageInputs = field(default_factory=dict)
    """The images as the model's vision side takes them, where the engine runs it; empty for a prompt without any."""

    @property
    def finished(self) -> bool:
        """Every choice has ended."""
        return all(sequence.finish_reason for sequence in self.sequences)

    def end(self) -> GenerationEnd:
        """The last event, with the receipt; made once every choice has ended and its steering is known."""
        return GenerationEnd(
            prompt_tokens=self.prompt_length,
            completion_tokens=[sequence.completion_tokens for sequence in self.sequences],
            receipt=self._receipt(),
        )

    def _receipt(self) -> Receipt:
        settings, tallies = self.settings, [sequence.tally for sequence in self.sequences]
        positions = [tally.positions for tally in tallies]
        explanations = [tally.explanation for tally in tallies]
        applied = any(positions)
        known = settings.preset is not None
        return Receipt(
            applied=applied,
            reason=None if applied else self._why_not(tallies),
            artifact=self.artifact,
            canary=self.canary,
            layer=self.layer,
            preset=settings.preset,
            form=settings.form if known else None,
            mode=settings.mode if known else None,
            branches=settings.branches if settings.active else 1,
            strength=settings.strength,
            alpha=settings.alpha if known else None,
            beta_up=settings.beta_up if known else None,
            beta_down=settings.beta_down if known else None,
            gamma=settings.gamma if known else None,
            plausibility=settings.plausibility if known else None,
            min_answer_tokens=settings.min_answer_tokens if known else None,
            control=None if settings.control == "none" else settings.control,
            positions=positions,
            relative_shift=[tally.relative_shift for tally in tallies],
            arm=settings.arm,
            max_shift=settings.max_shift if known else None,
            edits=self._edits(),
            clamped_positions=[tally.clamped for tally in tallies],
            mismatch=[told and told.mismatch for told in explanations] if any(explanations) else None,
            explanation=None if settings.explain is None else explanations,
        )

    def _edits(self) -> dict[str, ConceptEdit] | None:
        made = {str(one.concept_id): ConceptEdit(factor=one.factor, add=one.add) for one in self.settings.edits}
        return made or None

    def _why_not(self, tallies: list[Tally]) -> Reason:
        if self.settings.reason is not None:
            return self.settings.reason
        if not any(tally.visited for tally in tallies):
            return "hook_detached"
        return "delta_0" if any(tally.visited_text for tally in tallies) else "no_text_position"
