"""How alike the top pictures and texts of a concept are, in a CLIP's eyes (paper, section 4.2).

    intra   mean cosine of two different members of a concept, over concepts: should be high
    inter   mean cosine of a member of one concept and a member of another: should be low
    cross   mean cosine of a picture and a text of the same concept: should be high

and the same after the members were dealt out to the concepts at random, sizes kept. All of it follows from the sums of
the members' unit vectors, so members are embedded one batch after the other and forgotten. A picture that is in two
concepts counts in both, also between them.

Shapes: K concepts, E width of an embedding, M members (a picture in two concepts is two), N embeddings of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from steering.sparse_autoencoder import Modality
from training.clip_model import ClipModel
from training.store.layout import hash_text

MODALITIES: tuple[Modality, ...] = ("image", "text")
TEXT_BATCH = 256


class MemberSums:
    """Sums of the members' embeddings of each concept; members are given as (concept, key of the thing)."""

    def __init__(self, num_concepts: int, concepts_M: np.ndarray, keys_M: np.ndarray) -> None:
        order = np.argsort(keys_M, kind="stable")
        self._concepts_M, self._keys_M = concepts_M[order], keys_M[order]
        self.counts_K = np.zeros(num_concepts, dtype=np.int64)
        """Members embedded so far."""
        self.sums_KE = np.zeros((num_concepts, 1))

    def add(self, keys_N: np.ndarray, embeddings_NE: np.ndarray) -> None:
        """Things of unit length, each once."""
        if self.sums_KE.shape[1] != embeddings_NE.shape[1]:
            assert not self.counts_K.any()
            self.sums_KE = np.zeros((len(self.counts_K), embeddings_NE.shape[1]))
        first = np.searchsorted(self._keys_M, keys_N, side="left")
        last = np.searchsorted(self._keys_M, keys_N, side="right")
        for start, end, embedding_E in zip(first, last, embeddings_NE, strict=True):
            np.add.at(self.sums_KE, self._concepts_M[start:end], embedding_E)
            np.add.at(self.counts_K, self._concepts_M[start:end], 1)

    def intra(self) -> np.ndarray:
        """Mean cosine of two members, [K]; NaN for a concept with fewer than two."""
        squared_K = (self.sums_KE**2).sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            found_K = (squared_K - self.counts_K) / (self.counts_K * (self.counts_K - 1))
        return np.where(self.counts_K > 1, found_K, np.nan)

    def means(self) -> np.ndarray:
        """[K, E]; NaN for a concept without members."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.sums_KE / self.counts_K[:, None]


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """The scores; NaN where no concept has enough members."""

    intra: dict[Modality, float]
    inter: dict[Modality, float]
    cross: float
    intra_K: dict[Modality, np.ndarray]
    """By concept."""
    cross_K: np.ndarray
    """By concept."""

    def as_dict(self) -> dict[str, Any]:
        """Means over concepts, as JSON; None for NaN."""
        return {
            "intra": {name: _number(value) for name, value in self.intra.items()},
            "inter": {name: _number(value) for name, value in self.inter.items()},
            "cross": _number(self.cross),
        }


def measure_similarity(sums: dict[Modality, MemberSums]) -> Similarity:
    """From the sums of both modalities."""
    intra_K: dict[Modality, np.ndarray] = {name: sums[name].intra() for name in MODALITIES}
    means_KE: dict[Modality, np.ndarray] = {name: sums[name].means() for name in MODALITIES}
    cross_K = (means_KE["image"] * means_KE["text"]).sum(1)
    return Similarity(
        intra={name: _mean(values) for name, values in intra_K.items()},
        inter={name: _mean_between(values) for name, values in means_KE.items()},
        cross=_mean(cross_K),
        intra_K=intra_K,
        cross_K=cross_K,
    )


class SimilarityMeter:
    """Judges concepts by their pictures and texts, and a control beside them: the same, dealt out at random."""

    def __init__(
        self, pictures: Sequence[Sequence[str]], texts: Sequence[Sequence[str]], clip: ClipModel, seed: int
    ) -> None:
        """`pictures` are the references of each concept's; the pictures themselves come one batch after the other."""
        self._clip = clip
        self._sums: dict[str, dict[Modality, MemberSums]] = {"concepts": {}, "shuffled": {}}
        everything: dict[Modality, Sequence[Sequence[str]]] = {"image": pictures, "text": texts}
        for number, (name, members) in enumerate(everything.items()):
            owners_M = np.repeat(np.arange(len(members)), [len(of_concept) for of_concept in members])
            keys_M = np.array([hash_text(one) for of_concept in members for one in of_concept], dtype=np.int64)
            dealt_M = np.random.default_rng([seed, number]).permutation(owners_M)
            for key, concepts_M in (("concepts", owners_M), ("shuffled", dealt_M)):
                self._sums[key][name] = MemberSums(len(members), concepts_M, keys_M)
        self._texts = sorted({text for of_concept in texts for text in of_concept})

    def see_pictures(self, references: Sequence[str], images: Sequence[Image.Image]) -> None:
        """Each picture once."""
        self._add("image", references, self._clip.embed_images(images))

    def measure(self) -> dict[str, Similarity]:
        """Of the concepts and of the control, once all pictures were seen."""
        for start in range(0, len(self._texts), TEXT_BATCH):
            part = self._texts[start : start + TEXT_BATCH]
            self._add("text", part, self._clip.embed_texts(part))
        return {key: measure_similarity(sums) for key, sums in self._sums.items()}

    def _add(self, name: Modality, members: Sequence[str], embeddings_NE: Tensor) -> None:
        keys_N = np.array([hash_text(member) for member in members], dtype=np.int64)
        for sums in self._sums.values():
            sums[name].add(keys_N, embeddings_NE.numpy())


def _mean_between(means_KE: np.ndarray) -> float:
    """Mean product of the means of two different concepts."""
    means_CE = means_KE[~np.isnan(means_KE).any(1)]
    count = len(means_CE)
    if count < 2:
        return float("nan")
    return float(((means_CE.sum(0) ** 2).sum() - (means_CE**2).sum()) / (count * (count - 1)))


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 6)
