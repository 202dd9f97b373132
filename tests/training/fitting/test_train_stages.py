"""Both train stages, end to end on a small store."""

import copy
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load_file

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.sparse_autoencoder import VisionLanguageSAE
from training.alignment import FAITHFULNESS, alignment_gate, measure_alignment
from training.baseline_autoencoders import encode
from training.errors import InvalidTraining
from training.fitting.quality import reconstruction_quality, retrieval_of_codes, retrieval_of_vectors
from training.fitting.sparse_objective import SparseObjective
from training.fitting.workers import Worker
from training.run_folder import (
    Centre,
    read_auxiliary,
    read_centre,
    read_run_config,
    read_sparse,
    shared_representations,
)
from training.sparse_step import TrainableVLSAE
from training.store.reader import open_store
from training.train_auxiliary_autoencoder import AuxiliaryObjective, AuxiliaryTraining, train_auxiliary_autoencoder
from training.train_auxiliary_autoencoder import CommandLine as AuxiliaryCommandLine
from training.train_sparse_autoencoder import CommandLine as SparseCommandLine
from training.train_sparse_autoencoder import train_sparse_autoencoder

HELD_OUT = 100
AUXILIARY = {
    "shared_size": 16, "contrastive_weight": 0.1, "learning_rate": 1e-2, "batch_size": 60, "epochs": 40,
    "weight_decay": 0.0, "held_out": HELD_OUT, "evaluate_every": 50,
}  # fmt: skip
SPARSE = {
    "num_concepts": 64, "active_concepts": 8, "learning_rate": 1e-2, "batch_size": 60, "epochs": 12,
    "warmup_epochs": 2, "held_out": HELD_OUT, "evaluate_every": 20,
}  # fmt: skip
OF_CLIP = {"names": ("embedding",), "num_layers": None, "text_in": None, "prefixes": 0}
BY_STEP = {"image/fvu", "text/fvu", "image/cosine", "retrieval/shared_r1", "retrieval/shared_r10", "loss/train"}
BY_CODE = {
    "image/l0", "text/dead_fraction", "image/frequency_median", "retrieval/codes_r1", "retrieval/codes_r10",
    "overlap/paired", "overlap/strangers", "overlap/ratio", "overlap/beyond_chance", "text/states_fvu", "loss/held_out",
}  # fmt: skip


def quiet(line):
    pass


def train_auxiliary(store, output, **changed):
    train_auxiliary_autoencoder(
        AuxiliaryCommandLine(representations=store, output=output, **(AUXILIARY | changed)), quiet
    )
    return output


def train_sparse(store, output, auxiliary, report=quiet, **changed):
    settings = SparseCommandLine(representations=store, output=output, auxiliary=auxiliary, **(SPARSE | changed))
    train_sparse_autoencoder(settings, report)
    return output


@pytest.fixture(scope="module")
def auxiliary(store, tmp_path_factory):
    return train_auxiliary(store, tmp_path_factory.mktemp("runs") / "auxiliary")


@pytest.fixture(scope="module")
def sparse(store, auxiliary, tmp_path_factory):
    return train_sparse(store, tmp_path_factory.mktemp("runs") / "sparse", auxiliary)


def weights(run):
    return load_file(run / "model.safetensors")


