"""Scores out of sums against scores out of all pairs."""

import itertools
from typing import Any

import numpy as np
import pytest

from steering.artifact import load_artifact
from training.clip_model import load_clip
from training.interpretation.similarity import MemberSums, SimilarityMeter, measure_similarity
from training.miniature.drawing import draw_scene
from training.miniature.paths import ARTIFACT, CLIP
from training.miniature.world import scene_from_seed


def unit(rows, seed):
    vectors = np.random.default_rng(seed).normal(size=(rows, 5))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


MEMBERS = {"image": [[0, 1, 2], [2, 3], [4], []], "text": [[0, 1], [2, 3, 4], [5], []]}
EMBEDDINGS = {"image": unit(5, 1), "text": unit(6, 2)}


@pytest.fixture
def similarity():
    sums = {}
    for name, members in MEMBERS.items():
        owners = np.repeat(np.arange(4), [len(of_concept) for of_concept in members])
        sums[name] = MemberSums(4, owners, np.array([10 * one for of_concept in members for one in of_concept]))
        for start in (0, 2, 4):
            part = np.arange(start, min(start + 2, len(EMBEDDINGS[name])))
            sums[name].add(10 * part, EMBEDDINGS[name][part])
    return measure_similarity(sums)


@pytest.mark.parametrize("name", ["image", "text"])
def test_intra_is_the_mean_cosine_of_two_members(similarity, name):
    expected: list[Any] = []
    for members in MEMBERS[name]:
        pairs = [float(EMBEDDINGS[name][a] @ EMBEDDINGS[name][b]) for a, b in itertools.combinations(members, 2)]
        expected.append(np.mean(pairs) if pairs else np.nan)
    np.testing.assert_allclose(similarity.intra_K[name], expected)
    assert similarity.intra[name] == pytest.approx(np.nanmean(expected))


@pytest.mark.parametrize("name", ["image", "text"])
def test_inter_is_the_mean_cosine_between_two_concepts(similarity, name):
    between: list[Any] = []
    for one, other in itertools.permutations([members for members in MEMBERS[name] if members], 2):
        between.append(np.mean([EMBEDDINGS[name][a] @ EMBEDDINGS[name][b] for a in one for b in other]))
    assert similarity.inter[name] == pytest.approx(np.mean(between))


def test_cross_is_the_mean_cosine_of_its_pictures_with_its_texts(similarity):
    both = zip(MEMBERS["image"], MEMBERS["text"], strict=True)
    expected: list[Any] = [
        np.mean([EMBEDDINGS["image"][a] @ EMBEDDINGS["text"][b] for a in images for b in texts]) if images else np.nan
        for images, texts in both
    ]
    np.testing.assert_allclose(similarity.cross_K, expected)
    assert similarity.as_dict()["cross"] == pytest.approx(np.nanmean(expected), abs=1e-6)


def test_the_miniature_s_concepts_are_alike_within_and_shuffled_ones_are_not():
    concepts = [concept for concept in load_artifact(ARTIFACT).concepts if len(concept["images"]) > 2][:50]
    pictures = [[image["reference"] for image in concept["images"]] for concept in concepts]
    meter = SimilarityMeter(pictures, [concept["texts"] for concept in concepts], load_clip(CLIP), seed=0)
    shown = sorted({reference for of_concept in pictures for reference in of_concept})
    scenes = [scene_from_seed(int(reference.removeprefix("scene:"))) for reference in shown]
    meter.see_pictures(shown, [draw_scene(scene) for scene in scenes])
    measured = {name: similarity.as_dict() for name, similarity in meter.measure().items()}
    for modality in ("image", "text"):
        assert measured["concepts"]["intra"][modality] > measured["concepts"]["inter"][modality] + 0.2
        assert measured["concepts"]["intra"][modality] > measured["shuffled"]["intra"][modality] + 0.2
    assert measured["concepts"]["cross"] > measured["shuffled"]["cross"] + 0.2
