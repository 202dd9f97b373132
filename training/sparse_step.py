"""The VL-SAE as it is trained: the loss of `steering.sparse_autoencoder` and its gradient, without the zeros.

Dense is only the product that gives the cosines. Codes have k of K entries, so both decoders, and everything on the way
back, touch those alone: codes are read row by row on the way forth (a weighted sum of decoder rows), and concept by
concept on the way back (a weighted sum of the batch's rows), which keeps every read in a small table. Decoders are
stored with one row per concept and modality: row 2 i of the table is concept i's for images, row 2 i + 1 for text, so
that one order of the code, by row of that table, is also an order by concept.

Pure tensor maths: no data, no optimiser. Works on CPU and CUDA.
Shapes: N pairs, M = 2 N rows (images, then texts), S shared width, K concepts, k active concepts.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from steering.sparse_autoencoder import (
    DISTANCE_EPSILON,
    Modality,
    SparseCode,
    VisionLanguageSAE,
    cosine_to_activation,
)

with warnings.catch_warnings():  # torch says once per process that these are in beta: let that be now
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
    torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1), check_invariants=False)

_NORM_EPSILON = 1e-12
"""As F.normalize has it."""
_CHUNK_BYTES = 1024 * 1024
"""Of a gradient made at once on a CPU: memory of this size is used again by the allocator."""
_BFLOAT16_CANDIDATES = 2
"""So many times k are taken by their bfloat16 cosines, of which float32 ones then choose k: bfloat16 keeps two to three
decimals, too few to tell the k-th from its neighbours."""
_GROUP = 8
"""Entries whose maximum stands for them in the first pass of `top_k`."""


class SparseStep(NamedTuple):
    """What one forward pass gives."""

    loss: Tensor
    """Sum of both modalities' mean-squared errors."""
    counts_2K: Tensor
    """Rows in which each concept was active, by modality: image at 2 i, text at 2 i + 1."""


class TrainableVLSAE(nn.Module):
    """The parameters of a `VisionLanguageSAE`, laid out for training.

    On a CPU the gradients of one step lie where those of the step before did, if `zero_grad` has let go of these.
    """

    def __init__(self, sae: VisionLanguageSAE, *, bfloat16_product: bool = False) -> None:
        """`bfloat16_product`: which concepts are the nearest is found in bfloat16 (GPU); codes stay float32."""
        super().__init__()
        self.active_concepts, self.bfloat16_product = sae.active_concepts, bfloat16_product
        decoders = torch.stack((sae.vision_decoder.weight.detach().T, sae.text_decoder.weight.detach().T), dim=1)
        self.encoder_KS = nn.Parameter(sae.encoder.detach().clone())
        self.decoder_2KS = nn.Parameter(decoders.flatten(0, 1).contiguous())
        self.bias_2S = nn.Parameter(torch.stack((sae.vision_decoder.bias.detach(), sae.text_decoder.bias.detach())))
        self._workspace = _Workspace()

    def forward(self, image_NS: Tensor, text_NS: Tensor) -> SparseStep:
        """Loss and use of the concepts for a batch of pairs; gradients reach the parameters alone."""
        rows_MS = torch.cat((image_NS, text_NS))
        settings = _Settings(self.active_concepts, self.bfloat16_product, self._workspace)
        return SparseStep(*_Reconstruct.apply(self.encoder_KS, self.decoder_2KS, self.bias_2S, rows_MS, settings))

    @torch.no_grad()
    def encode(self, shared_NS: Tensor, modality: Modality) -> SparseCode:
        """As `VisionLanguageSAE` encodes, whatever the modality; outside training."""
        unit_NS, scale_K = F.normalize(shared_NS, dim=1), _inverse_norms(self.encoder_KS)
        cosine_Nk, concept_ids_Nk = top_k((unit_NS @ self.encoder_KS.T).mul_(scale_K), self.active_concepts)
        return SparseCode(concept_ids_Nk, cosine_to_activation(cosine_Nk))

    @torch.no_grad()
    def decode(self, code: SparseCode, modality: Modality) -> Tensor:
        """As `VisionLanguageSAE` decodes; outside training."""
        column = 0 if modality == "image" else 1
        table_ids_Nk = code.concept_ids * 2 + column
        sums_NS = F.embedding_bag(table_ids_Nk, self.decoder_2KS, per_sample_weights=code.activations, mode="sum")
        return sums_NS + self.bias_2S[column]

    @torch.no_grad()
    def published(self) -> dict[str, Tensor]:
        """Weights under the names, and in the shapes, of `VisionLanguageSAE`."""
        by_modality_2KS = self.decoder_2KS.unflatten(0, (-1, 2)).unbind(1)
        named = {"encoder": self.encoder_KS}
        for name, weight_KS, bias_S in zip(("vision", "text"), by_modality_2KS, self.bias_2S, strict=True):
            named |= {f"{name}_decoder.weight": weight_KS.T, f"{name}_decoder.bias": bias_S}
        return {name: tensor.contiguous() for name, tensor in named.items()}


