"""What a RayService hands to Ray Serve, read as Ray Serve and the service read it."""

from __future__ import annotations

import yaml
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from service.settings import Settings
from tests.deploy.rendering import only, rendered


def serve_config(cluster: str) -> ServeDeploySchema:
    """`serveConfigV2` of an overlay, built by Ray Serve's own validator."""
    service = only(rendered(cluster), "RayService")
    return ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))


def application(cluster: str) -> ServeApplicationSchema:
    [found] = serve_config(cluster).applications
    return found


def settings(cluster: str) -> Settings:
    """The service's, of the application's args."""
    return Settings.model_validate(application(cluster).args)
