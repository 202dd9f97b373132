"""SAE-D and SAE-V, what the VL-SAE is compared with (paper, section 4.1). Pure tensor maths: no data, no training.

SAE-D: an encoder and a decoder for each modality. SAE-V: one encoder and one decoder for both.

    z(x) = the k largest of ReLU(W_e x + b_e), the rest zero;    x ~ G z + b

Shapes: N rows, S shared width, K concepts, k active concepts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steering.sparse_autoencoder import Modality, SparseCode, VisionLanguageSAE
from training.losses import reconstruction_error
from training.sparse_step import SparseStep


class _LinearSparseAutoencoder(nn.Module):
    """Linear encoder with bias, ReLU, top-k, linear decoder with bias; subclasses say which modality has which."""

    def __init__(self, shared_size: int, num_concepts: int, active_concepts: int) -> None:
        super().__init__()
        if not 0 < active_concepts <= num_concepts:
            raise ValueError(
                f"active_concepts is {active_concepts}; it must be between 1 and num_concepts={num_concepts}"
            )
        self.shared_size, self.num_concepts, self.active_concepts = shared_size, num_concepts, active_concepts

    def encoder_of(self, modality: Modality) -> nn.Linear:
        """[S] -> [K]."""
        raise NotImplementedError

    def decoder_of(self, modality: Modality) -> nn.Linear:
        """[K] -> [S]."""
        raise NotImplementedError

    def encode(self, shared_NS: Tensor, modality: Modality) -> SparseCode:
        """Top-k concepts of each row. Fewer than k may be above zero: the others have activation 0."""
        top = torch.topk(self.encoder_of(modality)(shared_NS), self.active_concepts, dim=-1)
        return SparseCode(top.indices, top.values.relu())

    def decode(self, code: SparseCode, modality: Modality) -> Tensor:
        """Reconstruction [N, S] of one modality."""
        decoder = self.decoder_of(modality)
        columns_KS = decoder.weight.T
        gathered_NS = F.embedding_bag(code.concept_ids, columns_KS, per_sample_weights=code.activations, mode="sum")
        return gathered_NS + decoder.bias


class SAED(_LinearSparseAutoencoder):
    """An encoder and a decoder per modality: nothing but the data ties a concept of one to that of the other."""

    def __init__(self, shared_size: int, num_concepts: int, active_concepts: int) -> None:
        super().__init__(shared_size, num_concepts, active_concepts)
        self.vision_encoder = nn.Linear(shared_size, num_concepts)
        self.text_encoder = nn.Linear(shared_size, num_concepts)
        self.vision_decoder = nn.Linear(num_concepts, shared_size)
        self.text_decoder = nn.Linear(num_concepts, shared_size)

    def encoder_of(self, modality: Modality) -> nn.Linear:
        return self.vision_encoder if modality == "image" else self.text_encoder

    def decoder_of(self, modality: Modality) -> nn.Linear:
        return self.vision_decoder if modality == "image" else self.text_decoder


class SAEV(_LinearSparseAutoencoder):
    """One encoder and one decoder for both modalities."""

    def __init__(self, shared_size: int, num_concepts: int, active_concepts: int) -> None:
        super().__init__(shared_size, num_concepts, active_concepts)
        self.encoder = nn.Linear(shared_size, num_concepts)
        self.decoder = nn.Linear(num_concepts, shared_size)

    def encoder_of(self, modality: Modality) -> nn.Linear:
        return self.encoder

    def decoder_of(self, modality: Modality) -> nn.Linear:
        return self.decoder


SparseAutoencoder = VisionLanguageSAE | SAED | SAEV


class TrainableBaseline(nn.Module):
    """What `TrainableVLSAE` is for the VL-SAE: loss and use of the concepts; its gradients are autograd's."""

    def __init__(self, sae: SAED | SAEV) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, image_NS: Tensor, text_NS: Tensor) -> SparseStep:
        """Loss and use of the concepts for a batch of pairs."""
        loss, counts = torch.zeros((), dtype=image_NS.dtype, device=image_NS.device), []
        pairs: tuple[tuple[Modality, Tensor], ...] = (("image", image_NS), ("text", text_NS))
        for modality, rows_NS in pairs:
            code = self.sae.encode(rows_NS, modality)
            loss = loss + reconstruction_error(self.sae.decode(code, modality), rows_NS)
            used_L = code.concept_ids[code.activations > 0]
            counts.append(torch.bincount(used_L, minlength=self.sae.num_concepts))
        return SparseStep(loss, torch.stack(counts, dim=1).flatten())

    def encode(self, shared_NS: Tensor, modality: Modality) -> SparseCode:
        return self.sae.encode(shared_NS, modality)

    def decode(self, code: SparseCode, modality: Modality) -> Tensor:
        return self.sae.decode(code, modality)

    def published(self) -> dict[str, Tensor]:
        """Weights as they are."""
        return self.sae.state_dict()


def encode(sae: SparseAutoencoder, shared_NS: Tensor, modality: Modality) -> SparseCode:
    """The code of shared representations of one modality, whatever the kind."""
    return sae.encode(shared_NS) if isinstance(sae, VisionLanguageSAE) else sae.encode(shared_NS, modality)
