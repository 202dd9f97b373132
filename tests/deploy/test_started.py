"""The configurations of clusters, started: what needs a GPU or a Secret is swapped, all else is as it stands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from service.gateway import Gateway, free_port
from service.settings import BUNDLED_MODEL
from steering.artifact_config import read_config
from tests.deploy.serving import serve_config
from tests.service.asking import GREEDY, receipt
from tests.service.running_server import REPOSITORY
from tests.tiny_models import save_tiny_artifact, save_tiny_llava

START_TIMEOUT_S, STOP_TIMEOUT_S = 270, 60
ON_A_CPU = {"device": "cpu", "tensor_parallel_size": 1}


@contextmanager
def started(config: dict[str, Any], home: Path) -> Iterator[str]:
    """The address of a gateway in front of a Serve on loopback that has this configuration and is ready."""
    config["http_options"] |= {"host": "127.0.0.1", "port": free_port()}
    (home / "serve.yaml").write_text(yaml.safe_dump(config))
    port, log = free_port(), home / "log.txt"
    addresses = {"GATEWAY_BIND": f"127.0.0.1:{port}", "GATEWAY_SERVER": f"127.0.0.1:{config['http_options']['port']}"}
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.deploy.serve_as_kuberay", str(home / "serve.yaml")],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    try:
        with Gateway(addresses):
            deadline = time.monotonic() + START_TIMEOUT_S
            while httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=10).status_code != 200:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
    finally:
        try:
            process.communicate(timeout=STOP_TIMEOUT_S)
        finally:
            process.kill()


def written(cluster: str) -> dict[str, Any]:
    """`serveConfigV2` without what Ray Serve would add by itself."""
    return serve_config(cluster).model_dump(exclude_unset=True, mode="json")


def one_replica_each(application: dict[str, Any]) -> None:
    for deployment in application["deployments"]:
        scaling = deployment.get("autoscaling_config")
        if scaling:
            scaling |= {"min_replicas": 1, "max_replicas": 1}


def with_here(args: dict[str, Any], home: Path) -> dict[str, Any]:
    """Files that must not be shared with others on this machine."""
    assert "drain_file" in args
    return {**args, "drain_file": str(home / "drain")}


def ask(url: str, model: str, key: str = "unused") -> dict[str, Any]:
    """The receipt of an answer about a picture, and how long the prompt was."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    answer = client.chat.completions.create(model=model, **GREEDY)
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
    return {**receipt(answer), "prompt_tokens": answer.usage.prompt_tokens}


@pytest.mark.service
@pytest.mark.slow
def test_development_serves_the_miniature_behind_its_gateway_and_a_candidate(tmp_path: Path):
    """A candidate loads beside, and comes into force when it has; one of another model is reported by name and harms
    nobody."""
    config = written("kuberay/dev")
    [application] = config["applications"]
    args = application["args"] = with_here(application["args"], tmp_path)
    for deployment in application["deployments"]:
        if deployment["name"] == "Ingress":
            deployment["user_config"] = {"default_artifact": "next"}
    strange = save_tiny_llava(tmp_path / "strange", hidden_size=64)
    folders = {
        "next": save_tiny_artifact(tmp_path / "next", Path(args.get("model", BUNDLED_MODEL))),
        "strange": save_tiny_artifact(tmp_path / "strange_artifact", strange),
    }
    config["applications"] += [
        {"name": name, "route_prefix": None, "import_path": "service.app:build_candidate",
         "args": {**args, "artifact": str(folder)}}
        for name, folder in folders.items()
    ]  # fmt: skip
    with started(config, tmp_path) as url:
        assert ask(url, "llava")["applied"], "by whichever is there"
        deadline, told = time.monotonic() + START_TIMEOUT_S, {}
        while told.get("default_artifact") != "next" or "another model" not in str(told["candidates"]["strange"]):
            assert time.monotonic() < deadline, (told["candidates"], told["live_settings"])
            time.sleep(1)
            told = httpx.get(f"{url}/version", timeout=10).json()
        assert ask(url, "llava")["artifact"] == read_config(folders["next"]).fingerprint == told["artifact"]
        past_the_gateway = httpx.get(f"http://127.0.0.1:{config['http_options']['port']}/v1/models")
        assert past_the_gateway.status_code >= 400


@pytest.fixture
def published(published_llava: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint in llava-1.5-7b-hf's layout, and its artifact. Its one head of 32 is the smallest vLLM takes on a
    CPU."""
    model = Path(shutil.copytree(published_llava, tmp_path / "llava-1.5-7b-hf"))
    config = json.loads((model / "config.json").read_text())
    config["text_config"] |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}
    (model / "config.json").write_text(json.dumps(config))
    return model, save_tiny_artifact(tmp_path / "llava-1.5-7b-vlsae", model)


@pytest.mark.service
@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_production_serves_a_tiny_llava_on_vllm(published: tuple[Path, Path], tmp_path: Path):
    """Swapped: model and artifact (in the published layout, with 576 tokens of an image), the device, files of Secrets,
    the number of replicas."""
    model, artifact = published
    keys = tmp_path / "keys.json"
    made = [sys.executable, "-m", "service.callers.keys", "--file", str(keys), "--name", "alice", "--scopes", "chat"]
    key = subprocess.run(made, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split()[-1]
    config = written("kuberay/production")
    [application] = config["applications"]
    args = with_here(application["args"], tmp_path)
    assert args["engine"]["name"] == "vllm"
    here = {"model": str(model), "artifact": str(artifact), "keys_file": str(keys)}
    application["args"] = {**args, **here, "engine": {**args["engine"], **ON_A_CPU}}
    one_replica_each(application)
    with started(config, tmp_path) as url:
        steered = ask(url, model.name, key)
        assert (steered["applied"], steered["layer"]) == (True, 2)
        assert steered["prompt_tokens"] > 576
        assert httpx.get(f"{url}/version", headers={"authorization": f"Bearer {key}"}).json()["context_tokens"] == 4096
        with pytest.raises(openai.AuthenticationError):
            ask(url, model.name, "another")