def test_training_aligns_and_rebuilds(store, auxiliary, sparse):
    found, held_out = read_sparse(sparse), open_store(store).read(range(300, 400))
    assert isinstance(found, VisionLanguageSAE)
    alignment = measure_alignment(read_auxiliary(auxiliary), found, held_out)
    assert alignment.recall_at_1 > 0.9
    assert alignment_gate(alignment.as_dict(), dict.fromkeys(FAITHFULNESS, 0.0))[0]
    assert max(alignment.image_unexplained, alignment.text_unexplained) < 0.6
    measured = json.loads((sparse / "metrics.json").read_text())
    assert measured["retrieval/shared_r1"] == pytest.approx(alignment.recall_at_1)
    assert measured["overlap/paired"] == pytest.approx(alignment.paired_overlap)
    assert measured["overlap/strangers"] == pytest.approx(alignment.stranger_overlap)
    assert measured["overlap/beyond_chance"] == pytest.approx(alignment.overlap_beyond_chance)
    assert measured["image/states_fvu"] == pytest.approx(alignment.image_unexplained, rel=1e-3)
    assert measured["text/states_fvu"] == pytest.approx(alignment.text_unexplained, rel=1e-3)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_whole_texts_are_compared_with_images_and_begun_ones_rebuilt(store, weight):
    """And texts of one picture are no negatives of each other."""
    torch.manual_seed(0)
    batch, auxiliary = open_store(store).read(range(40), epoch=1), AuxiliaryAutoencoder(24, 16)
    assert not torch.equal(batch.begun_ND, batch.text_ND)
    image_NS, text_NS = auxiliary(batch.image_ND, batch.text_ND)
    logits = F.normalize(image_NS, dim=1) @ F.normalize(text_NS, dim=1).T / 0.07
    same = torch.arange(40) // 2 == torch.arange(40)[:, None] // 2
    lost = [
        -(logits.softmax(axis) * same).sum(axis).log().mean() for axis in (0, 1)
    ]  # rows: images to texts; columns: texts to images
    expected = weight * (lost[0] + lost[1]) / 2
    expected += F.mse_loss(auxiliary.vision_decoder(image_NS), batch.image_ND)
    expected += F.mse_loss(auxiliary.text_decoder(auxiliary.text_projection(batch.begun_ND)), batch.begun_ND)
    config = AuxiliaryTraining(contrastive_weight=weight)
    torch.testing.assert_close(AuxiliaryObjective(auxiliary, config, Worker())(batch), expected)


@pytest.mark.parametrize("centred", [False, True])
def test_a_sparse_autoencoder_rebuilds_begun_texts(store, auxiliary, centred):
    torch.manual_seed(0)
    batch, before = open_store(store).read(range(40), epoch=1), read_auxiliary(auxiliary)
    sae = VisionLanguageSAE(16, 64, 8)
    centre = Centre(torch.randn(16), torch.randn(16)) if centred else None
    shared = shared_representations(batch.image_ND, batch.begun_ND, before, centre)
    parts = zip(sae(*shared), shared, strict=True)
    expected = sum(F.mse_loss(rebuilt, original) for rebuilt, original in parts)
    objective = SparseObjective(
        TrainableVLSAE(sae), auxiliary=before, centre=centre, num_concepts=64, steps_per_epoch=1,
        resample_steps=range(0),
    )  # fmt: skip
    torch.testing.assert_close(objective(batch), expected)


def test_measures_are_of_begun_texts_and_agreement_of_whole_ones(store, auxiliary, sparse):
    """As the artifact's figures are."""
    held_out, before = open_store(store).read(range(300, 400)), read_auxiliary(auxiliary)
    measured = {run: json.loads((run / "metrics.json").read_text()) for run in (auxiliary, sparse)}
    begun = reconstruction_quality("text", before.text_decoder(before.text_projection(held_out.begun_ND)),
                                   held_out.begun_ND)  # fmt: skip
    assert measured[auxiliary]["text/fvu"] == pytest.approx(begun["text/fvu"], rel=1e-3)
    image, text = before(held_out.image_ND, held_out.text_ND)
    retrieved = retrieval_of_vectors("shared", image, text, held_out.image_ids_N)
    assert {name: measured[auxiliary][name] for name in retrieved} == pytest.approx(retrieved)
    found = read_sparse(sparse)
    assert isinstance(found, VisionLanguageSAE)
    codes = found.encode(image), found.encode(text)
    of_codes = retrieval_of_codes("codes", codes[0], codes[1], 64, held_out.image_ids_N)
    assert {name: measured[sparse][name] for name in of_codes} == pytest.approx(of_codes)
    as_strangers = retrieval_of_vectors("shared", image, text, torch.arange(100))
    assert as_strangers["retrieval/shared_r1"] < 0.8 < retrieved["retrieval/shared_r1"]


