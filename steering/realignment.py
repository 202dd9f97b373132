"""The equations of realignment; pure tensors: no model, no hooks, no engine.

Every shape is known beforehand and nothing is read back, so the same code runs eagerly and in a captured graph.

Shapes: N positions, M images, D hidden size, S shared width, K concepts, k active concepts. All of it is float32
whatever the model's dtype, because top-k is discontinuous (design, section 1).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.request import Form
from steering.sparse_autoencoder import VisionLanguageSAE, cosine_to_activation

ROWS_PER_CHUNK = 1024
"""Positions encoded at once: bounds the [N, K] cosines of a long prefill."""


class FormTerms(NamedTuple):
    """What distinguishes the three forms, as numbers, so that rows of different forms are one computation."""

    dense: float
    """1: activations outside of the top k count, too, on the supports of both codes."""
    subtract: float
    """1: only the change of the code is decoded; 0: all of the code, and the text's own state is taken away."""


FORM_TERMS: dict[Form, FormTerms] = {
    "published": FormTerms(dense=0, subtract=0),
    "difference": FormTerms(dense=0, subtract=1),
    "union": FormTerms(dense=1, subtract=1),
}


class ConceptCode(NamedTuple):
    """What realignment needs of states that were encoded; of an image computed once per request."""

    concept_ids: Tensor
    """[M, k] int64: the support of z."""
    cosines: Tensor
    """[M, K] float32: cosine with every concept (`union` reads it off the support, too)."""
    active: Tensor
    """[M, K] bool: membership in the support."""


class Mix(NamedTuple):
    """Per-position settings of the mix and the step, [N, 1] float32 each."""

    beta_up: Tensor
    """Share of (z_v - z_t)_+ added."""
    beta_down: Tensor
    """Share of (z_t - z_v)_+ removed."""
    scale: Tensor
    """strength * alpha; negative for the control `reversed`."""
    dense: Tensor
    subtract: Tensor
    """As in `FormTerms`."""


class Edits(NamedTuple):
    """What a request does to single concepts of the text, [N, E] each; (0, 0, 0) is none."""

    concept_ids: Tensor
    """int64."""
    gain: Tensor
    """float32: factor - 1, of z_t."""
    add: Tensor
    """float32: activation that is added, whether the text has the concept or not."""


class MixedCodes(NamedTuple):
    """Both codes of each position on their supports, [N, 2k] float32 but for the ids: first the text's, then the
    image's. Activations off a support are 0, with `union` they are not.

    A concept of both stands twice; `repeated` marks the second.
    """

    concept_ids: Tensor
    """int64."""
    image: Tensor
    text: Tensor
    mixed: Tensor
    """z of the equations."""
    repeated: Tensor
    """bool."""


