"""`serveConfigV2` is one that Ray Serve takes, with settings that the service takes, in a cluster that has the room."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import yaml
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from service.app import SHUTDOWN_MARGIN_S, Ingress, Model, assemble
from service.gateway import check_gateway_is_named
from service.scaling import FULL_SHARE
from service.settings import MAX_ONGOING_REQUESTS
from tests.deploy.rendering import CLUSTERS, DEPLOY, Pod, only, pods, ray_cluster, rendered
from tests.deploy.serving import application, serve_config, settings

each_cluster = pytest.mark.parametrize("cluster", CLUSTERS)


def pod_of(cluster: str, group: str) -> Pod:
    [found] = [pod for pod in pods(rendered(cluster)) if pod.group == group]
    return found


def room(cluster: str, resource: str) -> int:
    """Of all worker pods at their most, in whole units."""
    groups = ray_cluster(only(rendered(cluster), "RayService"))["workerGroupSpecs"]
    return sum(
        group["maxReplicas"]
        * int(pod_of(cluster, group["groupName"]).spec["containers"][0]["resources"]["limits"][resource])
        for group in groups
        if resource in pod_of(cluster, group["groupName"]).spec["containers"][0]["resources"]["limits"]
    )


def most_replicas(cluster: str) -> dict[str, int]:
    found = {}
    for deployment in application(cluster).deployments:
        given: Any = deployment.model_dump(exclude_unset=True)
        found[deployment.name] = given.get("autoscaling_config", {}).get("max_replicas") or given["num_replicas"]
    return found


@each_cluster
def test_it_names_our_application_deployments_and_settings(cluster: str):
    module, name = application(cluster).import_path.split(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert [one.name for one in application(cluster).deployments] == [Ingress.name, Model.name]
    found = settings(cluster)
    check_gateway_is_named(found)
    assert found.behind_gateway
    assert found.allow_anonymous == (cluster == "kuberay/dev")


@pytest.mark.parametrize("where", [*CLUSTERS, "serve_config.yaml"])
def test_no_field_is_one_that_serve_would_overlook(where: str):
    """Its validator drops what it does not know."""
    written = config_of(where)
    assert overlooked(written) == []
    written["applications"][0]["deployments"][0]["replicas"] = 1
    assert overlooked(written) == ["applications.0.deployments.0.replicas"]


def config_of(where: str) -> dict[str, Any]:
    if where in CLUSTERS:
        return yaml.safe_load(only(rendered(where), "RayService")["spec"]["serveConfigV2"])
    return yaml.safe_load((DEPLOY / where).read_text())


def overlooked(written: dict[str, Any]) -> list[str]:
    """Paths of fields that neither Ray Serve nor its autoscaler reads."""
    read = ServeDeploySchema.model_validate(written).model_dump(exclude_unset=True, mode="json")
    scaling = [
        one["autoscaling_config"]
        for app in written["applications"]
        for one in app["deployments"]
        if "autoscaling_config" in one
    ]
    unknown = {name for one in scaling for name in one} - set(AutoscalingConfig.model_fields)
    return sorted(paths(written) - paths(read)) + sorted(unknown)


def paths(value: Any, prefix: str = "") -> set[str]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {prefix.rstrip(".")} | {path for key, one in entries for path in paths(one, f"{prefix}{key}.")}


@each_cluster
def test_serve_waits_longer_than_any_request_takes(cluster: str):
    http = serve_config(cluster).http_options
    assert http.request_timeout_s
    assert http.request_timeout_s >= settings(cluster).request_timeout_s + SHUTDOWN_MARGIN_S
    assert (http.host, http.port) == ("0.0.0.0", 8000)


@each_cluster
def test_the_cluster_has_room_for_every_replica(cluster: str):
    most, engine = most_replicas(cluster), settings(cluster).engine
    cpus = {Ingress.name: 1, Model.name: engine.cpu_threads}
    assert sum(cpus[name] * replicas for name, replicas in most.items()) <= room(cluster, "cpu")
    if engine.device == "cuda":
        assert most[Model.name] * engine.tensor_parallel_size <= room(cluster, "nvidia.com/gpu")
        gpus = pod_of(cluster, "gpu").spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        assert int(gpus) % engine.tensor_parallel_size == 0, "a replica's GPUs are those of one pod"


def test_no_two_replicas_of_a_deployment_are_on_the_machine_that_dies():
    groups = ray_cluster(only(rendered("kuberay/production"), "RayService"))["workerGroupSpecs"]
    machines = {group["groupName"]: group["maxReplicas"] for group in groups}
    most = most_replicas("kuberay/production")
    assert [one.max_replicas_per_node for one in application("kuberay/production").deployments] == [1, 1]
    assert most[Ingress.name] <= machines["cpu"]
    assert most[Model.name] <= machines["gpu"]


def test_production_shares_a_model_among_gpus():
    engine = settings("kuberay/production").engine
    assert (engine.name, engine.device) == ("vllm", "cuda")
    assert engine.tensor_parallel_size > 1


@each_cluster
def test_a_cluster_grows_before_its_batches_are_full(cluster: str):
    """What the file leaves out would be Serve's default, not ours: two requests at a replica."""
    found = settings(cluster)
    for deployment in application(cluster).deployments:
        scaling: Any = deployment.autoscaling_config
        target = scaling["target_ongoing_requests"]
        if deployment.name == Model.name:
            assert target == FULL_SHARE * found.engine.max_batch_size
            assert target < MAX_ONGOING_REQUESTS
        else:
            assert target <= FULL_SHARE * found.max_concurrent_requests
        assert scaling["min_replicas"] >= (1 - found.model_may_sleep)


def test_ray_is_asked_for_as_many_gpus_as_share_a_model():
    found = settings("kuberay/production")
    ingress: Any = assemble(found)
    replicas = ingress._bound_deployment.init_args[1]._bound_deployment
    assert replicas.ray_actor_options["num_gpus"] == found.engine.tensor_parallel_size


@each_cluster
def test_the_files_that_settings_name_are_mounted(cluster: str):
    objects, found = rendered(cluster), settings(cluster)
    for pod in pods(objects):
        if pod.owner["kind"] != "RayService" or pod.group == "head":
            continue
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in pod.spec["containers"][0]["volumeMounts"]}
        if found.keys_file:
            folder, _, file = found.keys_file.rpartition("/")
            assert (mounts[folder]["secret"]["secretName"], file) == ("vl-sae-keys", "keys.json")
        if cluster == "kuberay/production":
            assert found.artifact
            for path in (found.model, found.artifact):
                folder = "/" + path.split("/")[1]
                assert mounts[folder]["persistentVolumeClaim"]["claimName"] == "vl-sae-models"
