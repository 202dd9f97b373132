"""The VL-SAE's equations as one writes them with care: dense codes, two linear decoders, autograd. Concept vectors are
normalised once a step for both modalities, and only the k largest cosines become distances.

What the sparse step is compared with (`sae_training.py`). Shapes: N pairs, S shared width, K concepts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steering.sparse_autoencoder import DISTANCE_EPSILON, VisionLanguageSAE


class DenseVLSAE(nn.Module):
    """loss = MSE(G_v z(v), v) + MSE(G_t z(t), t), with z [N, K] that is zero outside of the k largest activations."""

    def __init__(self, sae: VisionLanguageSAE) -> None:
        super().__init__()
        self.active_concepts = sae.active_concepts
        self.encoder = nn.Parameter(sae.encoder.detach().clone())
        num_concepts, shared_size = self.encoder.shape
        self.vision_decoder, self.text_decoder = (
            nn.Linear(num_concepts, shared_size),
            nn.Linear(num_concepts, shared_size),
        )
        self.vision_decoder.load_state_dict(sae.vision_decoder.state_dict())
        self.text_decoder.load_state_dict(sae.text_decoder.state_dict())

    def encode(self, shared_NS: Tensor, concepts_KS: Tensor) -> Tensor:
        """z, [N, K]; `concepts_KS` have length 1."""
        cosine_NK = F.normalize(shared_NS, dim=-1) @ concepts_KS.T
        largest = torch.topk(cosine_NK, self.active_concepts, dim=-1, sorted=False)
        activation_Nk = 2 - torch.sqrt(torch.clamp(2 - 2 * largest.values, min=DISTANCE_EPSILON))
        return torch.zeros_like(cosine_NK).scatter(-1, largest.indices, activation_Nk)

    def forward(self, image_NS: Tensor, text_NS: Tensor) -> Tensor:
        """The loss of a batch."""
        concepts_KS = F.normalize(self.encoder, dim=-1)
        image_loss = F.mse_loss(self.vision_decoder(self.encode(image_NS, concepts_KS)), image_NS)
        return image_loss + F.mse_loss(self.text_decoder(self.encode(text_NS, concepts_KS)), text_NS)
