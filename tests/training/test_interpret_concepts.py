"""From a store of drawn scenes to concepts whose meaning is known beforehand: concept i is the shape i."""

import base64
import json

import pytest
import torch
from safetensors.torch import save_file

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from training.collection.representer import States
from training.durable_files import sha256_of
from training.errors import InvalidTraining
from training.interpret_concepts import main, require_concepts_of
from training.miniature.paths import CLIP
from training.miniature.world import SHAPES, scene_from_seed
from training.pairs import open_pairs
from training.pairs.miniature import miniature_pair
from training.run_folder import SPARSE_KINDS, RunConfig, identify_store
from training.store.layout import Collected
from training.store.reader import open_store
from training.store.writer import PairRecord, Portion, begin_store, complete_store, write_shard

PAIRS, START, PER_SHARD = 90, 40_000, 40
SPEC = f"miniature:dev:{PAIRS}:{START}"
SIZE, SILENT = len(SHAPES) + 1, len(SHAPES)
"""S and K: a direction for each shape, and one that no scene has."""


def shapes_of(seed):
    states = torch.zeros(SIZE)
    for shape in scene_from_seed(seed).shapes:
        states[SHAPES.index(shape)] = 1.0
    return states


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """v and t say which shapes are in the scene."""
    folder = tmp_path_factory.mktemp("interpret") / "store"
    source = open_pairs(SPEC)
    collected = Collected(
        model="made up", model_sha256="0" * 64, family="llava", names=("layer_3",), width=SIZE, num_layers=5,
        pooling="text_after_last_image", text_in="answer", model_dtype="float32", stored_dtype="float32", batch_size=8,
        portion_size=PER_SHARD, source=source.describe(),
    )  # fmt: skip
    portions = source.portions(PER_SHARD)
    begin_store(folder, collected, len(portions))
    records = {}
    for number, portion in enumerate(portions):
        pairs = [(index, pair) for index, pair in source.read(portion)]
        seeds = [int(pair.reference.removeprefix("scene:")) for _, pair in pairs]
        states = torch.stack([shapes_of(seed) for seed in seeds])
        rows = [PairRecord(pair=index, text=miniature_pair(seed).text, image=f"scene:{seed}")
                for (index, _), seed in zip(pairs, seeds, strict=True)]  # fmt: skip
        portion = Portion(states={"layer_3": States.of([states, states.clone()])}, pairs=rows, skipped=[])
        records[number] = write_shard(folder, number, portion, collected)
    complete_store(folder, records)
    return folder


def write_run(folder, store, kind, module, **config):
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, folder / "model.safetensors")
    identity = identify_store(open_store(store))
    run = RunConfig(kind=kind, settings={}, shared_size=SIZE, store=identity, **config)
    (folder / "config.json").write_text(run.model_dump_json())
    return folder


def identity_module(module):
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(torch.eye(SIZE) if "bias" not in name else torch.zeros(SIZE))
    return module


@pytest.fixture(scope="module")
def runs(store, tmp_path_factory):
    """A run of each kind behind the same auxiliary autoencoder, and a VL-SAE behind none."""
    folder = tmp_path_factory.mktemp("runs")
    auxiliary = write_run(folder / "auxiliary", store, "auxiliary", identity_module(AuxiliaryAutoencoder(SIZE, SIZE)))
    digest = sha256_of(auxiliary / "model.safetensors")
    for kind, module in SPARSE_KINDS.items():
        active = 3 if kind == "vl_sae" else 5
        made = identity_module(module(SIZE, SIZE, active))
        shape = {"num_concepts": SIZE, "active_concepts": active}
        write_run(folder / kind, store, kind, made, auxiliary_sha256=digest, **shape)
        write_run(folder / f"{kind}_alone", store, kind, made, **shape)
    return folder


def run(*options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["interpret_concepts", *map(str, options)])
        main()


