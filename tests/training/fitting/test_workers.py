import pytest
import torch

from training.errors import InvalidTraining
from training.fitting.workers import Worker, _gpus_suffice, _reason, run_on_workers


def test_one_worker_is_this_process():
    seen = []
    run_on_workers(seen.append, workers=1, device="cpu", ray_address=None)
    assert seen == [Worker(rank=0, count=1, device=torch.device("cpu"))]
    assert seen[0].leads
    module, rows = torch.nn.Linear(2, 2), torch.ones(3, 2, requires_grad=True)
    assert seen[0].share_gradients(module) is module
    assert seen[0].gather_rows(rows) is rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(InvalidTraining, match="device is cuda"):
        run_on_workers(lambda worker: None, workers=1, device="cuda", ray_address=None)


@pytest.mark.parametrize(
    ("device", "gpus", "expected"), [("cpu", 8, False), ("auto", 0, False), ("auto", 2, True), ("cuda", 3, True)]
)
def test_gpus_are_used_where_there_is_one_for_each_worker(device, gpus, expected):
    assert _gpus_suffice(device, 2, gpus) is expected


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_fewer_gpus_than_workers_are_refused(device):
    with pytest.raises(InvalidTraining, match=r"workers is 4.*3 GPUs.*--workers 3"):
        _gpus_suffice(device, 4, 3)


def test_what_a_worker_refused_is_what_the_user_reads():
    exceptions = pytest.importorskip("ray.train.v2._internal.exceptions")
    from ray.train import WorkerGroupError

    wrapped = exceptions.UserExceptionWithTraceback(InvalidTraining("shard 3 is broken"), "a long traceback")
    found = _reason(WorkerGroupError("two workers failed", {1: wrapped}))
    assert isinstance(found, InvalidTraining)
    assert str(found) == "shard 3 is broken"
    other = RuntimeError("out of memory")
    assert _reason(other) is other