def test_concepts_move_by_the_learning_rate_however_small_their_gradients_are(make_store, tmp_path, monkeypatch):
    """At S 4096 an entry is 1e-8 and less, which is Adam's usual epsilon; here states and decoders are small for it."""
    begun, rate = [], 1e-7

    def small_decoders(*_):
        trained = TrainableVLSAE(VisionLanguageSAE(24, 64, 8))
        trained.decoder_2KS.data *= 1e-5
        begun.append(copy.deepcopy(trained))
        return trained

    def small_states(image_ND, text_ND):
        image_ND *= 0.01
        text_ND *= 0.01

    store = make_store(tmp_path / "store", change=small_states, **OF_CLIP)
    monkeypatch.setattr("training.train_sparse_autoencoder._new_autoencoder", small_decoders)
    run = train_sparse(
        store, tmp_path / "run", None, epochs=2, warmup_epochs=0, batch_size=300, learning_rate=rate, evaluate_every=1
    )
    batch = open_store(store).read(range(300))
    begun[0](batch.image_ND, batch.begun_ND).loss.backward()
    gradient_KS, before_KS = begun[0].encoder_KS.grad, begun[0].encoder_KS.detach()
    used = gradient_KS != 0
    assert used.float().mean() > 0.5
    assert 1e-11 < gradient_KS[used].abs().median() < 2e-9
    moved = (weights(run)["encoder"] - before_KS)[used].abs() / rate
    assert moved.median() == pytest.approx(1.5, abs=0.2)  # in two steps, the second at half the rate


def test_the_biases_start_at_the_mean(store, tmp_path):
    one = train_auxiliary(store, tmp_path / "run", epochs=1, learning_rate=1e-9)
    auxiliary, training = read_auxiliary(one), open_store(store).read(range(300))
    image_NS, text_NS = auxiliary(training.image_ND, training.begun_ND)
    for shared_NS in (image_NS, text_NS):
        assert shared_NS.mean(0).abs().max() < 1e-4
    torch.testing.assert_close(auxiliary.vision_decoder.bias, training.image_ND.mean(0))
    torch.testing.assert_close(auxiliary.text_decoder.bias, training.begun_ND.mean(0))


@pytest.mark.parametrize("kind", ["sae_d", "sae_v"])
def test_baselines_are_trained_and_measured_alike(store, auxiliary, sparse, kind, tmp_path):
    run = train_sparse(store, tmp_path / "run", auxiliary, kind=kind)
    measured = json.loads((run / "metrics.json").read_text())
    assert measured.keys() == json.loads((sparse / "metrics.json").read_text()).keys()
    assert measured["image/fvu"] < 0.6
    assert measured["image/l0"] <= 8
    held_out = open_store(store).read(range(300, 400))
    image_NS, _ = shared_representations(held_out.image_ND, held_out.begun_ND, read_auxiliary(auxiliary))
    found = read_sparse(run)
    lost = (found.decode(encode(found, image_NS, "image"), "image") - image_NS).square().mean()
    assert float(lost) == pytest.approx(measured["image/mse"], rel=1e-4)


def test_what_a_run_leaves(auxiliary, sparse):
    for run, expected in ((auxiliary, BY_STEP), (sparse, BY_STEP | BY_CODE)):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows][-1] == json.loads((run / "metrics.json").read_text())["step"]
        assert all(expected <= row.keys() for row in rows)
        assert rows[-1]["image/fvu"] < rows[0]["image/fvu"]
        assert any((run / "tensorboard").iterdir())
        assert not (run / "checkpoint").exists()
    plots = {file.stem for file in (sparse / "plots").glob("*.png")}
    assert plots == {"loss", "fvu", "dead_fraction", "retrieval", "overlap", "activation_frequency"}
    assert {file.stem for file in (auxiliary / "plots").glob("*.png")} == {"loss", "fvu", "retrieval"}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in (sparse / "plots").glob("*.png"))


