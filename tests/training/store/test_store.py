"""A store gives back what was put in, refuses what is damaged, and does not mind who wrote which shard when."""

import json
from collections.abc import Iterable

import pytest
import torch
from safetensors.torch import load_file

from training.collection.representer import States
from training.errors import InvalidTraining
from training.store.layout import Collected, hash_text, read_manifest, shard_file
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

WIDTH, PREFIXES = 6, 2
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
        "text_in": "answer",
        "prompts": ("Say {text}", "Tell {text}"),
        "prefixes": PREFIXES,
        "shortest_prefix": 3,
        "model_dtype": "float32",
        "stored_dtype": "float32",
        "batch_size": 2,
        "portion_size": 4,
        "source": {"kind": "jsonl", "path": "pairs.jsonl"},
    }
    return Collected.model_validate(given | changes)


def portion(shard, prefixes=PREFIXES):
    """Two rows each show one picture; rows of all portions say the same."""
    draw = torch.Generator().manual_seed(shard)
    count = SIZES[shard]
    states = {
        name: States.of([torch.randn(count, WIDTH, generator=draw) for _ in range(2 + prefixes)])
        for name in ("layer_1", "layer_2")
    }
    pairs = [
        PairRecord(pair=10 * shard + row, text=f"text {row}", image=f"{shard}/{row // 2}.png") for row in range(count)
    ]
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


ORDER = torch.tensor([8, 0, 3, 2, 4, 4, 7])


