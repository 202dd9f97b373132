"""Every object that would be applied has the fields and values that its kind knows, and names only what is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from service.callers.keys import parse_keys
from tests.deploy.custom_kinds import SCHEMAS
from tests.deploy.rendering import CLUSTERS, DEPLOY, FOLDERS, Pod, only, pods, ray_cluster, rendered, selects

KUBERNETES = "1.37"
BROUGHT = {"kuberay/dev": set(), "kuberay/production": {"vl-sae-keys", "vl-sae-tls", "vl-sae-redis"}}
"""Secrets that an operator makes, by the runbook's commands."""
each_cluster = pytest.mark.parametrize("cluster", CLUSTERS)


def check(manifest: dict[str, Any]) -> None:
    """Raises ValidationError of jsonschema, which that of kubernetes_validate is, too."""
    if manifest["kind"] in SCHEMAS:
        jsonschema.validate(manifest, SCHEMAS[manifest["kind"]])
        for pod in pods([manifest]):
            spec = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod.group}, "spec": pod.spec}
            kubernetes_validate.validate(spec, KUBERNETES, strict=True)
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_object_has_the_fields_that_its_kind_knows(folder: str):
    for manifest in rendered(folder):
        check(manifest)


MISTAKES: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "a field of no Deployment": ("Deployment", lambda one: one["spec"].update(replica=2)),
    "a port that is no number": ("Service", lambda one: one["spec"]["ports"][0].update(port="http")),
    "a policy of one word": ("NetworkPolicy", lambda one: one["spec"].update(policyTypes="Egress")),
    "a budget of words": ("PodDisruptionBudget", lambda one: one["spec"].update(minAvailable=[1])),
    "an autoscaler that does not exist": (
        "RayService",
        lambda one: ray_cluster(one)["autoscalerOptions"].update(version="v3"),
    ),
    "an upgrade without its Gateway": (
        "RayService",
        lambda one: one["spec"]["upgradeStrategy"]["clusterUpgradeOptions"].pop("gatewayClassName"),
    ),
    "a field at the wrong level": ("RayService", lambda one: one["spec"].update(enableInTreeAutoscaling=True)),
    "a container's mistake inside a RayService": (
        "RayService",
        lambda one: ray_cluster(one)["headGroupSpec"]["template"]["spec"]["containers"][0].update(images="x"),
    ),
    "a password in the open": (
        "RayService",
        lambda one: ray_cluster(one)["gcsFaultToleranceOptions"].update(redisPassword="x"),
    ),
    "an endpoint without a port": ("PodMonitor", lambda one: one["spec"]["podMetricsEndpoints"][0].pop("port")),
    "a rule without an expression": (
        "PrometheusRule",
        lambda one: one["spec"]["groups"][0]["rules"][0].pop("expr"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake: str):
    kind, make = MISTAKES[mistake]
    manifest = next(one for one in rendered("kuberay/production") if one["kind"] == kind)
    make(manifest)
    with pytest.raises(jsonschema.ValidationError):
        check(manifest)


@each_cluster
def test_what_pods_mount_is_there(cluster: str):
    objects = rendered(cluster)
    for pod in pods(objects):
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", ())}
        mounted = {mount["name"] for one in pod.containers for mount in one.get("volumeMounts", ())}
        assert mounted == set(volumes), pod.group
        for volume in volumes.values():
            if "configMap" in volume:
                only(objects, "ConfigMap", volume["configMap"]["name"])
            elif "persistentVolumeClaim" in volume:
                only(objects, "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
            elif "secret" in volume and volume["secret"]["secretName"] not in BROUGHT[cluster]:
                only(objects, "Secret", volume["secret"]["secretName"])


def test_no_secret_is_in_the_repository():
    assert [one for one in rendered("kuberay/production") if one["kind"] == "Secret"] == []
    example = yaml.safe_load((DEPLOY / "kuberay/production/keys.example.yaml").read_text())
    check(example)
    assert example["metadata"]["name"] in BROUGHT["kuberay/production"]
    [key] = parse_keys(example["stringData"]["keys.json"].encode(), source="the example").keys
    assert set(key.sha256) == {"0"}, "the hash of no key"


@each_cluster
def test_whoever_selects_pods_selects_some(cluster: str):
    objects = rendered(cluster)
    there = list(pods(objects))
    for one in objects:
        spec = one.get("spec", {})
        selector = spec.get("podSelector") or spec.get("selector")
        if one["kind"] == "Service":
            selector = {"matchLabels": selector}
        if selector is not None:
            found = [pod for pod in there if selects(selector, pod)]
            assert found, (one["kind"], one["metadata"]["name"])
            for port in named_ports(one):
                assert any(port in ports_of(pod) for pod in found), (one["kind"], one["metadata"]["name"], port)


def named_ports(manifest: dict[str, Any]) -> set[str]:
    """Ports that it knows by the name that a container gave."""
    spec = manifest["spec"]
    ports = [port.get("targetPort") for port in spec.get("ports", ())]
    ports += [port["port"] for rule in spec.get("ingress", ()) for port in rule.get("ports", ())]
    ports += [endpoint["port"] for endpoint in spec.get("podMetricsEndpoints", ())]
    return {port for port in ports if isinstance(port, str)}


def ports_of(pod: Pod) -> set[str]:
    return {port["name"] for one in pod.containers for port in one.get("ports", ())}
