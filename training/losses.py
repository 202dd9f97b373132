"""What the two autoencoders are trained with. Pure tensor maths: no models, no data.

Shapes: N rows of a batch, S shared width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Similarity = Literal["cosine", "dot"]


def info_nce(
    image_NS: Tensor,
    text_NS: Tensor,
    text_ids_N: Tensor,
    image_ids_N: Tensor,
    *,
    temperature: float,
    similarity: Similarity,
) -> Tensor:
    """Mean of the two directions' InfoNCE; rows of equal `text_ids_N` or equal `image_ids_N` are all positives.

    loss(i) = -log (sum of exp(s_ij / temperature) over positives j / sum over all j)
    """
    if similarity == "cosine":
        image_NS, text_NS = F.normalize(image_NS, dim=-1), F.normalize(text_NS, dim=-1)
    logits_NN = image_NS @ text_NS.T / temperature
    positive_NN = (text_ids_N[:, None] == text_ids_N) | (image_ids_N[:, None] == image_ids_N)
    return (_to_positives(logits_NN, positive_NN) + _to_positives(logits_NN.T, positive_NN)) / 2


def _to_positives(logits_NN: Tensor, positive_NN: Tensor) -> Tensor:
    hits_N = torch.logsumexp(logits_NN.masked_fill(~positive_NN, -torch.inf), dim=1)
    return (torch.logsumexp(logits_NN, dim=1) - hits_N).mean()


def reconstruction_error(rebuilt_NS: Tensor, original_NS: Tensor) -> Tensor:
    """Mean-squared error over rows and width."""
    return F.mse_loss(rebuilt_NS, original_NS)


def unexplained_variance(rebuilt_NS: Tensor, original_NS: Tensor) -> float:
    """Squared error as a share of the variance around the mean: 0 is perfect, 1 is the mean itself."""
    residual = (original_NS - rebuilt_NS).square().sum()
    return float(residual / (original_NS - original_NS.mean(0)).square().sum())