def whole(name="layer_2", prefixes=PREFIXES):
    """What was put in, all portions in a row."""
    parts = [portion(shard, prefixes).states[name] for shard in range(len(SIZES))]
    return States(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def test_rows_come_back_in_the_order_asked_for(store_folder):
    store = open_store(store_folder, 2)
    assert (len(store), store.width, store.layer) == (9, WIDTH, 2)
    for epoch in (0, 1, 7):
        batch = store.read(ORDER, epoch=epoch)
        assert torch.equal(batch.image_ND, whole().image_BD[ORDER])
        assert torch.equal(batch.text_ND, whole().text_BD[ORDER])


def test_the_whole_has_every_other_epoch_and_the_prefixes_those_between_in_turn(store_folder):
    store, stored = open_store(store_folder, 2), whole()
    choices = torch.cat((stored.prefix_BND, stored.text_BD[:, None]), dim=1)
    seen = []
    for epoch in range(4 * PREFIXES):
        begun_ND = store.read(ORDER, epoch=epoch).begun_ND
        hits = (choices[ORDER] == begun_ND[:, None]).all(2)
        assert hits.sum(1).tolist() == [1] * len(ORDER)
        seen.append(hits.int().argmax(1))
    turns = torch.stack(seen)
    for column in range(len(ORDER)):
        once = turns[: 2 * PREFIXES, column].tolist()
        assert sorted(once) == sorted([*range(PREFIXES), *[PREFIXES] * PREFIXES])
        assert [turn == PREFIXES for turn in once] in ([True, False] * PREFIXES, [False, True] * PREFIXES)
        assert once == turns[2 * PREFIXES :, column].tolist()
    assert len(set(turns[0].tolist())) > 1, "the turns of an epoch are not all the same"
    assert torch.equal(store.read(ORDER).begun_ND, store.read(ORDER, epoch=0).begun_ND)
    assert torch.equal(store.read([4], epoch=5).begun_ND, store.read(ORDER, epoch=5).begun_ND[4:5])


def test_without_prefixes_what_is_begun_is_the_whole(tmp_path):
    plain = collected(prefixes=0)
    begin_store(tmp_path, plain, len(SIZES))
    for shard in range(len(SIZES)):
        write_shard(tmp_path, shard, portion(shard, prefixes=0), plain)
    store = open_store(finish(tmp_path), 2)
    for epoch in range(3):
        batch = store.read(ORDER, epoch=epoch)
        assert torch.equal(batch.text_ND, whole(prefixes=0).text_BD[ORDER])
        assert torch.equal(batch.begun_ND, batch.text_ND)
    assert not any("prefixes" in name for name in load_file(shard_file(tmp_path, 0, "safetensors")))


def test_a_shard_holds_what_the_layout_says(store_folder):
    """As any reader of safetensors finds it."""
    for shard, count in enumerate(SIZES):
        tensors, states = load_file(shard_file(store_folder, shard, "safetensors")), portion(shard)
        expected = {"text_hash": [hash_text(row.text) for row in states.pairs],
                    "image_hash": [hash_text(row.image) for row in states.pairs]}  # fmt: skip
        for name, numbers in expected.items():
            assert tensors.pop(name).tolist() == numbers
        for name, (image_ND, text_ND, prefix_NPD) in states.states.items():
            assert torch.equal(tensors.pop(f"{name}.image"), image_ND)
            assert torch.equal(tensors.pop(f"{name}.text"), text_ND)
            assert torch.equal(tensors.pop(f"{name}.prefixes").view(count, PREFIXES, WIDTH), prefix_NPD)
        assert not tensors


def test_equal_texts_and_equal_pictures_have_equal_numbers(store_folder):
    store = open_store(store_folder, 1)
    pairs, batch = list(store.pairs()), store.read(range(len(store)))
    for said, ids in (
        ([pair.text for pair in pairs], batch.text_ids_N.tolist()),
        ([pair.image for pair in pairs], batch.image_ids_N.tolist()),
    ):
        assert 1 < len(set(said)) < 9
        assert all((said[i] == said[j]) == (ids[i] == ids[j]) for i in range(9) for j in range(9))
    assert batch.image_ids_N.dtype == torch.int64
    assert torch.equal(store.read(ORDER).image_ids_N, batch.image_ids_N[ORDER])


def test_pairs_and_batches_cover_a_range(store_folder):
    store = open_store(store_folder, 1)
    assert [pair.image for pair in store.pairs(range(2, 5))] == ["0/1.png", "2/0.png", "2/0.png"]
    assert [pair.row for pair in store.pairs(range(2, 5))] == [2, 3, 4]
    assert [list(rows) for rows, _ in store.batches(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


def test_half_precision_on_disk_is_float32_in_memory(tmp_path):
    half = collected(stored_dtype="bfloat16")
    begin_store(tmp_path, half, 1)
    record = write_shard(tmp_path, 0, portion(0), half)
    complete_store(tmp_path, {0: record})
    stored = portion(0).states["layer_1"]
    batch = open_store(tmp_path, 1).read([2, 0])
    assert batch.image_ND.dtype == batch.begun_ND.dtype == torch.float32
    assert torch.equal(batch.image_ND, stored.image_BD[[2, 0]].bfloat16().float())
    prefix = open_store(tmp_path, 1).read([0], epoch=2).begun_ND
    assert torch.equal(prefix, stored.prefix_BND[[0], 1].bfloat16().float())


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


@pytest.mark.parametrize(("part", "named"), [(0, "image"), (1, "text"), (2, "prefixes")])
def test_what_is_not_finite_is_named_with_its_file(tmp_path, part, named):
    broken = portion(0)
    broken.states["layer_1"][part][2, ..., 3] = torch.nan
    begin_store(tmp_path, collected(), 1)
    complete_store(tmp_path, {0: write_shard(tmp_path, 0, broken, collected())})
    store = open_store(tmp_path, 1)
    assert len(store.read([0, 1]).text_ND) == 2
    with pytest.raises(InvalidTraining, match=rf"000000.safetensors: layer_1.{named} of row 2 is not finite"):
        store.read([1, 2], epoch=2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"model_sha256": "cd"}, "model_sha256"), ({"stored_dtype": "bfloat16"}, "stored_dtype"),
     ({"names": ("layer_1",)}, "names"), ({"source": {"kind": "miniature"}}, "source"),
     ({"text_in": "user_turn"}, "text_in"), ({"prompts": ("Say {text}",)}, "prompts"), ({"prefixes": 3}, "prefixes"),
     ({"shortest_prefix": 1}, "shortest_prefix")],
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


def test_stores_of_an_earlier_version_are_refused_with_what_to_do(store_folder):
    """They have no prefixes and no numbers of their pictures."""
    file = store_folder / "manifest.json"
    manifest = json.loads(file.read_text())
    assert manifest["format_version"] == 2
    before = {**manifest["collected"], "prompt": "USER: <image>\n{text} ASSISTANT:"}
    for name in ("text_in", "prompts", "prefixes", "shortest_prefix"):
        del before[name]
    for old in (manifest | {"format_version": 1, "collected": before}, manifest | {"format_version": 1}):
        file.write_text(json.dumps(old))
        for use in (lambda: open_store(store_folder, 1), lambda: begin_store(store_folder, collected(), len(SIZES))):
            with pytest.raises(
                InvalidTraining, match=r"manifest\.json is not a manifest .* of format 2; collect again"
            ):
                use()


def test_no_usable_pair_at_all_is_an_error(tmp_path):
    begin_store(tmp_path, collected(), 1)
    record = write_shard(tmp_path, 0, Portion(states={}, pairs=[], skipped=portion(0).skipped), collected())
    with pytest.raises(InvalidTraining, match="none of the 1 pairs"):
        complete_store(tmp_path, {0: record})
