"""Image and text states into one shared space, and back. Pure tensor maths: no hooks, no engine, no HTTP.

Shapes: N rows, D hidden size of the LVLM's language model, S shared width.
"""

from __future__ import annotations

from torch import Tensor, nn


class AuxiliaryAutoencoder(nn.Module):
    """Linear maps with bias that align the two modalities before the sparse autoencoder (paper, section 3.2).

        shared_v = E_v v,  shared_t = E_t t,  v ~ D_v shared_v,  t ~ D_t shared_t

    The paper trains it with InfoNCE between shared_v and shared_t plus the mean-squared reconstruction error; the
    weight of the contrastive term is ours to choose (`training/losses.py`).
    """

    def __init__(self, hidden_size: int, shared_size: int) -> None:
        super().__init__()
        self.vision_projection = nn.Linear(hidden_size, shared_size)
        """E_v: [D] -> [S]."""
        self.text_projection = nn.Linear(hidden_size, shared_size)
        """E_t: [D] -> [S]."""
        self.vision_decoder = nn.Linear(shared_size, hidden_size)
        """D_v: [S] -> [D]."""
        self.text_decoder = nn.Linear(shared_size, hidden_size)
        """D_t: [S] -> [D]."""

    def forward(self, image_ND: Tensor, text_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled states of image and text [N, D] to their shared representations [N, S]."""
        return self.vision_projection(image_ND), self.text_projection(text_ND)

    def reconstruct(self, image_NS: Tensor, text_NS: Tensor) -> tuple[Tensor, Tensor]:
        """Shared representations [N, S] back to states [N, D]."""
        return self.vision_decoder(image_NS), self.text_decoder(text_NS)
