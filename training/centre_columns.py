"""A VL-SAE's text decoder without the column that every picture's concepts add alike.

    G_t z + b  =  (G_t - m 1^T) z + (b + m sum(z))            for any m [S]

The sum of a code's k activations hardly varies, so reconstruction does not tell the mean of the columns from the bias:
training leaves it where it fell. Realignment changes the sum, and then adds that mean whatever the picture shows. Here
m is the mean column of the pictures' concepts, and it goes into the bias.

Shapes: K concepts, S shared width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch

from steering.sparse_autoencoder import VisionLanguageSAE
from training.interpretation.scan import ConceptEncoder
from training.store.reader import PairBatch


@torch.no_grad()
def centre_text_columns(encoder: ConceptEncoder, batches: Iterable[PairBatch]) -> VisionLanguageSAE:
    """A copy whose text columns, weighted by how strong the concepts are in the batches' pictures, have mean 0."""
    assert isinstance(encoder.sae, VisionLanguageSAE)
    strength_K = torch.zeros(len(encoder.sae.encoder), dtype=torch.float64)
    sums, rows = 0.0, 0
    for batch in batches:
        codes = encoder.codes(batch)
        image, text = codes["image"], codes["text"]
        strength_K.index_add_(0, image.concept_ids.flatten(), image.activations.flatten().double())
        sums, rows = sums + float(text.activations.double().sum()), rows + len(text.activations)
    centred = copy.deepcopy(encoder.sae)
    decoder = centred.text_decoder
    mean_S = (decoder.weight.double() @ strength_K / strength_K.sum()).to(decoder.weight.dtype)
    decoder.weight.sub_(mean_S[:, None])
    decoder.bias.add_(mean_S * (sums / rows))
    return centred.eval()
