"""The page's commands for a cluster are of things that are there, and its numbers are the manifests'."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from tests.deploy.alerts import ALERTS
from tests.deploy.rendering import CLUSTERS, DEPLOY, KUBECTL, only, pods, ray_cluster, rendered
from tests.deploy.test_image import TARGETS
from tests.pages import code_blocks, read, sections

ROOT = DEPLOY.parent
PAGE = sections(read("deploy/README.md"))["On a cluster"]
LINES = [line for _, code in code_blocks(PAGE) for line in code.splitlines()]
MOST_LINES = 120
NAMES_OF_KUBERAY = {"rayservice": "", "httproute": "-httproute"}
"""What follows the RayService's name in those of its objects."""


def of(start: str) -> list[list[str]]:
    return [shlex.split(line) for line in LINES if line.startswith(start)]


def namespaces() -> dict[str, list[dict[str, Any]]]:
    return {only(rendered(cluster), "Namespace")["metadata"]["name"]: rendered(cluster) for cluster in CLUSTERS}


def after(words: list[str], option: str) -> str | None:
    return words[words.index(option) + 1] if option in words else None


def test_it_is_short_and_its_commands_are_of_three_kinds():
    assert len(PAGE.splitlines()) <= MOST_LINES
    checked = of("docker build ") + of("kubectl ")
    assert len(checked) >= 9
    assert len(LINES) == len(checked) + len(of("python -m ")), "the last are looked at with those of all pages"


@pytest.mark.parametrize("words", of("docker build "), ids=" ".join)
def test_an_image_that_is_built_is_one_that_pods_run(words: list[str]):
    target, tag, file = (after(words, option) for option in ("--target", "-t", "-f"))
    assert target in TARGETS
    assert ROOT / (file or "") == DEPLOY / "Dockerfile"
    assert words[-1] == "."
    images = {one["image"] for cluster in CLUSTERS for pod in pods(rendered(cluster)) for one in pod.containers}
    assert tag in images


@pytest.mark.parametrize("words", [words for words in of("kubectl ") if "apply" in words], ids=" ".join)
def test_what_is_applied_is_there(words: list[str]):
    folder, file, selector = (after(words, option) for option in ("-k", "-f", "-l"))
    if file:
        objects = list(yaml.safe_load_all((ROOT / file).read_text()))
    else:
        objects = rendered(str(Path(folder or "").relative_to("deploy")))
    if selector:
        key, value = selector.split("=")
        objects = [one for one in objects if one["metadata"].get("labels", {}).get(key) == value]
        assert len(objects) == 1
    assert objects


@pytest.mark.parametrize("words", [words for words in of("kubectl ") if "create" in words], ids=" ".join)
def test_a_secret_that_is_made_has_what_pods_take_from_it(words: list[str], tmp_path: Path):
    """By kubectl itself, which needs no cluster to say what it would make."""
    certificate = trustme.CA().issue_cert("vl-sae.example")
    (tmp_path / "tls.crt").write_bytes(certificate.cert_chain_pems[0].bytes())
    (tmp_path / "tls.key").write_bytes(certificate.private_key_pem.bytes())
    (tmp_path / "keys.json").write_text('{"keys": []}')
    command = [KUBECTL, *words[1:], "--dry-run=client", "-o", "yaml"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    made = yaml.safe_load(ran.stdout)
    objects = namespaces()[made["metadata"]["namespace"]]
    wanted = [
        {item["key"] for item in volume["secret"].get("items", [{"key": "keys.json"}])}
        for pod in pods(objects)
        for volume in pod.spec.get("volumes", ())
        if volume.get("secret", {}).get("secretName") == made["metadata"]["name"]
    ]
    wanted += [
        {source["key"]}
        for pod in pods(objects)
        for container in pod.containers
        for variable in container.get("env", ())
        if (source := variable.get("valueFrom", {}).get("secretKeyRef", {})).get("name") == made["metadata"]["name"]
    ]
    assert wanted
    assert all(keys == set(made["data"]) for keys in wanted)


@pytest.mark.parametrize(
    "words", [words for words in of("kubectl ") if {"get", "describe", "port-forward"} & set(words)], ids=" ".join
)
def test_what_is_looked_at_is_there(words: list[str]):
    objects = namespaces()[after(words, "-n") or ""]
    if "port-forward" in words:
        kind, name = words[words.index("port-forward") + 1].split("/")
        _, port = words[-1].split(":")
        service = only(objects, kind.capitalize(), name)
        assert int(port) in [one["port"] for one in service["spec"]["ports"]]
        return
    verb = "get" if "get" in words else "describe"
    kind, name = words[words.index(verb) + 1 :][:2]
    service = only(objects, "RayService")["metadata"]["name"]
    assert name == service + NAMES_OF_KUBERAY[kind]


def test_every_alert_has_its_row():
    [group] = yaml.safe_load(ALERTS.read_text())["groups"]
    assert re.findall(r"^\| `([A-Z][a-z]\w+)` \|", PAGE, re.MULTILINE) == [rule["alert"] for rule in group["rules"]]


def test_its_numbers_are_the_manifests():
    service = only(rendered("kuberay/production"), "RayService")
    cluster, upgrade = ray_cluster(service), service["spec"]["upgradeStrategy"]["clusterUpgradeOptions"]
    [gpu] = [group for group in cluster["workerGroupSpecs"] if group["groupName"] == "gpu"]
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    each = int(limits["nvidia.com/gpu"])
    least, most = gpu["minReplicas"] * each, gpu["maxReplicas"] * each
    assert f"one pod with {each} GPUs" in PAGE
    assert f"{least} at the least, {most} at the most, half as many more during an upgrade" in PAGE
    assert (upgrade["maxSurgePercent"], upgrade["stepSizePercent"], upgrade["intervalSeconds"]) == (50, 10, 120)
    assert "a tenth of the requests every two minutes" in PAGE
    assert f"deleted {service['spec']['rayClusterDeletionDelaySeconds']} s after" in PAGE
    model = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["deployments"][1]
    assert f"more than {model['autoscaling_config']['target_ongoing_requests']} requests" in PAGE
    assert (model["autoscaling_config"]["downscale_delay_s"], "ten minutes" in PAGE) == (600, True)
    annotations = cluster["headGroupSpec"]["template"]["metadata"]["annotations"]
    assert all(f"`{name}`" in PAGE for name in annotations)
