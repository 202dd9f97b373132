"""A small store whose images and texts are two noisy views of the same hidden numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training.collection.representer import States
from training.store.layout import Collected
from training.store.writer import PairRecord, Portion, begin_store, complete_store, write_shard

WIDTH, HIDDEN, PREFIXES = 24, 8, 3
Change = Callable[[torch.Tensor, torch.Tensor], None]


@pytest.fixture(scope="session")
def make_store():
    """make_store(folder, pairs=..., seed=..., change=...) writes one; what is given to Collected replaces its own.

    Each picture has two texts, one behind the other; a prefix of a text is the text moved in one direction.
    """

    def make(folder: Path, *, pairs: int = 400, seed: int = 0, change: Change | None = None, **collected) -> Path:
        torch.manual_seed(seed)
        content = torch.randn(pairs // 2, HIDDEN).repeat_interleave(2, dim=0)
        image_ND, text_ND = (
            content @ torch.randn(HIDDEN, WIDTH) + offset + 0.05 * torch.randn(pairs, WIDTH) for offset in (5.0, -3.0)
        )
        image_ND[1::2] = image_ND[::2]
        if change:
            change(image_ND, text_ND)
        return write_store(folder, image_ND, text_ND, text_ND[:, None] + torch.randn(pairs, PREFIXES, 1), **collected)

    return make


def write_store(
    folder: Path, image_ND: torch.Tensor, text_ND: torch.Tensor, prefix_NPD: torch.Tensor, **changed
) -> Path:
    """As many of the prefixes as are wanted."""
    settings = {
        "model": "a model", "model_sha256": "0" * 64, "family": "llava", "names": ("layer_3",), "width": WIDTH,
        "num_layers": 5, "pooling": "text_after_last_image", "text_in": "answer", "prefixes": PREFIXES,
        "model_dtype": "float32", "stored_dtype": "float32", "batch_size": 32, "portion_size": 150,
        "source": {"kind": "test"},
    }  # fmt: skip
    collected = Collected(**(settings | changed))
    starts = range(0, len(image_ND), collected.portion_size)
    begin_store(folder, collected, len(starts))
    records = {}
    for shard, start in enumerate(starts):
        rows = range(start, min(start + collected.portion_size, len(image_ND)))
        part = slice(rows.start, rows.stop)
        prefixes_ND = prefix_NPD[part, : collected.prefixes].unbind(1)
        portion = Portion(
            states={
                name: States.of([tensor.clone() for tensor in (image_ND[part], text_ND[part], *prefixes_ND)])
                for name in collected.names
            },
            pairs=[PairRecord(pair=row, text=f"text {row}", image=f"image {row // 2}") for row in rows],
            skipped=[],
        )
        records[shard] = write_shard(folder, shard, portion, collected)
    complete_store(folder, records)
    return folder


@pytest.fixture(scope="session")
def store(make_store, tmp_path_factory):
    """400 pairs of width 24."""
    return make_store(tmp_path_factory.mktemp("representations") / "store")
