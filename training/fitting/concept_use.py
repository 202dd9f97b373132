"""Which concepts are used, counted while training: how often since the last evaluation, and when last.

Shapes: K concepts; column 0 is the image's, column 1 the text's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from steering.sparse_autoencoder import Modality
from training.fitting.workers import Worker

COLUMNS: dict[Modality, int] = {"image": 0, "text": 1}


class ConceptUse(nn.Module):
    """Counts as buffers, which checkpoints keep. A concept is dead if no row of the last epoch used it."""

    counts_K2: Tensor
    """Rows that used each concept since the last evaluation."""
    last_used_K2: Tensor
    """Step, from 1, in which each was last used; 0: never."""
    rows: Tensor
    """Pairs since the last evaluation."""
    steps: Tensor
    """Steps in all."""

    def __init__(self, num_concepts: int, steps_per_epoch: int) -> None:
        super().__init__()
        self.steps_per_epoch = steps_per_epoch
        self.register_buffer("counts_K2", torch.zeros(num_concepts, 2, dtype=torch.int64))
        self.register_buffer("last_used_K2", torch.zeros(num_concepts, 2, dtype=torch.int64))
        self.register_buffer("rows", torch.zeros((), dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def add(self, counts_K2: Tensor, pairs: int) -> None:
        """What one step used."""
        self.steps += 1
        self.rows += pairs
        self.counts_K2 += counts_K2
        self.last_used_K2.copy_(torch.where(counts_K2 > 0, self.steps, self.last_used_K2))

    def gather(self, worker: Worker) -> None:
        """On the worker that leads: the use by all; the others' counts start anew."""
        worker.take_largest(self.last_used_K2)
        for total in (self.counts_K2, self.rows):
            worker.add_up(total)
            if not worker.leads:
                total.zero_()

    def start_window(self) -> None:
        """Counts start anew; what is dead does not."""
        self.counts_K2.zero_()
        self.rows.zero_()

    @property
    def dead_K2(self) -> Tensor:
        """Not used for an epoch; in the first one, not yet used."""
        return self.last_used_K2 <= (self.steps - self.steps_per_epoch).clamp(min=0)

    def frequencies_K(self, modality: Modality) -> Tensor:
        """Share of the rows since the last evaluation that used each concept."""
        return self.counts_K2[:, COLUMNS[modality]].float() / self.rows.clamp(min=1)

    def measures(self) -> dict[str, float]:
        """Dead concepts and the typical frequencies, by modality."""
        found = {}
        for modality, column in COLUMNS.items():
            frequencies_K = self.frequencies_K(modality)
            found[f"{modality}/dead_fraction"] = float(self.dead_K2[:, column].float().mean())
            found[f"{modality}/frequency_median"] = float(frequencies_K.median())
            found[f"{modality}/frequency_max"] = float(frequencies_K.max())
        return found
