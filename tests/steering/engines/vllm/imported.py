"""What vLLM's engine core and its workers import, for a fork server to import before (see processes.py)."""

import os
from importlib import import_module

NEEDED = [
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "steering.engines.vllm.plugin.models",
    "steering.engines.vllm.plugin.parameters",
    "steering.engines.vllm.plugin.worker",
]
OF_A_RUNNER = {
    "0": ["vllm.v1.worker.cpu_model_runner"],
    "1": ["vllm.v1.worker.cpu.model_runner", "steering.engines.vllm.plugin.model_state", "steering.kernels.launch"],
}

for name in NEEDED + OF_A_RUNNER[os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0")]:
    import_module(name)
