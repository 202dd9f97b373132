"""A collection that meets bad input or a full disk stops with a message, keeps what it has, and can be gone on with."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import drawn_image
from tests.training.collection.running import REPOSITORY, all_bytes, environment, finish, start
from training.collection import workers
from training.collection.lvlm import LvlmSettings
from training.collection.portion import ShardWork, make_shard
from training.collection.representer import Prepared
from training.collection.run import CollectionOptions, collect_store
from training.errors import InvalidTraining
from training.miniature.paths import LLAVA
from training.pairs import Pair, open_pairs
from training.store.layout import Collected, ShardRecord, read_manifest, shard_file
from training.store.reader import open_store

PAIRS = "miniature:dev:40"
OPTIONS = CollectionOptions(workers=(0,), batch_size=4, portion_size=16, threads=1)
MODEL = LvlmSettings(model=LLAVA, layers=(2,))


def changed(**settings):
    return MODEL.model_copy(update=settings)


def collect(output, pairs=PAIRS, representer=MODEL, **changes):
    said = []
    manifest = collect_store(output, pairs, representer, OPTIONS.model_copy(update=changes), said.append)
    return manifest, said


def test_a_store_holds_every_pair_with_its_states_in_the_source_s_order(tmp_path):
    manifest, said = collect(tmp_path)
    store = open_store(tmp_path, 2)
    assert (manifest.pairs, len(store), store.width) == (40, 40, manifest.collected.width)
    source = open_pairs(manifest.collected.source["spec"])
    found = [pair for portion in source.portions(40) for _, pair in source.read(portion)]
    pairs = [pair for pair in found if isinstance(pair, Pair)]
    assert [(row.text, row.image) for row in store.pairs()] == [(pair.text, pair.reference) for pair in pairs]
    representer, batch = MODEL.load(), store.read(range(40))
    for row in (0, 17, 39):
        prepared = representer.prepare(pairs[row])
        assert isinstance(prepared, Prepared)
        alone = representer.represent([prepared])["layer_2"]
        torch.testing.assert_close(batch.image_ND[row], alone.image_BD[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(batch.text_ND[row], alone.text_BD[0], atol=1e-5, rtol=1e-4)
        begun = [store.read([row], epoch=epoch).begun_ND[0] for epoch in range(6)]
        for prefix_D in alone.prefix_BND[0]:
            assert sum(torch.allclose(prefix_D, begun_D, atol=1e-5, rtol=1e-4) for begun_D in begun) >= 1
    assert said[-1].startswith("40 of 40 pairs (100.0 %), 0 skipped")
    assert "is complete: 40 pairs" in collect(tmp_path)[1][-1]


def test_only_what_is_missing_or_damaged_is_made_again(tmp_path):
    collect(tmp_path)
    before = all_bytes(tmp_path)
    times = {name: os.stat(tmp_path / name).st_mtime_ns for name in before}
    file = shard_file(tmp_path, 1, "safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    (tmp_path / "shards" / ".000002.safetensors.77.part").write_bytes(b"half")
    with pytest.raises(InvalidTraining, match=r"000001\.safetensors has changed"):
        open_store(tmp_path, 2)
    collect(tmp_path)
    assert all_bytes(tmp_path) == before
    again = {name for name in before if os.stat(tmp_path / name).st_mtime_ns != times[name]}
    assert {name for name in again if "00000" in name} == {name for name in before if "000001" in name}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 8}, "batch_size 4, this one 8"),
        ({"stored_dtype": "float16"}, "stored_dtype 'float32', this one 'float16'"),
        ({"representer": changed(layers=(1,))}, "names .*layer_2.*, this one .*layer_1"),
        ({"representer": changed(point="input")}, "point 'output', this one 'input'"),
        ({"pairs": "miniature:dev:41"}, "source .*40.*, this one .*41"),
        ({"skip_not_finite": True}, "skip_not_finite False, this one True"),
        ({"device": "cuda"}, "device 'cpu', this one 'cuda'"),
        ({"representer": changed(text_in="user_turn", prefixes=0)}, "text_in 'answer', this one 'user_turn'"),
        ({"representer": changed(prompts=("What?",))}, "prompts .*Describe the image.*, this one .*What"),
        ({"representer": changed(prefixes=2)}, "prefixes 3, this one 2"),
        ({"representer": changed(shortest_prefix=2)}, "shortest_prefix 1, this one 2"),
    ],
)
def test_changed_settings_are_not_gone_on_with(changes, named, tmp_path, monkeypatch):
    collect(tmp_path)
    before = all_bytes(tmp_path)
    monkeypatch.setattr(CollectionOptions, "actor_pool", lambda _: None)  # which looks for a GPU
    with pytest.raises(InvalidTraining, match=f"manifest.json: the collection there has {named}"):
        collect(tmp_path, **changes)
    assert all_bytes(tmp_path) == before


def write_pairs(folder, texts):
    folder.mkdir(exist_ok=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps({"image": "a.png", "text": text}) + "\n" for text in texts))
    return f"jsonl:{folder}/pairs.jsonl"


def test_a_moved_model_and_moved_pairs_are_gone_on_with(tmp_path, tiny_llava):
    spec = write_pairs(tmp_path / "there", ["fine"] * 20)
    drawn_image(0).save(tmp_path / "there" / "a.png")
    shutil.copytree(tiny_llava, tmp_path / "model")
    collect(tmp_path / "store", spec, LvlmSettings(model=tmp_path / "model", layers=(1,)))
    before = all_bytes(tmp_path / "store")
    shard_file(tmp_path / "store", 1, "json").unlink()
    (tmp_path / "there").rename(tmp_path / "here")
    (tmp_path / "model").rename(tmp_path / "moved")
    here, moved = f"jsonl:{tmp_path}/here/pairs.jsonl", LvlmSettings(model=tmp_path / "moved", layers=(1,))
    collect(tmp_path / "store", here, moved)
    assert all_bytes(tmp_path / "store") == before
    (tmp_path / "moved" / "tokenizer_config.json").open("a").write("\n")
    with pytest.raises(InvalidTraining, match="has processor_sha256"):
        collect(tmp_path / "store", here, moved)


def test_pictures_none_of_which_is_there_are_not_skipped_for_good(tmp_path):
    spec = write_pairs(tmp_path, ["fine"] * 8)
    with pytest.raises(InvalidTraining, match=r"pairs\.jsonl: none of 8 pictures is there, .*a\.png; are the pictures"):
        collect(tmp_path / "store", spec)
    few = write_pairs(tmp_path, ["fine"] * 7)
    with pytest.raises(InvalidTraining, match="none of the 7 pairs could be used"):
        collect(tmp_path / "few", few)
    drawn_image(0).save(tmp_path / "a.png")
    assert collect(tmp_path / "few", few)[0].pairs == 7


def test_a_source_that_shrank_is_named(tmp_path):
    spec = write_pairs(tmp_path, ["fine"] * 8)
    drawn_image(0).save(tmp_path / "a.png")
    source = open_pairs(spec)
    places = source.portions(8)
    write_pairs(tmp_path, ["fine"] * 5)
    collected = Collected(**MODEL.describe().model_dump(), stored_dtype="float32", batch_size=4, portion_size=8,
                          source=source.describe())  # fmt: skip
    work = ShardWork(store=tmp_path / "store", collected=collected, threads=1)
    with pytest.raises(InvalidTraining, match="8 pairs were there from pair 0 on, now there are 5"):
        make_shard(work, source, MODEL.load(), 0, places[0])


def test_a_shard_that_a_worker_wrote_elsewhere_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_SEEN_WITHIN_S", 0.0)
    with pytest.raises(InvalidTraining, match=r"000004\.json: a worker wrote it"):
        workers.require_seen(tmp_path, ShardRecord(shard=4, pairs=1, skipped=0, sha256={}))


def test_what_cannot_be_used_is_listed_beside_its_shard(tmp_path):
    drawn_image(0).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    texts = ["fine", "", "word " * 10_000, "an <image> here", "星 ⭐ نجمة"]
    rows = [{"image": "a.png", "text": text} for text in texts] + [{"image": "b.png", "text": "fine"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest, said = collect(tmp_path / "store", f"jsonl:{tmp_path}/pairs.jsonl")
    assert (manifest.pairs, manifest.skipped) == (2, 4)
    assert "6 of 6 pairs (100.0 %), 4 skipped" in said[-1]
    listed = [json.loads(line) for line in shard_file(tmp_path / "store", 0, "skipped.jsonl").read_text().splitlines()]
    assert [(row["pair"], row["image"], row["reason"].split(";")[0]) for row in listed] == [
        (1, "a.png", "empty caption"),
        (2, "a.png", listed[1]["reason"].split(";")[0]),
        (3, "a.png", "the caption spells the special token <image>"),
        (5, "b.png", "not an image"),
    ]
    assert "the model's context is" in listed[1]["reason"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:4]))
    with pytest.raises(InvalidTraining, match="none of the 3 pairs could be used"):
        collect(tmp_path / "nothing", f"jsonl:{tmp_path}/pairs.jsonl")


def test_captions_shorter_than_the_shortest_prefix_are_listed_beside_their_shard(tmp_path, tiny_llava):
    drawn_image(0).save(tmp_path / "a.png")
    spec = write_pairs(tmp_path, ["a star", "star", "a longer star", "-"])  # a token per byte, and a space before
    model = LvlmSettings(model=tiny_llava, layers=(1,), prefixes=2, shortest_prefix=7)
    manifest, said = collect(tmp_path / "store", spec, model)
    assert (manifest.pairs, manifest.skipped) == (2, 2)
    assert "4 of 4 pairs (100.0 %), 2 skipped" in said[-1]
    listed = [json.loads(line) for line in shard_file(tmp_path / "store", 0, "skipped.jsonl").read_text().splitlines()]
    assert [(row["pair"], row["reason"]) for row in listed] == [
        (1, "the caption has 5 tokens, the shortest prefix 7"),
        (3, "the caption has 2 tokens, the shortest prefix 7"),
    ]
    assert [row.text for row in open_store(tmp_path / "store").pairs()] == ["a star", "a longer star"]


@pytest.mark.parametrize("text_in", ["answer", "user_turn"])
def test_an_interrupted_collection_ends_with_the_same_bytes(tmp_path, text_in, monkeypatch):
    """With prefixes and without."""
    settings = changed(text_in=text_in, prefixes=3 if text_in == "answer" else 0, layers=(1, 3))
    collect(tmp_path / "whole", representer=settings)
    made = []

    def interrupt(work, source, representer, shard, place):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(shard)
        return make_shard(work, source, representer, shard, place)

    with monkeypatch.context() as patched:
        patched.setattr(workers, "make_shard", interrupt)
        with pytest.raises(KeyboardInterrupt):
            collect(tmp_path / "broken", representer=settings)
    assert not read_manifest(tmp_path / "broken").complete
    again = LvlmSettings.model_validate_json(settings.model_dump_json())
    collect(tmp_path / "broken", representer=again)
    assert all_bytes(tmp_path / "broken") == all_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("value", "changes", "remedy"),
    [
        (float("nan"), {}, r"another --dtype \(the model ran in float32\)"),
        (1e30, {"stored_dtype": "float16"}, r"another --stored-dtype \(float16 ends at 65504\)"),
    ],
)
def test_a_state_that_is_not_finite_is_named_and_never_stored(value, changes, remedy, tiny_llava, tmp_path):
    model = shutil.copytree(tiny_llava, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["language_model.model.embed_tokens.weight"][ord("q") - ord("!")] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    drawn_image(0).save(tmp_path / "a.png")
    texts = ["fine"] * 20 + ["a q here"] + ["fine"] * 3
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"image": "a.png", "text": t}) + "\n" for t in texts))
    with pytest.raises(InvalidTraining, match=rf"layer_1\.\w+ of pair 20 \(a\.png\) is not finite.*{remedy}"):
        collect(tmp_path / "store", f"jsonl:{tmp_path}/pairs.jsonl", LvlmSettings(model=model, layers=(1,)), **changes)
    assert not read_manifest(tmp_path / "store").complete
    assert shard_file(tmp_path / "store", 0, "json").exists()
    assert not shard_file(tmp_path / "store", 1, "json").exists()
    model_settings, spec = LvlmSettings(model=model, layers=(1,)), f"jsonl:{tmp_path}/pairs.jsonl"
    manifest, _ = collect(tmp_path / "without", spec, model_settings, skip_not_finite=True, **changes)
    assert (manifest.pairs, manifest.skipped) == (23, 1)
    assert [row.text for row in open_store(tmp_path / "without", 1).pairs(range(18, 23))] == ["fine"] * 5
    open_store(tmp_path / "without", 1).read(range(23))
    listed = json.loads(shard_file(tmp_path / "without", 1, "skipped.jsonl").read_text())
    assert (listed["pair"], listed["reason"].split(".")[0]) == (20, "layer_1")


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    manifest, said = collect(tmp_path, pairs="miniature:dev:2")
    assert manifest.complete
    assert said[0] == f"warning: {tmp_path} cannot be locked (No locks available); start no second collection there"


def test_two_collections_do_not_write_into_one_store(tmp_path):
    descriptor = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(InvalidTraining, match="another collection writes there"):
        collect(tmp_path)
    os.close(descriptor)
    assert collect(tmp_path)[0].complete


@pytest.mark.parametrize("workers", [(2, 1), (1, 2, 3), (0, 2), (-1,)])
def test_numbers_of_workers_that_make_no_sense_are_named(workers, tmp_path):
    with pytest.raises(InvalidTraining, match="--workers"):
        collect(tmp_path, workers=workers)


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="all eight workers would have one")
@pytest.mark.parametrize("workers", [(1, 8), (8,)])
def test_gpus_that_are_not_there_are_not_waited_for(workers):
    there = torch.cuda.device_count()
    with pytest.raises(InvalidTraining, match=f"--device cuda: 8 workers need a GPU each, this machine has {there}"):
        OPTIONS.model_copy(update={"workers": workers, "device": "cuda"}).actor_pool()


@pytest.mark.parametrize(
    ("workers", "device", "named"),
    [((1,), "cuda:1", "a worker takes cpu or cuda"), ((0,), "cuda:99", "this machine has"), ((0,), "disk", "no such")],
)
def test_a_device_that_cannot_be_used_is_named(workers, device, named):
    with pytest.raises(InvalidTraining, match=f"--device {device}: {named}"):
        OPTIONS.model_copy(update={"workers": workers, "device": device}).actor_pool()


ON_A_SMALL_DISK = """
import json, subprocess, sys
from pathlib import Path
from tests.training.collection.running import all_bytes
from tests.training.collection.test_run import collect
from training.errors import InvalidTraining

