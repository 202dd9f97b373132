"""`deploy/prometheus/alerts.yml` as the Prometheus operator wants it: `python -m tests.deploy.alerts` writes it anew.

The file itself stays as promtool reads it.
"""

from __future__ import annotations

from tests.deploy.rendering import DEPLOY

ALERTS, RULE = DEPLOY / "prometheus/alerts.yml", DEPLOY / "prometheus/prometheus-rule.yaml"
HEAD = """\
# alerts.yml for the Prometheus operator, written by `python -m tests.deploy.alerts`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: vl-sae-steering
spec:
"""


def prometheus_rule() -> str:
    _, groups, rules = ALERTS.read_text().partition("groups:\n")
    return HEAD + "".join(f"  {line}" if line.strip() else line for line in (groups + rules).splitlines(keepends=True))


if __name__ == "__main__":
    RULE.write_text(prometheus_rule())
