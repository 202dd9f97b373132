"""Edits by label and explanations with labels, on the bundled artifact and through the HTTP side."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from service.concepts.index import ConceptIndex
from service.concepts.names import ConceptNames
from service.errors import ApiError
from service.settings import BUNDLED_ARTIFACT
from steering.explanation import Explanation
from steering.request import ConceptEdit, SteeringRequest, merge_sources
from tests.service.examples import end, explanation

REMOVE = ConceptEdit(factor=0.0)


@pytest.fixture(scope="module")
def index() -> ConceptIndex:
    return ConceptIndex(BUNDLED_ARTIFACT)


def filled(explanations: list[Explanation | None] | None) -> list[Explanation]:
    assert explanations
    told = [one for one in explanations if one is not None]
    assert len(told) == len(explanations)
    return told


def asked(**edits: ConceptEdit):
    return merge_sources(SteeringRequest(concepts=edits))


async def test_labels_become_ids(index: ConceptIndex) -> None:
    label = index.labels([239])[239]
    assert label
    named = await ConceptNames(index).by_id(asked(**{label.upper(): REMOVE, "7": ConceptEdit(add=1.0)}))
    assert named.settings.concepts == {"239": REMOVE, "7": ConceptEdit(add=1.0)}
    assert named.explicit


@pytest.mark.parametrize("edits", [{"no such thing": REMOVE}, {"1024": REMOVE}, {"7": REMOVE, "07": REMOVE}])
async def test_what_names_no_single_concept_is_refused(index: ConceptIndex, edits: dict[str, ConceptEdit]) -> None:
    with pytest.raises(ApiError) as caught:
        await ConceptNames(index).by_id(asked(**edits))
    assert (caught.value.status, caught.value.param) == (400, "steering.concepts")


async def test_every_concept_of_an_explanation_gets_its_label(index: ConceptIndex) -> None:
    told = end(2, 2, explanation=[explanation(tokens=2), explanation()], artifact=index.fingerprint())
    labelled = (await ConceptNames(index).with_labels(told)).receipt.explanation
    for one in filled(labelled):
        concepts = [*one.image, *one.text, *(concept for token in one.tokens or () for concept in token.text)]
        assert [concept.label for concept in concepts] == [
            index.labels([concept.id])[concept.id] for concept in concepts
        ]
    assert [replace(one, label=None) for one in filled(labelled)[1].image] == list(explanation().image)


async def test_another_artifact_s_concepts_are_not_known_by_these_names(index: ConceptIndex) -> None:
    told = end(2, explanation=[explanation()], artifact="b" * 64)
    assert await ConceptNames(index).with_labels(told) == told
    with pytest.raises(ApiError, match="'next' answers"):
        await ConceptNames(index).by_id(asked(star=REMOVE), "next")


async def test_without_an_artifact_nothing_is_named(tmp_path: Path) -> None:
    told = end(2, explanation=[explanation()])
    for names in (ConceptNames(None), ConceptNames(ConceptIndex(tmp_path))):
        assert await names.with_labels(told) == told
    assert await ConceptNames(None).by_id(asked(star=REMOVE)) == asked(star=REMOVE)
    with pytest.raises(ApiError, match=r"config\.json"):
        await ConceptNames(ConceptIndex(tmp_path)).by_id(asked(star=REMOVE))


async def test_a_plain_answer_waits_for_no_thread(index: ConceptIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncio, "to_thread", None)
    assert await ConceptNames(index).with_labels(end(3)) == end(3)