disk, elsewhere = map(Path, sys.argv[1:])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
try:
    collect(disk / "store")
except InvalidTraining as error:
    said = str(error)
made = len(list(disk.glob("store/shards/*[0-9].json")))
subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
collect(disk / "store")
collect(elsewhere)
print(json.dumps({"said": said, "made": made, "same": all_bytes(disk / "store") == all_bytes(elsewhere)}))
"""


@pytest.mark.slow
def test_a_full_disk_is_named_and_with_room_the_same_command_finishes(tmp_path):
    own_mounts = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        subprocess.run([*own_mounts, "mount", "-t", "tmpfs", "tmpfs", tmp_path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system of our own can be mounted here")
    (tmp_path / "disk").mkdir()
    command = [*own_mounts, sys.executable, "-c", ON_A_SMALL_DISK, str(tmp_path / "disk"), str(tmp_path / "elsewhere")]
    shown = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout.splitlines()[-1])
    assert "store/shards/0000" in found["said"]
    assert "cannot be written" in found["said"]
    assert "make room, then run the same command again" in found["said"]
    assert 0 < found["made"] < 3
    assert found["same"]


@pytest.mark.slow
def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path):
    run = start(tmp_path / "store", "--workers", "0", "--pairs", f"webdataset:{tmp_path}/*.tar")
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 2
    assert said.splitlines()[-1] == f"error: --pairs webdataset:{tmp_path}/*.tar: no file matches"
    assert "Traceback" not in said
    with pytest.raises(AssertionError, match="--layers: the model has layers"):
        finish(start(tmp_path / "store", "--workers", "0", "--layers", "77"))