def test_the_same_seed_gives_the_same_bytes(store, auxiliary, sparse, tmp_path):
    again = train_sparse(store, tmp_path / "again", auxiliary)
    for name in ("model.safetensors", "metrics.json", "config.json"):
        assert (again / name).read_bytes() == (sparse / name).read_bytes()
    other = train_sparse(store, tmp_path / "other", auxiliary, seed=1)
    assert not torch.equal(weights(other)["encoder"], weights(sparse)["encoder"])


def test_a_finished_run_says_so_and_does_nothing(store, auxiliary, sparse):
    before = {file: file.stat().st_mtime_ns for file in sparse.rglob("*")}
    lines = []
    train_sparse(store, sparse, auxiliary, lines.append)
    assert "finished after 60 steps" in lines[0]
    assert {file: file.stat().st_mtime_ns for file in sparse.rglob("*")} == before


def half_is_gone(file):
    def check(line):
        assert not file.exists()

    return check


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"kind": "sae_d"}, marks=pytest.mark.slow),
        pytest.param({"resample_dead": True, "num_concepts": 256}, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_goes_on(store, auxiliary, tmp_path, options):
    whole = train_sparse(store, tmp_path / "whole", auxiliary, **options)

    def interrupt(line):
        if line.startswith("step 40"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sparse(store, tmp_path / "broken", auxiliary, interrupt, checkpoint_every=7, **options)
    assert json.loads((tmp_path / "broken" / "checkpoint" / "checkpoint.json").read_text())["step"] == 35
    half = tmp_path / "broken" / "checkpoint" / ".state-00000042.safetensors.0123456789abcdef.part"
    half.write_bytes(b"killed here")
    broken = train_sparse(store, tmp_path / "broken", auxiliary, half_is_gone(half), checkpoint_every=9, **options)
    for name in ("model.safetensors", "metrics.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (broken, whole)]
    for rows in logs:
        for row in rows:
            del row["samples_per_s"]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_killed_three_times_it_ends_with_the_same_weights(make_store, tmp_path):
    seed = int(time.time())
    print(f"seed {seed}")
    draw, store = Random(seed), make_store(tmp_path / "store", pairs=2000)
    options = {
        "representations": store, "num-concepts": 512, "active-concepts": 32, "batch-size": 100, "epochs": 20,
        "held-out": 100, "evaluate-every": 50, "checkpoint-every": 5,
    }  # fmt: skip

    def start(output: Path) -> subprocess.Popen:
        arguments = [
            part for name, value in (options | {"output": output}).items() for part in (f"--{name}", str(value))
        ]
        program = "import torch; torch.set_num_threads(1); from training import train_sparse_autoencoder as t; t.main()"
        return subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    index = tmp_path / "killed" / "checkpoint" / "checkpoint.json"
    for number, step in enumerate(sorted(draw.sample(range(10, 330), 3)), start=1):
        process = start(tmp_path / "killed")
        while not index.exists() or json.loads(index.read_text())["step"] < step:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        print(f"kill {number} after step {json.loads(index.read_text())['step']}")
    assert start(tmp_path / "killed").wait() == 0
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "killed")[name], tensor, rtol=0, atol=1e-6)
    assert (tmp_path / "killed" / "metrics.json").read_bytes() == (tmp_path / "whole" / "metrics.json").read_bytes()


def test_centring_is_recorded_and_used(store, auxiliary, tmp_path):
    run = train_sparse(store, tmp_path / "run", auxiliary, centre=True)
    centre = read_centre(run)
    assert centre is not None
    batch = open_store(store).read(range(300))
    image_NS, text_NS = shared_representations(batch.image_ND, batch.begun_ND, read_auxiliary(auxiliary), centre)
    assert max(image_NS.mean(0).abs().max(), text_NS.mean(0).abs().max()) < 1e-4
    assert read_centre(auxiliary) is None


def test_a_store_of_a_shared_space_needs_no_auxiliary(make_store, tmp_path):
    store = make_store(tmp_path / "store", **OF_CLIP)
    run = train_sparse(store, tmp_path / "run", None)
    assert read_run_config(run).auxiliary_sha256 is None
    assert "image/states_fvu" not in json.loads((run / "metrics.json").read_text())


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"active_concepts": 65}, "active_concepts is 65; it must be at most num_concepts=64"),
        ({"warmup_epochs": 12}, "warmup_epochs is 12; it must be less than epochs=12"),
        ({"held_out": 399}, "held_out is 399"),
        ({"workers": 7}, "batch_size is 60; it must be a multiple of workers=7"),
        ({"kind": "sae_v", "resample_dead": True}, "resample_dead"),
    ],
)
def test_what_does_not_go_together_is_named(store, auxiliary, tmp_path, changed, named):
    with pytest.raises(InvalidTraining, match=named):
        train_sparse(store, tmp_path / "run", auxiliary, **changed)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "field", ["batch_size", "num_concepts", "active_concepts", "learning_rate", "checkpoint_every"]
)
def test_zero_is_refused(store, tmp_path, field):
    with pytest.raises(ValidationError, match=field):
        train_sparse(store, tmp_path / "run", None, **{field: 0})


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"names": ("layer_2",)}, "name"),
        ({"model_sha256": "1"}, "model_sha256"),
        ({"text_in": "user_turn", "prefixes": 0}, "text_in"),
        ({"point": "input"}, "point"),
    ],
)
def test_states_of_another_layer_or_model_or_place_are_refused(make_store, auxiliary, tmp_path, changed, named):
    store = make_store(tmp_path / "store", **changed)
    with pytest.raises(InvalidTraining, match=f"manifest.json: {named} is"):
        train_sparse(store, tmp_path / "run", auxiliary)


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"seed": 3}, "seed=0"), ({"num_concepts": 65}, "num_concepts=64"), ({"kind": "sae_v"}, "kind")],
)
def test_going_on_with_other_settings_is_refused(store, auxiliary, sparse, changed, named):
    with pytest.raises(InvalidTraining, match=rf"config\.json.*{named}"):
        train_sparse(store, sparse, auxiliary, **changed)