_precision = threading.Lock()
_inside = 0
_set_by_process: list[str] = []


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 and no bfloat16 inside float32 products, whatever the process has set; no autocast.

    The setting is the process's: other threads' products are exact meanwhile, too.
    """
    global _inside
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    with _precision:
        if _inside == 0:
            _set_by_process[:] = [backend.fp32_precision for backend in backends]
            for backend in backends:
                backend.fp32_precision = "ieee"
        _inside += 1
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        with _precision:
            _inside -= 1
            if _inside == 0:
                for backend, precision in zip(backends, _set_by_process, strict=True):
                    backend.fp32_precision = precision


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

    def __init__(
        self, auxiliary: AuxiliaryAutoencoder, sae: VisionLanguageSAE, device: torch.device | str = "cpu"
    ) -> None:
        """Folds W on `device`, where everything then lies. The autoencoders stay as and where they are."""
        super().__init__()
        self.active_concepts = sae.active_concepts
        self.vision_projection = _copied(auxiliary.vision_projection, device)
        self.text_projection = _copied(auxiliary.text_projection, device)
        outer, inner = auxiliary.text_decoder, sae.text_decoder
        with torch.no_grad(), exact_float32():
            outer_DS, inner_SK, inner_bias_S, outer_bias_D, encoder_KS = (
                part.detach().to(device).float()
                for part in (outer.weight, inner.weight, inner.bias, outer.bias, sae.encoder)
            )
            self.register_buffer("directions_KS", F.normalize(encoder_KS, dim=-1))
            self.register_buffer("table_KD", (outer_DS @ inner_SK).T.contiguous())
            self.register_buffer("bias_D", outer_DS @ inner_bias_S + outer_bias_D)
        self.requires_grad_(False)

    @property
    def hidden_size(self) -> int:
        return self.table_KD.shape[1]

    @property
    def num_concepts(self) -> int:
        return self.table_KD.shape[0]

    def encode_image(self, image_MD: Tensor) -> ConceptCode:
        """Pooled image states [M, D] float32 to their codes."""
        return self._encode(self.vision_projection, image_MD)

    def encode_text(self, text_ND: Tensor) -> ConceptCode:
        """Text means [N, D] float32 to their codes."""
        return self._encode(self.text_projection, text_ND)

    def delta(self, text_ND: Tensor, image: ConceptCode, row_N: Tensor, mix: Mix) -> Tensor:
        """The change [N, D] for positions whose text means are `text_ND`, float32.

        `row_N` [N] int64 names for each position the row of `image` that it belongs to; `mix` is per position.
        """
        return self.changes(text_ND, image, row_N, mix)[0]

    def changes(
        self, text_ND: Tensor, image: ConceptCode, row_N: Tensor, mix: Mix, edits: Edits | None = None
    ) -> tuple[Tensor, Tensor]:
        """`delta`, and what edits add to it, which no dial scales: W ((factor - 1) z_t + add) (design, section 2)."""
        deltas, added = [text_ND.new_zeros(0, self.hidden_size)], [text_ND.new_zeros(0, self.hidden_size)]
        for part in _chunks(text_ND.shape[0]):
            text = self.encode_text(text_ND[part])
            codes = self.mix(text, image, row_N[part], Mix(*(values[part] for values in mix)))
            deltas.append(self._decode(codes, text_ND[part], Mix(*(values[part] for values in mix))))
            if edits is not None:
                added.append(self._edit(text, Edits(*(values[part] for values in edits))))
        return torch.cat(deltas), torch.cat(added)

    def mix(self, text: ConceptCode, image: ConceptCode, row_N: Tensor, mix: Mix) -> MixedCodes:
        """Both codes of positions, and what is made of them; arguments as in `delta`."""
        image_ids_Nk = image.concept_ids[row_N]
        ids_N2k = torch.cat([text.concept_ids, image_ids_Nk], dim=1)
        every_N1 = mix.dense > 0
        text_N2k = cosine_to_activation(text.cosines.gather(1, ids_N2k))
        image_N2k = cosine_to_activation(image.cosines[row_N[:, None], ids_N2k])
        text_N2k = text_N2k * (text.active.gather(1, ids_N2k) | every_N1)
        image_N2k = image_N2k * (image.active[row_N[:, None], ids_N2k] | every_N1)
        repeated_N2k = torch.zeros_like(ids_N2k, dtype=torch.bool)
        repeated_N2k[:, self.active_concepts :] = text.active.gather(1, image_ids_Nk)
        return MixedCodes(ids_N2k, image_N2k, text_N2k, _mix(image_N2k, text_N2k, mix), repeated_N2k)

    def _decode(self, codes: MixedCodes, text_ND: Tensor, mix: Mix) -> Tensor:
        coefficients_N2k = (codes.mixed - mix.subtract * codes.text).masked_fill_(codes.repeated, 0)
        delta_ND = F.embedding_bag(codes.concept_ids, self.table_KD, per_sample_weights=coefficients_N2k, mode="sum")
        return mix.scale * torch.where(mix.subtract > 0, delta_ND, delta_ND + self.bias_D - text_ND)

    def _edit(self, text: ConceptCode, edits: Edits) -> Tensor:
        ids_NE = edits.concept_ids
        text_NE = cosine_to_activation(text.cosines.gather(1, ids_NE)) * text.active.gather(1, ids_NE)
        return F.embedding_bag(ids_NE, self.table_KD, per_sample_weights=edits.gain * text_NE + edits.add, mode="sum")

    def _encode(self, projection: nn.Linear, state_ND: Tensor) -> ConceptCode:
        with exact_float32():
            cosines_NK = F.normalize(projection(state_ND), dim=-1) @ self.directions_KS.T
        ids_Nk = torch.topk(cosines_NK, self.active_concepts, dim=-1).indices
        active_NK = torch.zeros_like(cosines_NK, dtype=torch.bool).scatter_(1, ids_Nk, True)
        return ConceptCode(ids_Nk, cosines_NK, active_NK)


def _copied(linear: nn.Linear, device: torch.device | str) -> nn.Linear:
    made = nn.Linear(linear.in_features, linear.out_features, device=device, dtype=torch.float32)
    made.load_state_dict(linear.state_dict())
    return made


def _mix(image_N2k: Tensor, text_N2k: Tensor, mix: Mix) -> Tensor:
    gap_N2k = image_N2k - text_N2k
    return text_N2k + mix.beta_up * gap_N2k.clamp(min=0) - mix.beta_down * (-gap_N2k).clamp(min=0)


def _chunks(rows: int) -> list[slice]:
    return [slice(start, start + ROWS_PER_CHUNK) for start in range(0, rows, ROWS_PER_CHUNK)]
