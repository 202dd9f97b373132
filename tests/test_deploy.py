"""The deployment's configuration is one that Ray Serve and our settings accept; what watches it knows our metrics."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from service.metrics.exposition import Metrics
from service.settings import Settings
from tests.pages import read, sections

DEPLOY = Path(__file__).parent.parent / "deploy"
CONFIG = DEPLOY / "serve_config.yaml"
SAMPLES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
"""What Prometheus calls the samples of a metric."""
WATCHING = ("grafana/dashboard.json", "prometheus/alerts.yml", "prometheus/alerts_test.yml")


def test_the_serve_configuration_names_our_application_and_settings():
    schema = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    [application] = schema.applications
    module, name = application.import_path.split(":")
    assert callable(getattr(importlib.import_module(module), name))
    settings = Settings.model_validate(application.args)
    assert Path(settings.model).name == "llava"
    assert schema.http_options.host == "127.0.0.1"


@pytest.mark.parametrize("file", WATCHING)
def test_every_metric_that_is_watched_exists(file: str):
    families = Metrics().registry.collect()
    known = {family.name + suffix for family in families for suffix in SAMPLES[family.type]}
    watched = set(re.findall(r"\bvlsae_\w+", (DEPLOY / file).read_text()))
    assert len(watched) >= 8
    assert watched - known == set()


def test_every_metric_is_on_the_dashboard_and_on_the_page():
    dashboard, page = (DEPLOY / "grafana/dashboard.json").read_text(), sections(read("deploy/README.md"))["Watching it"]
    names = [family.name for family in Metrics().registry.collect()]
    assert [name for name in names if name not in dashboard] == []
    assert [name for name in names if f"`{name.removeprefix('vlsae_')}" not in page] == []


def test_the_dashboard_is_one_that_grafana_can_import():
    dashboard = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    places = [tuple(panel["gridPos"][key] for key in "xywh") for panel in panels]
    assert len({(x, y) for x, y, _, _ in places}) == len(panels)
    assert all(x >= 0 and x + width <= 24 for x, _, width, _ in places)
    sources = {panel["datasource"]["uid"] for panel in panels} | {
        target["datasource"]["uid"] for panel in panels for target in panel["targets"]
    }
    assert sources == {"${datasource}"}, "chosen on import, not ours"


@pytest.mark.parametrize(
    "command",
    ["check config prometheus.yml", "check rules alerts.yml", "test rules alerts_test.yml"],
)
def test_promtool(command: str):
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool")
    checked = subprocess.run(
        ["promtool", *command.split()], cwd=DEPLOY / "prometheus", capture_output=True, text=True, timeout=60
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_alert_is_tested_where_it_fires():
    [group] = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
    cases = yaml.safe_load((DEPLOY / "prometheus/alerts_test.yml").read_text())["tests"]
    fired = {
        test["alertname"] for case in cases for test in case.get("alert_rule_test", ()) if test["exp_alerts"]
    }  # fmt: skip
    assert fired == {rule["alert"] for rule in group["rules"]}