class _Workspace:
    """The big tensors of a step, kept from one to the next: fresh memory costs more than what is written to it."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Uninitialised; of the values of the last step only."""
        kept = self._kept.get(name)
        if kept is None or kept.shape != shape or kept.dtype != like.dtype or kept.device != like.device:
            kept = self._kept[name] = like.new_empty(shape)
        return kept


class _Settings(NamedTuple):
    active_concepts: int
    bfloat16_product: bool
    workspace: _Workspace


class _Reconstruct(torch.autograd.Function):
    """(encoder, decoders, biases, rows) -> (loss, counts)."""

    @staticmethod
    def forward(
        ctx: Any, encoder_KS: Tensor, decoder_2KS: Tensor, bias_2S: Tensor, rows_MS: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor]:
        pairs = len(rows_MS) // 2
        unit_MS = F.normalize(rows_MS, dim=1)
        scale_K = _inverse_norms(encoder_KS)
        cosine_Mk, concept_ids_Mk = _nearest_concepts(unit_MS, encoder_KS, scale_K, settings)
        distance_Mk = (2 - 2 * cosine_Mk).clamp_min_(DISTANCE_EPSILON).sqrt_()
        activation_Mk = 2 - distance_Mk
        table_ids_Mk = concept_ids_Mk * 2
        table_ids_Mk[pairs:] += 1
        error_MS = F.embedding_bag(table_ids_Mk, decoder_2KS, per_sample_weights=activation_Mk, mode="sum")
        error_MS.unflatten(0, (2, pairs)).add_(bias_2S[:, None])
        error_MS.sub_(rows_MS)
        code = _sort_by_concept(table_ids_Mk, activation_Mk, distance_Mk, cosine_Mk, len(decoder_2KS))
        ctx.save_for_backward(encoder_KS, decoder_2KS, scale_K, unit_MS, error_MS, *code)
        ctx.workspace, ctx.parameters = settings.workspace, (encoder_KS, decoder_2KS)
        counts_2K = code.starts_2K1.diff()
        ctx.mark_non_differentiable(counts_2K)
        return error_MS.square().sum() / (pairs * rows_MS.shape[1]), counts_2K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        encoder_KS, decoder_2KS, scale_K, unit_MS, error_MS, *code = ctx.saved_tensors
        table_ids_L, starts_2K1, rows_L, activation_L, distance_L, cosine_L = _ByConcept(*code)
        kept = ctx.workspace if _may_set_gradients(ctx.parameters) else None
        gradient_MS = error_MS * (loss_gradient * 2 / (error_MS.numel() // 2))
        bias_2S = gradient_MS.unflatten(0, (2, -1)).sum(1)
        decoder_gradient_2KS = _sum_rows(gradient_MS, rows_L, starts_2K1, activation_L, "decoder", kept)
        activation_gradient_L = _products(decoder_2KS, gradient_MS, rows_L, starts_2K1)
        moves_L = 2 - 2 * cosine_L >= DISTANCE_EPSILON
        cosine_gradient_L = torch.where(moves_L, activation_gradient_L / distance_L, 0)
        starts_K1 = starts_2K1[::2].contiguous()
        cosine_gradient_L *= scale_K[table_ids_L // 2]
        encoder_gradient_KS = _sum_rows(unit_MS, rows_L, starts_K1, cosine_gradient_L, "encoder", kept)
        along_K = torch.segment_reduce(cosine_gradient_L * cosine_L, "sum", offsets=starts_K1.long())
        encoder_gradient_KS.addcmul_(encoder_KS, (along_K * scale_K)[:, None], value=-1)
        if kept is not None:
            ctx.parameters[0].grad, ctx.parameters[1].grad = encoder_gradient_KS, decoder_gradient_2KS
            return None, None, bias_2S, None, None
        return encoder_gradient_KS, decoder_gradient_2KS, bias_2S, None, None


def _may_set_gradients(parameters: tuple[Tensor, ...]) -> bool:
    """Into memory of ours: autograd would copy them into fresh memory. Not where they are to be added to those of
    another step, nor where other workers wait for autograd to say that they are there."""
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return alone and not any(one.is_cuda or not one.is_leaf or one.grad is not None for one in parameters)


class _ByConcept(NamedTuple):
    """The L = M k entries of a code, ordered by their row of the decoder table."""

    table_ids_L: Tensor
    """Ascending, int32."""
    starts_2K1: Tensor
    """Where each row of the table starts, int32; one more at the end."""
    rows_L: Tensor
    """Row of the batch, int32."""
    activation_L: Tensor
    distance_L: Tensor
    cosine_L: Tensor


def _sort_by_concept(
    table_ids_Mk: Tensor, activation_Mk: Tensor, distance_Mk: Tensor, cosine_Mk: Tensor, table_rows: int
) -> _ByConcept:
    table_ids_L, order_L = torch.sort(table_ids_Mk.flatten().int(), stable=True)
    boundaries = torch.arange(table_rows + 1, dtype=torch.int32, device=table_ids_L.device)
    return _ByConcept(
        table_ids_L=table_ids_L,
        starts_2K1=torch.searchsorted(table_ids_L, boundaries, out_int32=True),
        rows_L=order_L.div(table_ids_Mk.shape[1], rounding_mode="floor").int(),
        activation_L=activation_Mk.flatten()[order_L],
        distance_L=distance_Mk.flatten()[order_L],
        cosine_L=cosine_Mk.flatten()[order_L],
    )


def _inverse_norms(encoder_KS: Tensor) -> Tensor:
    return torch.linalg.vector_norm(encoder_KS, dim=1).clamp_min(_NORM_EPSILON).reciprocal()


def _nearest_concepts(
    unit_MS: Tensor, encoder_KS: Tensor, scale_K: Tensor, settings: _Settings
) -> tuple[Tensor, Tensor]:
    """Cosines and numbers [M, k] of each row's nearest concepts; the cosines are never rounded to bfloat16."""
    concepts_KS = settings.workspace.take("concepts", tuple(encoder_KS.shape), encoder_KS)
    torch.mul(encoder_KS, scale_K[:, None], out=concepts_KS)
    if settings.bfloat16_product:
        rough_MK = unit_MS.bfloat16() @ concepts_KS.bfloat16().T
        candidates = min(len(concepts_KS), _BFLOAT16_CANDIDATES * settings.active_concepts)
        concept_ids_MC = torch.topk(rough_MK, candidates, dim=1).indices
        starts_M1 = torch.arange(0, concept_ids_MC.numel() + 1, candidates, device=rough_MK.device).int()
        cosine_L = _products(unit_MS, concepts_KS, concept_ids_MC.flatten().int(), starts_M1)
        nearest = torch.topk(cosine_L.view_as(concept_ids_MC), settings.active_concepts, dim=1)
        return nearest.values, concept_ids_MC.gather(1, nearest.indices)
    cosines_MK = settings.workspace.take("cosines", (len(unit_MS), len(encoder_KS)), encoder_KS)
    torch.mm(unit_MS, concepts_KS.T, out=cosines_MK)
    return top_k(cosines_MK, settings.active_concepts, in_order=False)


def top_k(values_MK: Tensor, k: int, *, in_order: bool = True) -> tuple[Tensor, Tensor]:
    """torch.topk, faster on a CPU: whatever is among the k largest lies in one of the k groups of largest maximum."""
    rows, width = values_MK.shape
    groups = width // _GROUP
    if values_MK.is_cuda or width % _GROUP or groups < 2 * k:
        largest = torch.topk(values_MK, k, dim=1, sorted=in_order)
        return largest.values, largest.indices
    maxima_MG = values_MK.view(rows, _GROUP, groups).amax(1)
    found_Mk = torch.topk(maxima_MG, k, dim=1, sorted=False).indices
    members = torch.arange(0, width, groups, device=values_MK.device)
    candidates_MC = (found_Mk[:, None] + members[:, None]).flatten(1)
    largest = torch.topk(values_MK.gather(1, candidates_MC), k, dim=1, sorted=in_order)
    return largest.values, candidates_MC.gather(1, largest.indices)


def _sum_rows(
    rows_MS: Tensor, rows_L: Tensor, starts_B1: Tensor, weights_L: Tensor, name: str, kept: _Workspace | None
) -> Tensor:
    """[B, S]: for each B the weighted sum of the rows that it names; into the memory kept as `name`, if any."""
    if kept is None:
        return F.embedding_bag(
            rows_L, rows_MS, starts_B1, per_sample_weights=weights_L, mode="sum", include_last_offset=True
        )
    bags = len(starts_B1) - 1
    sums_BS = kept.take(name, (bags, rows_MS.shape[1]), rows_MS)
    bags_at_once = max(1, _CHUNK_BYTES // (rows_MS.element_size() * rows_MS.shape[1]))
    for first in range(0, bags, bags_at_once):
        part_C1 = starts_B1[first : first + bags_at_once + 1]
        part = slice(int(part_C1[0]), int(part_C1[-1]))
        sums_BS[first : first + bags_at_once] = F.embedding_bag(
            rows_L[part], rows_MS, part_C1 - part_C1[0], per_sample_weights=weights_L[part], mode="sum",
            include_last_offset=True,
        )  # fmt: skip
    return sums_BS


def _products(table_BS: Tensor, rows_MS: Tensor, rows_L: Tensor, starts_B1: Tensor) -> Tensor:
    """[L]: inner products of each B's row of the table with the rows that it names."""
    pattern = torch.sparse_csr_tensor(
        starts_B1, rows_L, torch.zeros_like(rows_L, dtype=rows_MS.dtype), size=(len(table_BS), len(rows_MS)),
        check_invariants=False,
    )  # fmt: skip
    return torch.sparse.sampled_addmm(pattern, table_BS, rows_MS.T, beta=0.0).values()
