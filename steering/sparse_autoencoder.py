"""Shared space to top-k concepts, one decoder per modality. Pure tensor maths: no hooks, no engine, no HTTP.

Shapes: N rows, S shared width, K concepts, k active concepts.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Modality = Literal["image", "text"]
DISTANCE_EPSILON = 1e-8
"""Floor under the squared distance, so that its root has a gradient where a row meets a concept vector."""


class SparseCode(NamedTuple):
    """The k strongest concepts of each row; all others are zero."""

    concept_ids: Tensor
    """[N, k] int64, strongest first."""
    activations: Tensor
    """[N, k] in [0, 2]."""


def cosine_to_activation(cosine: Tensor) -> Tensor:
    """a = 2 - |x - w| for unit vectors x, w with this cosine (paper, section 3.3, distance-based encoder)."""
    return 2 - torch.sqrt(torch.clamp(2 - 2 * cosine, min=DISTANCE_EPSILON))


class VisionLanguageSAE(nn.Module):
    """VL-SAE: a distance-based encoder shared by the modalities, and one linear decoder each (paper, section 3.3).

        a_i(x) = 2 - sqrt(max(eps, 2 - 2 cos(x, w_i))),  z = the k largest, the rest zero
        x_v ~ G_v z_v,  x_t ~ G_t z_t

    An orthogonal concept already has a = 2 - sqrt(2) = .59, so codes are nearly binary. Parameter names are those of
    the published state dicts.
    """

    def __init__(self, shared_size: int, num_concepts: int, active_concepts: int) -> None:
        super().__init__()
        if not 0 < active_concepts <= num_concepts:
            raise ValueError(
                f"active_concepts is {active_concepts}; it must be between 1 and num_concepts={num_concepts}"
            )
        self.active_concepts = active_concepts
        self.encoder = nn.Parameter(torch.empty(num_concepts, shared_size))
        """Concept vectors w [K, S]; only their directions matter, but in training their length divides each step. They
        begin as the authors' do: about .58 long."""
        nn.init.kaiming_uniform_(self.encoder, a=5**0.5)
        self.vision_decoder = nn.Linear(num_concepts, shared_size)
        """G_v: [K] -> [S]."""
        self.text_decoder = nn.Linear(num_concepts, shared_size)
        """G_t: [K] -> [S]."""

    def cosines(self, shared_NS: Tensor) -> Tensor:
        """Cosine of each row with each concept vector, [N, K]."""
        return F.normalize(shared_NS, dim=-1) @ F.normalize(self.encoder, dim=-1).T

    def encode(self, shared_NS: Tensor) -> SparseCode:
        """Top-k concepts of each row of the shared space."""
        top = torch.topk(self.cosines(shared_NS), self.active_concepts, dim=-1)
        return SparseCode(top.indices, cosine_to_activation(top.values))

    def decode(self, code: SparseCode, modality: Modality) -> Tensor:
        """Reconstruction [N, S] of one modality; a gather of k columns per row."""
        decoder = self.vision_decoder if modality == "image" else self.text_decoder
        columns_KS = decoder.weight.T
        gathered_NS = F.embedding_bag(code.concept_ids, columns_KS, per_sample_weights=code.activations, mode="sum")
        return gathered_NS + decoder.bias

    def forward(self, image_NS: Tensor, text_NS: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions of both modalities through their codes, [N, S] each."""
        return self.decode(self.encode(image_NS), "image"), self.decode(self.encode(text_NS), "text")
