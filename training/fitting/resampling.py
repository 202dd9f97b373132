"""A new start for concepts that nothing uses. Optional; without it a run is the paper's.

After Bricken et al., 'Towards Monosemanticity' (2023), appendix 'neuron resampling': a dead concept's vector becomes a
training example drawn with probability proportional to its squared error, and its optimiser state is forgotten. Ours
differs where the VL-SAE does: only a concept vector's direction counts, so it has no scale to choose, and decoder rows
start at zero, as an activation is about 1 and not near 0 from the first step on.

Shapes: N pairs, S shared width, K concepts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steering.sparse_autoencoder import Modality
from training.fitting.workers import Worker
from training.sparse_step import TrainableVLSAE


@torch.no_grad()
def resample_dead(
    trained: TrainableVLSAE,
    dead_K: Tensor,
    image_NS: Tensor,
    text_NS: Tensor,
    optimizer: torch.optim.Optimizer,
    worker: Worker,
    *,
    seed: int,
) -> int:
    """How many got one. The workers must agree on `dead_K` and the pairs; what is drawn is the leading one's."""
    concepts = dead_K.nonzero()[:, 0]
    if len(concepts):
        rows_MS = torch.cat((image_NS, text_NS))
        generator = torch.Generator().manual_seed(seed)
        squared_M = torch.cat((_error(trained, image_NS, "image"), _error(trained, text_NS, "text"))).square()
        drawn = torch.multinomial(squared_M.cpu().double(), len(concepts), replacement=True, generator=generator)
        norms_K = trained.encoder_KS.norm(dim=1)
        table_rows = torch.cat((2 * concepts, 2 * concepts + 1))
        unit_CS = torch.nn.functional.normalize(rows_MS[drawn.to(rows_MS.device)], dim=1)
        trained.encoder_KS[concepts] = unit_CS * norms_K[concepts, None]
        trained.decoder_2KS[table_rows] = 0
        for parameter, places in ((trained.encoder_KS, concepts), (trained.decoder_2KS, table_rows)):
            for name in ("exp_avg", "exp_avg_sq"):
                optimizer.state[parameter][name][places] = 0
            worker.copy_from_lead(parameter)
    return len(concepts)


def _error(trained: TrainableVLSAE, rows_NS: Tensor, modality: Modality) -> Tensor:
    return (trained.decode(trained.encode(rows_NS, modality), modality) - rows_NS).square().sum(1)
