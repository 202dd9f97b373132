"""Concepts as clients name them and as engines do: labels in requests become ids, ids in answers get their labels.

Knows no HTTP. What it asks the index runs in threads.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from service.artifacts import MAIN
from service.concepts.index import ConceptIndex
from service.errors import ApiError, from_steering_error
from steering.engines.base import GenerationEnd
from steering.errors import BadArtifact
from steering.explanation import ConceptActivity, Explanation
from steering.request import RequestedSteering

log = logging.getLogger(__name__)
FIELD = "steering.concepts"


class ConceptNames:
    """Of one artifact."""

    def __init__(self, index: ConceptIndex | None) -> None:
        """None: there is no artifact, and what needs one the engine refuses."""
        self._index = index

    async def by_id(self, asked: RequestedSteering, artifact: str = MAIN) -> RequestedSteering:
        """With edits by id. Raises ApiError for an unknown or ambiguous label, a concept that is named twice, and where
        an artifact answers (`artifact` is its name) whose concepts are not known here."""
        edits = asked.settings.concepts
        if not edits or self._index is None:
            return asked
        if artifact != MAIN:
            raise ApiError(
                "invalid_steering",
                f"{FIELD}: the candidate {artifact!r} answers now, and only the concepts of the service's own artifact "
                "are known; leave it out",
                param=FIELD,
            )
        find = self._index.find
        try:
            ids = await asyncio.to_thread(lambda: [find(name) for name in edits])
        except BadArtifact as error:
            raise from_steering_error(error) from error
        if (twice := next((one for one in ids if ids.count(one) > 1), None)) is not None:
            raise ApiError("invalid_steering", f"steering.concepts: concept {twice} is named twice", param=FIELD)
        named = dict(zip(map(str, ids), edits.values(), strict=True))
        return replace(asked, settings=asked.settings.model_copy(update={"concepts": named}))

    async def with_labels(self, end: GenerationEnd) -> GenerationEnd:
        """With the label of every concept that its receipt explains, where the artifact is this one."""
        told = [one for one in end.receipt.explanation or () if one is not None]
        if not told or self._index is None:
            return end
        ids = {one.id for explanation in told for one in _all(explanation)}
        try:
            if end.receipt.artifact != await asyncio.to_thread(self._index.fingerprint):
                return end
            labels = await asyncio.to_thread(self._index.labels, ids)
        except BadArtifact as error:  # an answer without labels is still an answer
            log.warning("concepts are told without their labels: %s", error.message)
            return end
        explanation = [one and _labelled(one, labels) for one in end.receipt.explanation or ()]
        return replace(end, receipt=replace(end.receipt, explanation=explanation))


def _all(explanation: Explanation) -> list[ConceptActivity]:
    of_tokens = [one for token in explanation.tokens or () for one in token.text]
    return [*explanation.image, *explanation.text, *of_tokens]


def _labelled(explanation: Explanation, labels: dict[int, str]) -> Explanation:
    def named(concepts: tuple[ConceptActivity, ...]) -> tuple[ConceptActivity, ...]:
        return tuple(replace(one, label=labels[one.id]) for one in concepts)

    tokens = explanation.tokens and tuple(replace(one, text=named(one.text)) for one in explanation.tokens)
    return replace(explanation, image=named(explanation.image), text=named(explanation.text), tokens=tokens)
