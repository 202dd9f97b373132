"""What a cluster's Prometheus and Grafana get is what is tested elsewhere, under the names that it counts on."""

from __future__ import annotations

import re

from tests.deploy.alerts import ALERTS, RULE, prometheus_rule
from tests.deploy.rendering import DEPLOY, only, pods, rendered, selects


def test_the_operator_s_alerts_are_the_alerts():
    assert RULE.read_text() == prometheus_rule(), "python -m tests.deploy.alerts"


def test_the_dashboard_is_the_dashboard():
    board = only(rendered("kuberay/production"), "ConfigMap", "vl-sae-steering-dashboard")
    assert board["data"] == {"dashboard.json": (DEPLOY / "grafana/dashboard.json").read_text()}
    assert board["metadata"]["labels"] == {"grafana_dashboard": "1"}


def test_every_pod_that_serves_is_scraped_under_the_name_that_alerts_know():
    objects = rendered("kuberay/production")
    monitor = only(objects, "PodMonitor")["spec"]
    scraped = [pod.group for pod in pods(objects) if selects(monitor["selector"], pod)]
    assert scraped == ["cpu", "gpu"]
    [endpoint] = monitor["podMetricsEndpoints"]
    [job] = set(re.findall(r'job="([^"]+)"', ALERTS.read_text()))
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": job}]
