"""Is an autoencoder good? Measures of reconstructions, of codes and of retrieval across modalities. Pure tensor maths.

Memory is bounded: whatever is as wide as K or as H is made for a few columns at a time.
Shapes: H held-out pairs, S width, K concepts, k active concepts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from steering.sparse_autoencoder import SparseCode
from training.losses import unexplained_variance

_COLUMNS = 256
"""Texts compared with all images at once."""
_ROWS = 64
"""Pairs whose codes are compared concept by concept at once."""


def reconstruction_quality(modality: str, rebuilt_HS: Tensor, original_HS: Tensor) -> dict[str, float]:
    """FVU (share of the variance around the mean that is lost), explained variance (1 - FVU), mean cosine, error."""
    lost = unexplained_variance(rebuilt_HS, original_HS)
    return {
        f"{modality}/explained_variance": 1 - lost,
        f"{modality}/fvu": lost,
        f"{modality}/cosine": float(F.cosine_similarity(rebuilt_HS, original_HS, dim=-1).mean()),
        f"{modality}/mse": float(F.mse_loss(rebuilt_HS, original_HS)),
    }


def retrieval(
    name: str, similarities: Callable[[slice], Tensor], own_H: Tensor, image_ids_H: Tensor
) -> dict[str, float]:
    """R@1 and R@10 across the modalities, mean of both directions.

    `similarities(columns)` gives [H, len(columns)]: every image with some texts; `own_H` is its diagonal. A stranger
    that is as near as the own partner counts as nearer. Strangers are other pictures: another text of the same picture
    (equal `image_ids_H`) is none.
    """
    nearer_texts_H, nearer_images_H = torch.zeros_like(own_H), torch.zeros_like(own_H)
    for start in range(0, len(own_H), _COLUMNS):
        columns = slice(start, min(start + _COLUMNS, len(own_H)))
        found_HC = similarities(columns)
        stranger_HC = image_ids_H[:, None] != image_ids_H[columns]
        nearer_texts_H += ((found_HC >= own_H[:, None]) & stranger_HC).sum(1)
        nearer_images_H[columns] += ((found_HC >= own_H[columns]) & stranger_HC).sum(0)
    return {
        f"retrieval/{name}_r{rank}": float(
            ((nearer_texts_H < rank).float().mean() + (nearer_images_H < rank).float().mean()) / 2
        )
        for rank in (1, 10)
    }


def retrieval_of_vectors(name: str, image_HS: Tensor, text_HS: Tensor, image_ids_H: Tensor) -> dict[str, float]:
    """By cosine."""
    image_HS, text_HS = F.normalize(image_HS, dim=-1), F.normalize(text_HS, dim=-1)
    own_H = _diagonal(image_HS, text_HS)
    return retrieval(name, lambda columns: image_HS @ text_HS[columns].T, own_H, image_ids_H)


def _diagonal(image_HS: Tensor, text_HS: Tensor) -> Tensor:
    """As the products of `retrieval_of_vectors` round them, so that no text is nearer than itself."""
    parts = [image_HS[s : s + _COLUMNS] @ text_HS[s : s + _COLUMNS].T for s in range(0, len(image_HS), _COLUMNS)]
    return torch.cat([part_CC.diagonal() for part_CC in parts])


def retrieval_of_codes(
    name: str, image: SparseCode, text: SparseCode, num_concepts: int, image_ids_H: Tensor
) -> dict[str, float]:
    """By cosine of the codes."""
    image, text = _unit(image), _unit(text)

    def similarities(columns: slice, rows: slice = slice(None)) -> Tensor:
        ids_Ck, activations_Ck = text.concept_ids[columns], text.activations[columns]
        table_CK = activations_Ck.new_zeros(len(ids_Ck), num_concepts).scatter_(1, ids_Ck, activations_Ck)
        ids_Rk, activations_Rk = image.concept_ids[rows], image.activations[rows]
        return F.embedding_bag(ids_Rk, table_CK.T, per_sample_weights=activations_Rk, mode="sum")

    count = len(image.concept_ids)
    chunks = [slice(start, min(start + _COLUMNS, count)) for start in range(0, count, _COLUMNS)]
    own_H = torch.cat([similarities(chunk, chunk).diagonal() for chunk in chunks])
    return retrieval(name, similarities, own_H, image_ids_H)


def _unit(code: SparseCode) -> SparseCode:
    return SparseCode(code.concept_ids, F.normalize(code.activations, dim=-1))


def overlaps(first: SparseCode, second: SparseCode) -> Tensor:
    """[H]: 2 |A and B| / (|A| + |B|) of each row, A and B the concepts that are active in each code."""
    shares = []
    for start in range(0, len(first.concept_ids), _ROWS):
        one, other = (SparseCode(*(part[start : start + _ROWS] for part in code)) for code in (first, second))
        both_Rkk = one.concept_ids[:, :, None] == other.concept_ids[:, None, :]
        both_Rkk &= (one.activations > 0)[:, :, None] & (other.activations > 0)[:, None, :]
        active_R = (one.activations > 0).sum(1) + (other.activations > 0).sum(1)
        shares.append(2 * both_Rkk.sum((1, 2)) / active_R.clamp(min=1))
    return torch.cat(shares)


class PairOverlap(NamedTuple):
    """How far the codes of an image and of its text agree."""

    paired: float
    """Mean share of active concepts that an image has in common with its text."""
    strangers: float
    """The same with the text of another picture."""
    beyond_chance: float
    """Their difference, less two of its standard errors: what few pairs show by chance is not in it."""

    def measures(self) -> dict[str, float]:
        """For a run's log."""
        ratio = self.paired / max(self.strangers, 1e-9)
        return {
            "overlap/paired": self.paired,
            "overlap/strangers": self.strangers,
            "overlap/ratio": ratio,
            "overlap/beyond_chance": self.beyond_chance,
        }


def overlap_of_pairs(image: SparseCode, text: SparseCode, image_ids_H: Tensor) -> PairOverlap:
    """Of each image with its own text, and with the next other picture's. All of one picture: there are no strangers,
    and nothing is beyond chance."""
    paired_H = overlaps(image, text)
    rows_H = strangers(image_ids_H)
    strangers_H = overlaps(image, SparseCode(*(part[rows_H] for part in text)))
    gap_H = paired_H - strangers_H
    error = float(gap_H.std()) / len(gap_H) ** 0.5 if len(gap_H) > 1 else float("inf")
    return PairOverlap(
        paired=float(paired_H.mean()),
        strangers=float(strangers_H.mean()),
        beyond_chance=float(gap_H.mean()) - 2 * error,
    )


def strangers(image_ids_H: Tensor) -> Tensor:
    """[H]: for each row the next one, around the end, that is of another picture; itself where there is none."""
    count = len(image_ids_H)
    own_H = torch.arange(count, device=image_ids_H.device)
    rows_H = own_H.clone()
    for shift in range(1, count):
        pending_P = (image_ids_H[rows_H] == image_ids_H).nonzero()[:, 0]
        if not len(pending_P):
            break
        rows_H[pending_P] = (pending_P + shift) % count
    return torch.where(image_ids_H[rows_H] == image_ids_H, own_H, rows_H)
