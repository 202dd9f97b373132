"""A store gives back what was put in, refuses what is damaged, and does not mind who wrote which shard when."""

import json
from collections.abc import Iterable

import pytest
import torch

from training.errors import InvalidTraining
from training.store.layout import Collected, read_manifest, shard_file
from training.store.reader import open_store, require_model
from training.store.writer import (
    PairRecord,
    Portion,
    SkippedRecord,
    begin_store,
    complete_store,
    finished_shards,
    write_shard,
)

WIDTH = 6
SIZES = (3, 0, 4, 2)
"""Pairs of each portion; one of them holds nothing that could be used."""


def collected(**changes):
    given: dict[str, object] = {
        "model": "tiny",
        "model_sha256": "ab",
        "family": "llava",
        "names": ("layer_1", "layer_2"),
        "width": WIDTH,
        "num_layers": 4,
        "pooling": "text_after_last_image",
        "prompt": "{text}",
        "model_dtype": "float32",
        "stored_dtype": "float32",
        "batch_size": 2,
        "portion_size": 4,
        "source": {"kind": "jsonl", "path": "pairs.jsonl"},
    }
    return Collected.model_validate(given | changes)


def portion(shard):
    draw = torch.Generator().manual_seed(shard)
    count = SIZES[shard]
    states = {
        name: (torch.randn(count, WIDTH, generator=draw), torch.randn(count, WIDTH, generator=draw))
        for name in ("layer_1", "layer_2")
    }
    pairs = [PairRecord(pair=10 * shard + row, text=f"text {row}", image=f"{shard}/{row}.png") for row in range(count)]
    skipped = [SkippedRecord(pair=10 * shard + 9, image=f"{shard}/9.png", reason="not an image")]
    return Portion(states=states, pairs=pairs, skipped=skipped)


def fill(folder, shards: Iterable[int] = range(len(SIZES))):
    begin_store(folder, collected(), len(SIZES))
    for shard in shards:
        write_shard(folder, shard, portion(shard), collected())
    return folder


def finish(folder):
    complete_store(folder, finished_shards(folder, len(SIZES)))
    return folder


