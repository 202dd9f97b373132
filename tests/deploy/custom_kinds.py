"""Schemas of the kinds that Kubernetes itself does not have, of no more than the fields and values that we use.

From the types and the validation of KubeRay 1.7 and of the Prometheus operator's v1. Templates of pods are left to
Kubernetes' own schemas.
"""

from __future__ import annotations

from typing import Any

ANYTHING: dict[str, Any] = {"type": "object"}
BOOLEAN: dict[str, Any] = {"type": "boolean"}
TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
TEXTS: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
PERCENT: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 100}
DURATION: dict[str, Any] = {"type": "string", "pattern": r"^\d+(ms|s|m|h)$"}


def fields(*required: str, **properties: dict[str, Any]) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": properties,
    }


def several(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": items}


def kind(api_version: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    label = {"type": "string", "pattern": r"^[a-z]([a-z0-9-]*[a-z0-9])?$", "maxLength": 40}
    metadata = fields("name", name=label, namespace=label, labels=TEXTS, annotations=TEXTS)
    words = {"apiVersion": {"const": api_version}, "kind": {"const": name}}
    return fields("apiVersion", "kind", "metadata", "spec", **words, metadata=metadata, spec=spec)


RAY_CLUSTER = fields(
    "rayVersion",  # with a token it must be there
    "headGroupSpec",
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=fields("mode", mode={"enum": ["disabled", "token"]}),
    gcsFaultToleranceOptions=fields(
        "redisAddress",
        redisAddress={"type": "string", "pattern": r"^(rediss?://)?[a-z0-9.-]+:\d+$"},
        redisPassword=fields(
            "valueFrom", valueFrom=fields("secretKeyRef", secretKeyRef=fields("name", "key", name=TEXT, key=TEXT))
        ),
    ),
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=fields(
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        securityContext=ANYTHING,
        resources=ANYTHING,
    ),
    headGroupSpec=fields("template", rayStartParams=TEXTS, template=ANYTHING),
    workerGroupSpecs=several(
        fields(
            "groupName",
            "minReplicas",
            "maxReplicas",
            "template",
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            idleTimeoutSeconds=COUNT,
            rayStartParams=TEXTS,
            template=ANYTHING,
        )
    ),
)

UPGRADE = {
    "oneOf": [
        fields("type", type={"enum": ["NewCluster", "None"]}),
        fields(
            "type",
            "clusterUpgradeOptions",
            type={"const": "NewClusterWithIncrementalUpgrade"},
            clusterUpgradeOptions=fields(
                "stepSizePercent",
                "intervalSeconds",
                "gatewayClassName",
                maxSurgePercent=PERCENT,
                stepSizePercent=PERCENT,
                intervalSeconds={"type": "integer", "minimum": 1},
                gatewayClassName=TEXT,
            ),
        ),
    ]
}

SCHEMAS = {
    "RayService": kind(
        "ray.io/v1",
        "RayService",
        fields(
            "rayClusterConfig",
            "serveConfigV2",
            serveConfigV2=TEXT,
            rayClusterConfig=RAY_CLUSTER,
            upgradeStrategy=UPGRADE,
            rayClusterDeletionDelaySeconds=COUNT,
            excludeHeadPodFromServeSvc=BOOLEAN,
        ),
    ),
    "RayJob": kind(
        "ray.io/v1",
        "RayJob",
        fields(
            "rayClusterSpec",
            "entrypoint",
            entrypoint=TEXT,
            entrypointNumCpus={"type": "number", "minimum": 0},
            entrypointNumGpus={"type": "number", "minimum": 0},
            submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode"]},
            backoffLimit=COUNT,
            shutdownAfterJobFinishes={"const": True},  # ttlSecondsAfterFinished needs it, and GPUs cost
            ttlSecondsAfterFinished=COUNT,
            rayClusterSpec=RAY_CLUSTER,
        ),
    ),
    "PodMonitor": kind(
        "monitoring.coreos.com/v1",
        "PodMonitor",
        fields(
            "selector",
            "podMetricsEndpoints",
            selector=ANYTHING,
            podMetricsEndpoints=several(
                fields(
                    "port",
                    port=TEXT,
                    path=TEXT,
                    interval=DURATION,
                    relabelings=several(fields("targetLabel", targetLabel=TEXT, replacement=TEXT)),
                )
            ),
        ),
    ),
    "PrometheusRule": kind(
        "monitoring.coreos.com/v1",
        "PrometheusRule",
        fields(
            "groups",
            groups=several(
                fields(
                    "name",
                    "rules",
                    name=TEXT,
                    rules=several(
                        fields(
                            "alert", "expr", alert=TEXT, expr=TEXT, labels=TEXTS, annotations=TEXTS, **{"for": DURATION}
                        )
                    ),
                )
            ),
        ),
    ),
}
