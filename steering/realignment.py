"""The equations of realignment; pure tensors: no model, no hooks, no engine.

Shapes: N positions, D hidden size, S shared width, K concepts, k active concepts. All of it is float32 whatever the
model's dtype, because top-k is discontinuous (design, section 1).
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.request import Form
from steering.sparse_autoencoder import VisionLanguageSAE, cosine_to_activation

ROWS_PER_CHUNK = 1024
"""Positions encoded at once: bounds the [N, K] cosines of a long prefill."""


class ImageCode(NamedTuple):
    """What realignment needs of an image; computed once per request."""

    concept_ids: Tensor
    """[N, k] int64: supp z_v."""
    cosines: Tensor
    """[N, K] float32: cosine with every concept (`union` reads it off the support, too)."""
    active: Tensor
    """[N, K] bool: membership in supp z_v."""


class MixParameters(NamedTuple):
    """Per-position settings of the mix and the step."""

    beta_up: Tensor
    """[N] share of (z_v - z_t)_+ added."""
    beta_down: Tensor
    """[N] share of (z_t - z_v)_+ removed."""
    scale: Tensor
    """[N] strength * alpha."""


class Realignment(nn.Module):
    """Text state towards the image's concepts (paper, section 4.2; forms in design, section 1).

        z = z_t + beta_up (z_v - z_t)_+ - beta_down (z_t - z_v)_+,   W = D_t G_t,   c = D_t b_G + b_D
        published:   delta = scale (W z + c - t)
        difference:  delta = scale W (z - z_t)
        union:       delta = scale W (mix(a_v, a_t) - a_t) on supp z_v + supp z_t

    Our deviations: two betas where the paper has one, the forms `difference` and `union`, and W folded at load, so
    that a delta is a gather of at most 2k of its columns.
    """

    directions_KS: Tensor
    """Concept vectors at unit length."""
    table_KD: Tensor
    """W transposed: what one unit of each concept adds to a text state."""
    bias_D: Tensor
    """c."""

    def __init__(self, auxiliary: AuxiliaryAutoencoder, sae: VisionLanguageSAE) -> None:
        super().__init__()
        self.active_concepts = sae.active_concepts
        self.vision_projection = copy.deepcopy(auxiliary.vision_projection).float()
        self.text_projection = copy.deepcopy(auxiliary.text_projection).float()
        decoder_weight_DS = auxiliary.text_decoder.weight.detach().float()
        self.register_buffer("directions_KS", F.normalize(sae.encoder.detach().float(), dim=-1))
        self.register_buffer("table_KD", (decoder_weight_DS @ sae.text_decoder.weight.detach().float()).T.contiguous())
        bias_D = (
            decoder_weight_DS @ sae.text_decoder.bias.detach().float() + auxiliary.text_decoder.bias.detach().float()
        )
        self.register_buffer("bias_D", bias_D)
        self.requires_grad_(False)

    @property
    def hidden_size(self) -> int:
        return self.table_KD.shape[1]

    @property
    def num_concepts(self) -> int:
        return self.table_KD.shape[0]

    def _cosines(self, shared_NS: Tensor) -> Tensor:
        return F.normalize(shared_NS, dim=-1) @ self.directions_KS.T

    def encode_image(self, image_ND: Tensor) -> ImageCode:
        """Pooled image states [N, D] float32 to their codes."""
        cosines_NK = self._cosines(self.vision_projection(image_ND))
        ids_Nk = torch.topk(cosines_NK, self.active_concepts, dim=-1).indices
        active_NK = torch.zeros_like(cosines_NK, dtype=torch.bool).scatter_(1, ids_Nk, True)
        return ImageCode(ids_Nk, cosines_NK, active_NK)

    def delta(self, text_ND: Tensor, image: ImageCode, row_N: Tensor, mix: MixParameters, form: Form) -> Tensor:
        """The change [N, D] for positions whose text means are `text_ND`.

        `row_N` [N] names for each position the row of `image` that it belongs to; `mix` is per position.
        """
        chunks = [
            self._delta_chunk(text_ND[part], image, row_N[part], MixParameters(*(values[part] for values in mix)), form)
            for part in _chunks(text_ND.shape[0])
        ]
        return torch.cat(chunks) if chunks else text_ND.new_zeros(0, self.hidden_size)

    def _delta_chunk(self, text_ND: Tensor, image: ImageCode, row_N: Tensor, mix: MixParameters, form: Form) -> Tensor:
        text_cosines_NK = self._cosines(self.text_projection(text_ND))
        text_ids_Nk = torch.topk(text_cosines_NK, self.active_concepts, dim=-1).indices
        image_ids_Nk = image.concept_ids[row_N]
        in_text_NK = torch.zeros_like(text_cosines_NK, dtype=torch.bool).scatter_(1, text_ids_Nk, True)
        repeated_Nk = in_text_NK.gather(1, image_ids_Nk)

        ids_N2k = torch.cat([text_ids_Nk, image_ids_Nk], dim=1)
        text_N2k = cosine_to_activation(text_cosines_NK.gather(1, ids_N2k))
        image_N2k = cosine_to_activation(image.cosines[row_N[:, None], ids_N2k])
        if form != "union":
            text_N2k = text_N2k * in_text_NK.gather(1, ids_N2k)
            image_N2k = image_N2k * image.active[row_N[:, None], ids_N2k]
        mixed_N2k = _mix(image_N2k, text_N2k, mix)
        coefficients_N2k = mixed_N2k if form == "published" else mixed_N2k - text_N2k
        coefficients_N2k[:, self.active_concepts :].masked_fill_(repeated_Nk, 0)

        delta_ND = F.embedding_bag(ids_N2k, self.table_KD, per_sample_weights=coefficients_N2k, mode="sum")
        if form == "published":
            delta_ND = delta_ND + self.bias_D - text_ND
        return mix.scale[:, None] * delta_ND


def _mix(image_N2k: Tensor, text_N2k: Tensor, mix: MixParameters) -> Tensor:
    gap_N2k = image_N2k - text_N2k
    return text_N2k + mix.beta_up[:, None] * gap_N2k.clamp(min=0) - mix.beta_down[:, None] * (-gap_N2k).clamp(min=0)


def _chunks(rows: int) -> list[slice]:
    return [slice(start, start + ROWS_PER_CHUNK) for start in range(0, rows, ROWS_PER_CHUNK)]
