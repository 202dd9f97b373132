"""Trains on two workers without Ray: processes of our own that meet in a file.

python -m tests.training.fitting.gloo_workers RUNS MEETING; RUNS: a JSON list of {stage, settings, and where it is to be
interrupted, interrupt_at}.
"""

import json
import sys

import matplotlib.backends.backend_agg
import torch
import torch._dynamo
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessRaisedException, start_processes

from training import train_auxiliary_autoencoder as auxiliary
from training import train_sparse_autoencoder as sparse
from training.fitting.workers import Worker

IMPORTED_ONCE = (torch._dynamo, matplotlib.backends.backend_agg)
"""What the first step and the first plot would else import in every process."""


class Interruption(Exception):
    pass


def work(rank, run, meeting):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)

    def run_on_workers(function, **_):
        dist.barrier()  # the run folder is begun by one process before its workers start
        function(Worker(rank=rank, count=2))
        dist.barrier()

    def report(line):
        if line.startswith(f"step {run.get('interrupt_at')} "):
            raise Interruption(line)

    auxiliary.run_on_workers = sparse.run_on_workers = run_on_workers
    if run["stage"] == "auxiliary":
        auxiliary.train_auxiliary_autoencoder(auxiliary.CommandLine(**run["settings"]), report)
    else:
        sparse.train_sparse_autoencoder(sparse.CommandLine(**run["settings"]), report)


def main():
    for number, run in enumerate(json.loads(sys.argv[1])):
        arguments = (run, f"{sys.argv[2]}{number}")
        try:
            start_processes(work, arguments, nprocs=2, start_method="fork")
        except ProcessRaisedException:
            if "interrupt_at" not in run:
                raise
        else:
            assert "interrupt_at" not in run, "it was to be interrupted"


if __name__ == "__main__":
    main()