def test_a_run_that_kept_nothing_may_have_other_settings(store, auxiliary, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise InvalidTraining("there are fewer GPUs than workers")

    with monkeypatch.context() as patched:
        patched.setattr("training.train_sparse_autoencoder.run_on_workers", refuse)
        with pytest.raises(InvalidTraining, match="GPUs"):
            train_sparse(store, tmp_path / "run", auxiliary, seed=3)
    train_sparse(store, tmp_path / "run", auxiliary, seed=4, epochs=3)
    assert read_run_config(tmp_path / "run").settings["seed"] == 4


def test_a_measure_that_no_json_can_hold_ends_a_run(store, tmp_path):
    with pytest.raises(InvalidTraining, match=r"metrics\.jsonl: loss/train is (inf|nan) at step 5"):
        train_auxiliary(store, tmp_path / "run", epochs=2, learning_rate=1e30, evaluate_every=5)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_a_batch_that_is_smaller_than_asked_for_is_reported(store, auxiliary, tmp_path):
    lines = []
    train_sparse(store, tmp_path / "run", auxiliary, lines.append, batch_size=512, epochs=3)
    assert lines[0] == "there are fewer training pairs than batch_size=512: every batch has all 300"


def test_going_on_with_another_store_is_refused(make_store, auxiliary, sparse, tmp_path):
    other = make_store(tmp_path / "store", seed=5)
    with pytest.raises(InvalidTraining, match=r"store\.data_sha256"):
        train_sparse(other, sparse, auxiliary)


def test_a_state_that_is_not_finite_ends_a_run_with_its_shard(make_store, tmp_path):
    store = make_store(tmp_path / "store", change=lambda image_ND, text_ND: image_ND[3, 2].fill_(float("inf")))
    with pytest.raises(InvalidTraining, match=r"000000\.safetensors.*row 3"):
        train_auxiliary(store, tmp_path / "run")


@pytest.mark.slow
def test_bad_input_is_one_line_on_the_command_line(store, tmp_path):
    command = [sys.executable, "-m", "training.train_sparse_autoencoder", "--representations", str(tmp_path)]
    done = subprocess.run([*command, "--output", str(tmp_path / "run")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'manifest.json'} cannot be read")
    assert len(done.stderr.splitlines()) == 1
