"""What the jobs would run is what the command lines of `training/` take."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.rendering import DEPLOY, Pod, only, pods, ray_cluster, rendered
from tests.deploy.serving import settings
from training.collect_representations import CommandLine
from training.command_line import parse_settings

ROOT = DEPLOY.parent
RECORDER = """#!/bin/bash
printf '%s\\n' "$*" >> "$(dirname "$0")/../../stages.txt"
"""


def entrypoint(job: str) -> list[str]:
    return shlex.split(only(rendered("kuberay/jobs"), "RayJob", job)["spec"]["entrypoint"])


def job_pods(job: str) -> list[Pod]:
    return list(pods([only(rendered("kuberay/jobs"), "RayJob", job)]))


def test_the_collection_asks_for_workers_that_its_cluster_has():
    python, option, module, *argv = entrypoint("vl-sae-collection")
    assert (python, option, module) == ("python", "-m", "training.collect_representations")
    found = parse_settings(CommandLine, program="collection", argv=argv)
    [gpu] = ray_cluster(only(rendered("kuberay/jobs"), "RayJob", "vl-sae-collection"))["workerGroupSpecs"]
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert found.ray_address == "auto"
    assert found.workers[-1] == gpu["maxReplicas"]
    assert (str(found.threads), "1") == (limits["cpu"], limits["nvidia.com/gpu"])


def test_the_pipeline_takes_the_job_s_options_and_goes_on_with_its_collection(tmp_path: Path):
    """The script itself, with an interpreter that writes down what it is asked for."""
    script, *options = entrypoint("vl-sae-training")
    assert script == "/app/training/pipeline.sh"
    (tmp_path / "training").mkdir()
    shutil.copy(ROOT / "training/pipeline.sh", tmp_path / "training")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/.ready-dev").touch()
    (tmp_path / ".venv/bin/python").write_text(RECORDER)
    (tmp_path / ".venv/bin/python").chmod(0o755)
    command = ["bash", "training/pipeline.sh", *options]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    first, *_, last = [line.split() for line in (tmp_path / "stages.txt").read_text().splitlines()]
    again = parse_settings(CommandLine, program="pipeline", argv=first[2:])
    alone = parse_settings(CommandLine, program="collection", argv=entrypoint("vl-sae-collection")[3:])
    of_a_store = {"model", "pairs", "output", "layers", "dtype", "device", "text_in", "stored_dtype", "portion_size"}
    for name in sorted(of_a_store):
        assert getattr(again, name) == getattr(alone, name), name
    written = last[last.index("--artifact") + 1]
    assert written == settings("kuberay/production").artifact, "what production reads"


@pytest.mark.parametrize("job", ["vl-sae-collection", "vl-sae-training"])
def test_a_job_reads_and_writes_the_volume_that_production_reads(job: str):
    paths = [word for word in entrypoint(job) if word.startswith("/models/")]
    assert len(paths) >= 2
    [pod] = [pod for pod in job_pods(job) if pod.group == "gpu"]
    assert {"name": "models", "persistentVolumeClaim": {"claimName": "vl-sae-models"}} in pod.spec["volumes"]
    assert {"name": "models", "mountPath": "/models"} in pod.spec["containers"][0]["volumeMounts"]