def records_of(folder):
    return [json.loads(line) for line in (folder / "concepts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def output(store, runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("output")
    run("--representations", store, "--sparse", runs / "vl_sae", "--auxiliary", runs / "auxiliary", "--clip", CLIP,
        "--top-texts", 6, "--top-images", 4, "--batch-size", 16, "--device", "cpu", "--output", folder)  # fmt: skip
    return folder


def assert_shapes_are_found(records):
    """Every shape is in its concept's label, its texts and, by the scene's truth, in its pictures."""
    for number, shape in enumerate(SHAPES):
        record = records[number]
        assert record["id"] == number
        assert shape in record["label"].split(", ")
        assert all(shape in text for text in record["texts"])
        seeds = [int(image["reference"].removeprefix("scene:")) for image in record["images"]]
        assert seeds
        assert all(shape in scene_from_seed(seed).shapes for seed in seeds)


def test_concepts_are_what_their_scenes_share(output):
    records = records_of(output)
    assert_shapes_are_found(records)
    assert len({record["label"] for record in records}) == len(records)
    assert max(len(record["texts"]) for record in records) == 6
    assert max(len(record["images"]) for record in records) == 4


def test_mean_activation_is_over_both_modalities_and_zeros(output, store):
    states = open_store(store).read(range(PAIRS)).image_ND
    cosine = states / states.norm(dim=1, keepdim=True)
    activation = 2 - (2 - 2 * cosine).clamp(min=1e-8).sqrt()
    kept = activation.topk(3).indices
    mean = torch.zeros_like(activation).scatter_(1, kept, activation.gather(1, kept)).mean(0)
    found = [record["mean_activation"] for record in records_of(output)]
    torch.testing.assert_close(torch.tensor(found), mean, atol=1e-5, rtol=0)


def test_records_have_the_fields_of_an_artifact_s_concepts(output):
    for record in records_of(output):
        assert list(record) == ["id", "label", "mean_activation", "texts", "images"]
        for image in record["images"]:
            assert list(image) == ["reference", "thumbnail"]
            assert base64.b64decode(image["thumbnail"].removeprefix("data:image/jpeg;base64,"))[:2] == b"\xff\xd8"


def test_a_clip_judges_concepts_and_the_control(output):
    measured = json.loads((output / "similarity.json").read_text())
    assert measured["concepts"]["cross"] > measured["shuffled"]["cross"] + 0.05  # the same scenes in both modalities
    for part in measured.values():
        assert set(part) == {"intra", "inter", "cross"}
        assert all(-1 <= part[score][modality] <= 1 for score in ("intra", "inter") for modality in ("image", "text"))


def test_the_atlas_has_its_thumbnails(output):
    chunk = (output / "atlas/data/chunk_0000.js").read_text()
    entries = json.loads(chunk[chunk.index("[") : chunk.rindex(")")])
    files = [image["thumbnail"] for entry in entries for image in entry["images"]]
    assert files
    assert all((output / "atlas" / file).stat().st_size > 100 for file in files)


@pytest.mark.parametrize("kind", ["sae_d", "sae_v", "vl_sae"])
def test_every_kind_of_autoencoder_with_and_without_an_auxiliary_one(store, runs, tmp_path, kind):
    behind = ["--representations", store, "--pairs", "none", "--device", "cpu"]
    run(*behind, "--sparse", runs / kind, "--auxiliary", runs / "auxiliary", "--output", tmp_path / "with")
    run(*behind, "--sparse", runs / f"{kind}_alone", "--output", tmp_path / "alone")
    records = records_of(tmp_path / "with")
    assert_shapes_are_found(records)
    assert records == records_of(tmp_path / "alone")
    assert all(image["thumbnail"] is None for record in records for image in record["images"])
    if kind != "vl_sae":
        assert records[SILENT] == {"id": SILENT, "label": "", "mean_activation": 0.0, "texts": [], "images": []}


def test_batches_change_nothing(store, runs, tmp_path):
    for size in (7, 90):
        run("--representations", store, "--pairs", "none", "--sparse", runs / "vl_sae_alone", "--batch-size", size,
            "--output", tmp_path / str(size))  # fmt: skip
    assert (tmp_path / "7/concepts.jsonl").read_bytes() == (tmp_path / "90/concepts.jsonl").read_bytes()


BAD = {
    "a run behind an auxiliary one, alone": (["--sparse", "vl_sae"], "--auxiliary is needed"),
    "a run behind none, with one": (["--sparse", "vl_sae_alone", "--auxiliary", "auxiliary"], "give no --auxiliary"),
    "pictures of elsewhere": (["--sparse", "vl_sae_alone", "--pairs", "miniature:demo:3"], "none of the .* pictures"),
    "CLIP without pictures": (["--sparse", "vl_sae_alone", "--pairs", "none", "--clip", "clip"], "it needs --pairs"),
    "no CLIP there": (["--sparse", "vl_sae_alone", "--clip", "nowhere"], "--clip nowhere: open_clip_config.json"),
    "the auxiliary one as the sparse": (["--sparse", "auxiliary"], "a sparse autoencoder is needed"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_named(store, runs, tmp_path, options, message):
    options = [runs / part if (runs / part).is_dir() else part for part in options]
    with pytest.raises(InvalidTraining, match=message):
        run("--representations", store, *options, "--output", tmp_path)


@pytest.mark.parametrize(("field", "value"), [("model_sha256", "1" * 64), ("text_in", "user_turn"), ("point", "input")])
@pytest.mark.parametrize("which", ["sparse", "auxiliary"])
def test_a_run_on_other_states_is_refused(store, runs, tmp_path, which, field, value):
    given = {"sparse": runs / "vl_sae", "auxiliary": runs / "auxiliary"}
    config = json.loads((given[which] / "config.json").read_text())
    config["store"][field] = value
    given[which] = tmp_path / "other"
    given[which].mkdir()
    (given[which] / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InvalidTraining, match=rf"manifest\.json: {field} is .*, but .*other/config\.json was trained on"
    ):
        run("--representations", store, "--sparse", given["sparse"], "--auxiliary", given["auxiliary"],
            "--output", tmp_path / "out")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_it_is_written_down_whose_concepts_these_are(output, runs, tmp_path):
    require_concepts_of(runs / "vl_sae", output)
    with pytest.raises(
        InvalidTraining, match=r"are those of another run than --sparse .*sae_d; run interpret_concepts"
    ):
        require_concepts_of(runs / "sae_d", output)
    for content in (None, "", "[", "{}"):
        if content is not None:
            (tmp_path / "interpreted.json").write_text(content)
        with pytest.raises(
            InvalidTraining, match=r"interpreted\.json, which says whose .*; run interpret_concepts again"
        ):
            require_concepts_of(runs / "vl_sae", tmp_path)
