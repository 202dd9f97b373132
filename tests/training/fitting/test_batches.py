import pytest
import torch

from training.errors import InvalidTraining
from training.fitting.batches import ShuffledBatches, read_held_out, sample_batches
from training.fitting.workers import Worker
from training.store.reader import open_store

HELD_OUT = 50


@pytest.fixture
def opened(store):
    return open_store(store)


def test_an_epoch_has_every_training_pair_once_but_the_last_incomplete_batch(opened):
    batches = ShuffledBatches(opened, held_out=HELD_OUT, batch_size=64, seed=1)
    assert batches.steps_per_epoch == 350 // 64
    epochs = [torch.cat([batches.rows(epoch * 5 + index) for index in range(5)]) for epoch in range(2)]
    for rows in epochs:
        assert len(set(rows.tolist())) == len(rows) == 5 * 64
        assert rows.max() < 350
    assert not torch.equal(*epochs)
    assert (epochs[0].diff() == 1).float().mean() < 0.05
    other = ShuffledBatches(opened, held_out=HELD_OUT, batch_size=64, seed=2)
    assert not torch.equal(other.rows(0), batches.rows(0))


def test_workers_share_a_batch(opened):
    whole = ShuffledBatches(opened, held_out=HELD_OUT, batch_size=64, seed=1)
    shares = [
        ShuffledBatches(opened, held_out=HELD_OUT, batch_size=64, seed=1, rank=rank, workers=4) for rank in range(4)
    ]
    assert torch.equal(torch.cat([share.rows(7) for share in shares]), whole.rows(7))
    for one, other in zip(shares[2].whole(7), opened.read(whole.rows(7), epoch=1), strict=True):
        assert torch.equal(one, other)


def test_what_is_read_ahead_is_what_was_asked_for(opened):
    batches = ShuffledBatches(opened, held_out=HELD_OUT, batch_size=32, seed=0)
    found = list(batches.between(3, 17))
    assert len(found) == 14
    for step, batch in enumerate(found, start=3):
        expected = opened.read(batches.rows(step), epoch=step // batches.steps_per_epoch)
        assert all(torch.equal(one, other) for one, other in zip(batch, expected, strict=True))
    assert list(batches.between(5, 5)) == []


def test_every_text_goes_through_its_prefixes_and_the_whole_as_epochs_pass(opened):
    """Within twice as many epochs as there are prefixes, whatever the order of the rows, and again in the next ones."""
    batches = ShuffledBatches(opened, held_out=HELD_OUT, batch_size=70, seed=0)
    seen: dict[int, list[torch.Tensor]] = {}
    for step, batch in enumerate(batches.between(0, 12 * batches.steps_per_epoch)):
        for row, begun_D in zip(batches.rows(step).tolist(), batch.begun_ND, strict=True):
            seen.setdefault(row, []).append(begun_D)
    assert len(seen) == 350
    for row, begun in seen.items():
        assert len({tuple(one.tolist()) for one in begun[:6]}) == 4
        assert torch.equal(torch.stack(begun[:6]), torch.stack(begun[6:]))
        assert sum(torch.equal(one, opened.read([row]).text_ND[0]) for one in begun) == 6


def test_fewer_pairs_than_a_batch_are_one_smaller_batch_of_one_worker(opened):
    batches = ShuffledBatches(opened, held_out=397, batch_size=64, seed=0)
    assert (batches.batch_size, batches.steps_per_epoch) == (3, 1)
    with pytest.raises(InvalidTraining, match=r"there are 3 pairs to train on.*--batch-size"):
        ShuffledBatches(opened, held_out=397, batch_size=64, seed=0, workers=2)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"held_out": 399}, "held_out=399"), ({"held_out": 900}, "held_out=900"), ({"workers": 3}, "workers=3")],
)
def test_what_cannot_be_shared_out_is_named(opened, settings, named):
    with pytest.raises(InvalidTraining, match=named):
        ShuffledBatches(opened, **({"held_out": HELD_OUT, "batch_size": 64, "seed": 0} | settings))


def test_held_out_pairs_are_the_last(opened):
    batch = read_held_out(opened, HELD_OUT, Worker())
    assert batch is not None
    assert torch.equal(batch.text_ND, opened.read(range(350, 400)).text_ND)
    assert read_held_out(opened, HELD_OUT, Worker(rank=1, count=2)) is None


def test_held_out_pairs_that_do_not_vary_are_refused(make_store, tmp_path):
    one_text = make_store(tmp_path / "store", change=lambda image_ND, text_ND: text_ND.copy_(text_ND[:1].clone()))
    with pytest.raises(InvalidTraining, match="the text states of the last 50 pairs"):
        read_held_out(open_store(one_text), HELD_OUT, Worker())


def test_statistics_are_taken_from_all_training_pairs_or_a_sample(opened, monkeypatch):
    everything = torch.cat([batch.text_ids_N for batch in sample_batches(opened, held_out=HELD_OUT, seed=0)])
    assert torch.equal(everything, opened.read(range(350)).text_ids_N)
    monkeypatch.setattr("training.fitting.batches._STATISTICS_ROWS", 100)
    some = torch.cat([batch.text_ids_N for batch in sample_batches(opened, held_out=HELD_OUT, seed=0)])
    assert len(set(some.tolist())) == 100
    assert set(some.tolist()) < set(everything.tolist())


def test_a_row_that_cannot_be_used_ends_the_reading(make_store, tmp_path):
    broken = make_store(tmp_path / "store", change=lambda image_ND, text_ND: text_ND[7].fill_(float("nan")))
    batches = ShuffledBatches(open_store(broken), held_out=HELD_OUT, batch_size=350, seed=0)
    with pytest.raises(InvalidTraining, match=r"000000\.safetensors: layer_3\.text of row 7 is not finite"):
        list(batches.between(0, 1))
