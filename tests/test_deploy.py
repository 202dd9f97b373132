"""The deployment's configuration is one that Ray Serve and our settings accept."""

from __future__ import annotations

import importlib
from pathlib import Path

import yaml
from ray.serve.schema import ServeDeploySchema

from service.settings import Settings

CONFIG = Path(__file__).parent.parent / "deploy/serve_config.yaml"


def test_the_serve_configuration_names_our_application_and_settings():
    schema = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    [application] = schema.applications
    module, name = application.import_path.split(":")
    assert callable(getattr(importlib.import_module(module), name))
    settings = Settings.model_validate(application.args)
    assert Path(settings.model).name == "llava"
    assert schema.http_options.host == "127.0.0.1"
