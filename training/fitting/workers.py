"""Who trains: this process, or several workers of Ray Train that share every batch. Knows no objective and no store."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from steering.cluster.local_ray import private_ray
from training.errors import InvalidTraining

DeviceChoice = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One of `count` that run the same steps on different pairs."""

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def leads(self) -> bool:
        """Only this one evaluates, logs and writes files."""
        return self.rank == 0

    def share_gradients(self, module: nn.Module) -> nn.Module:
        """The module itself, or one that averages gradients over the workers."""
        if self.count == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)

    def add_up(self, tensor: Tensor) -> None:
        """In place, over all workers."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def take_largest(self, tensor: Tensor) -> None:
        """In place, entry by entry, over all workers."""
        if self.count > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def copy_from_lead(self, tensor: Tensor) -> None:
        """In place."""
        if self.count > 1:
            dist.broadcast(tensor, 0)

    def gather_rows(self, rows_NS: Tensor) -> Tensor:
        """The rows of all workers, in order; gradients find their way back."""
        return rows_NS if self.count == 1 else _GatherRows.apply(rows_NS, self.rank, self.count)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NS: Tensor, rank: int, count: int) -> Tensor:
        ctx.own = slice(rank * len(rows_NS), (rank + 1) * len(rows_NS))
        parts = [torch.empty_like(rows_NS) for _ in range(count)]
        dist.all_gather(parts, rows_NS.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_MS: Tensor) -> tuple[Tensor, None, None]:
        total_MS = gradient_MS.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total_MS)
        return total_MS[ctx.own], None, None


def run_on_workers(
    function: Callable[[Worker], None], *, workers: int, device: DeviceChoice, ray_address: str | None
) -> None:
    """Runs `function` here, or once on each of several workers, and waits. An InvalidTraining of a worker is raised.

    Workers run on the cluster at `ray_address`, on the Ray that this process uses already, or on a private one.
    """
    if ray_address is not None:
        with _cluster(ray_address) as gpus:
            _train_on_ray(function, workers, on_gpu=device == "cuda" or _gpus_suffice(device, workers, gpus))
        return
    on_gpu = _gpus_suffice(device, workers, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if workers == 1:
        function(Worker(device=torch.device("cuda" if on_gpu else "cpu")))
        return
    with _local_ray(workers, on_gpu):
        _train_on_ray(function, workers, on_gpu)


def _gpus_suffice(device: DeviceChoice, workers: int, gpus: int) -> bool:
    """Whether to train on GPUs, of which there are so many; refused where there are some, but not one per worker."""
    if device == "cpu" or (device == "auto" and not gpus):
        return False
    if not gpus:
        raise InvalidTraining("device is cuda, but torch finds no CUDA device here; give --device cpu")
    if gpus < workers:
        raise InvalidTraining(
            f"workers is {workers}, but there are {gpus} GPUs and each worker needs one; "
            f"give --workers {gpus} or --device cpu"
        )
    return True


@contextmanager
def _cluster(address: str) -> Iterator[int]:
    """Connected to the cluster there, unless this process is on one; gives the number of its GPUs. This machine, from
    which the cluster is asked, need not have any."""
    import ray

    ours = not ray.is_initialized()
    if ours:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield int(ray.cluster_resources().get("GPU", 0))
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def _local_ray(workers: int, on_gpu: bool) -> Iterator[None]:
    running = sys.modules.get("ray")  # a private Ray starts before anything imports ray
    if running is not None and running.is_initialized():
        yield
        return
    with private_ray(cpus=workers, gpus=workers if on_gpu else 0):
        yield


def _train_on_ray(function: Callable[[Worker], None], workers: int, on_gpu: bool) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    def work() -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        device = ray.train.torch.get_device() if on_gpu else torch.device("cpu")
        function(Worker(rank=context.get_world_rank(), count=context.get_world_size(), device=device))

    with tempfile.TemporaryDirectory(prefix="ray-train-") as folder:
        trainer = TorchTrainer(
            work,
            torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=on_gpu),
            run_config=RunConfig(storage_path=folder),
        )
        try:
            trainer.fit()
        except Exception as error:
            raise _reason(error) from error


def _reason(error: BaseException) -> BaseException:
    """The InvalidTraining that a worker raised, if that is what ended the run."""
    for failure in getattr(error, "worker_failures", {}).values():
        for raised in (failure, getattr(failure, "_base_exc", None)):  # Ray Train wraps it together with its traceback
            if isinstance(raised, InvalidTraining):
                return InvalidTraining(str(raised))
    return error