def all_bytes(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def store_folder(tmp_path):
    return finish(fill(tmp_path / "store"))


def test_rows_come_back_in_the_order_asked_for(store_folder):
    store = open_store(store_folder, 2)
    assert (len(store), store.width, store.layer) == (9, WIDTH, 2)
    image_ND = torch.cat([portion(shard).states["layer_2"][0] for shard in range(len(SIZES))])
    text_ND = torch.cat([portion(shard).states["layer_2"][1] for shard in range(len(SIZES))])
    order = torch.tensor([8, 0, 3, 2, 4, 4, 7])
    batch = store.read(order)
    assert torch.equal(batch.image_ND, image_ND[order])
    assert torch.equal(batch.text_ND, text_ND[order])


def test_equal_texts_have_equal_numbers(store_folder):
    store = open_store(store_folder, 1)
    texts = [pair.text for pair in store.pairs()]
    ids = store.read(range(len(store))).text_ids_N.tolist()
    assert all((texts[i] == texts[j]) == (ids[i] == ids[j]) for i in range(9) for j in range(9))


def test_pairs_and_batches_cover_a_range(store_folder):
    store = open_store(store_folder, 1)
    assert [pair.image for pair in store.pairs(range(2, 5))] == ["0/2.png", "2/0.png", "2/1.png"]
    assert [pair.row for pair in store.pairs(range(2, 5))] == [2, 3, 4]
    assert [list(rows) for rows, _ in store.batches(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


def test_half_precision_on_disk_is_float32_in_memory(tmp_path):
    half = collected(stored_dtype="bfloat16")
    begin_store(tmp_path, half, 1)
    record = write_shard(tmp_path, 0, portion(0), half)
    complete_store(tmp_path, {0: record})
    batch = open_store(tmp_path, 1).read([2, 0])
    assert batch.image_ND.dtype == torch.float32
    assert torch.equal(batch.image_ND, portion(0).states["layer_1"][0][[2, 0]].bfloat16().float())


def test_an_interrupted_store_ends_with_the_same_bytes(tmp_path):
    unbroken = all_bytes(finish(fill(tmp_path / "unbroken")))
    broken = fill(tmp_path / "broken", shards=[3, 0])
    write_shard(broken, 2, portion(2), collected())
    shard_file(broken, 2, "json").unlink()  # killed before its record was written
    assert sorted(finished_shards(broken, len(SIZES))) == [0, 3]
    assert all_bytes(finish(fill(broken, shards=[1, 2]))) == unbroken


def test_the_manifest_counts(store_folder):
    manifest = read_manifest(store_folder)
    assert (manifest.complete, manifest.pairs, manifest.skipped) == (True, 9, 4)
    assert [record.pairs for record in manifest.shards] == list(SIZES)
    skipped = json.loads(shard_file(store_folder, 0, "skipped.jsonl").read_text())
    assert skipped == {"pair": 9, "image": "0/9.png", "reason": "not an image"}


@pytest.mark.parametrize("ending", ["safetensors", "jsonl", "skipped.jsonl"])
def test_a_flipped_byte_is_found_and_made_again(store_folder, ending):
    before, file = all_bytes(store_folder), shard_file(store_folder, 2, ending)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(InvalidTraining, match=file.name):
        open_store(store_folder, 1)
    assert sorted(finished_shards(store_folder, len(SIZES))) == [0, 1, 3]
    assert all_bytes(finish(fill(store_folder, shards=[2]))) == before


def test_what_is_not_finite_is_named_with_its_file(tmp_path):
    broken = portion(0)
    broken.states["layer_1"][1][2, 3] = torch.nan
    begin_store(tmp_path, collected(), 1)
    complete_store(tmp_path, {0: write_shard(tmp_path, 0, broken, collected())})
    store = open_store(tmp_path, 1)
    assert len(store.read([0, 1]).text_ND) == 2
    with pytest.raises(InvalidTraining, match=r"000000.safetensors: layer_1.text of row 2 is not finite"):
        store.read([1, 2])


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"model_sha256": "cd"}, "model_sha256"), ({"stored_dtype": "bfloat16"}, "stored_dtype"),
     ({"names": ("layer_1",)}, "names"), ({"source": {"kind": "miniature"}}, "source")],
)  # fmt: skip
def test_a_store_is_gone_on_with_only_as_it_was_begun(store_folder, changes, named):
    before = all_bytes(store_folder)
    with pytest.raises(InvalidTraining, match=f"has {named} "):
        begin_store(store_folder, collected(**changes), len(SIZES))
    assert all_bytes(store_folder) == before


def test_other_layers_models_and_unfinished_stores_are_refused(store_folder, tmp_path):
    with pytest.raises(InvalidTraining, match="layer 7 was not collected; the store holds layer_1, layer_2"):
        open_store(store_folder, 7)
    with pytest.raises(InvalidTraining, match="--layer is needed"):
        open_store(store_folder)
    with pytest.raises(InvalidTraining, match="not finished"):
        open_store(fill(tmp_path / "begun"), 1)
    with pytest.raises(InvalidTraining, match="no collection"):
        open_store(tmp_path / "nothing", 1)
    require_model(open_store(store_folder, 1), "ab", "tiny")
    with pytest.raises(InvalidTraining, match="--model other"):
        require_model(open_store(store_folder, 1), "cd", "other")


def test_no_usable_pair_at_all_is_an_error(tmp_path):
    begin_store(tmp_path, collected(), 1)
    record = write_shard(tmp_path, 0, Portion(states={}, pairs=[], skipped=portion(0).skipped), collected())
    with pytest.raises(InvalidTraining, match="none of the 1 pairs"):
        complete_store(tmp_path, {0: record})
