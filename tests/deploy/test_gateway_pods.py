"""The gateway's pods: HAProxy takes the configuration as they have it, and the name it asks is one that is made."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import trustme

from service.gateway import find_haproxy
from tests.deploy.rendering import CLUSTERS, Pod, only, pods, rendered
from tests.deploy.test_cluster import gateway_default, seconds

each_cluster = pytest.mark.parametrize("cluster", CLUSTERS)


def gateway(cluster: str) -> Pod:
    [found] = [pod for pod in pods(rendered(cluster)) if pod.group == "vl-sae-gateway"]
    return found


def fill(volume: dict[str, Any], cluster: str, folder: Path) -> None:
    """What Kubernetes would put there; a Secret of TLS holds what cert-manager makes."""
    folder.mkdir()
    if "configMap" in volume:
        held = only(rendered(cluster), "ConfigMap", volume["configMap"]["name"])["data"]
        items = {name: name for name in held}
    else:
        certificate = trustme.CA().issue_cert("vl-sae.example")
        held = {
            "tls.crt": certificate.cert_chain_pems[0].bytes().decode(),
            "tls.key": certificate.private_key_pem.bytes().decode(),
        }
        items = {item["key"]: item["path"] for item in volume["secret"]["items"]}
    for key, path in items.items():
        (folder / path).write_text(held[key])


@each_cluster
def test_haproxy_takes_the_configuration_as_the_pod_has_it(cluster: str, tmp_path: Path):
    pod = gateway(cluster)
    [container] = pod.spec["containers"]
    volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
    here = {}
    for mount in container["volumeMounts"]:
        here[mount["mountPath"]] = str(tmp_path / mount["name"])
        fill(volumes[mount["name"]], cluster, tmp_path / mount["name"])

    def moved(text: str) -> str:
        for there, folder in here.items():
            text = text.replace(there, folder)
        return text

    environment = {name: moved(value) for name, value in pod.environment(container).items()}
    command = [find_haproxy(), *map(moved, container["args"][1:]), "-c"]
    checked = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@each_cluster
def test_its_ports_agree(cluster: str):
    pod = gateway(cluster)
    [container], [first] = pod.spec["containers"], pod.spec["initContainers"]
    environment = pod.environment(container)
    assert environment["GATEWAY_BIND"] == f":{container['ports'][0]['containerPort']}"
    assert container["ports"][0]["containerPort"] > 1024, "it is not root"
    assert ("GATEWAY_CERTIFICATE" in environment) == (cluster == "kuberay/production")
    assert pod.environment(first)["GATEWAY_SERVER"] == environment["GATEWAY_SERVER"]


@each_cluster
def test_it_asks_what_kuberay_makes(cluster: str):
    """KubeRay's names: NAME-serve-svc, or of an incremental upgrade the Gateway NAME-gateway with port 80, for which
    Istio makes a Service called GATEWAY-CLASS."""
    service = only(rendered(cluster), "RayService")
    name, upgrade = service["metadata"]["name"], service["spec"]["upgradeStrategy"]
    expected = f"{name}-serve-svc:8000"
    if upgrade["type"] == "NewClusterWithIncrementalUpgrade":
        expected = f"{name}-gateway-{upgrade['clusterUpgradeOptions']['gatewayClassName']}:80"
    [container] = gateway(cluster).spec["containers"]
    assert gateway(cluster).environment(container)["GATEWAY_SERVER"] == expected


@each_cluster
def test_it_waits_for_its_streams_when_it_goes(cluster: str):
    pod = gateway(cluster)
    [container] = pod.spec["containers"]
    _, pause = container["lifecycle"]["preStop"]["exec"]["command"]
    longest = seconds(gateway_default("GATEWAY_ANSWER_TIMEOUT")) + int(pause)
    assert pod.spec["terminationGracePeriodSeconds"] > longest


def test_limits_count_the_client_s_own_address():
    service = only(rendered("kuberay/production"), "Service", "vl-sae-gateway")["spec"]
    assert (service["type"], service["externalTrafficPolicy"]) == ("LoadBalancer", "Local")
