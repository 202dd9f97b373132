"""Hands a cluster's Serve each configuration that comes in on standard input, a line each, and says how it is.

`python serve_watch.py HOST:PORT`: `local_cluster.ServeWatch` starts it, so that a benchmark outlives the node that this
process talks to.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import ray
from ray import serve
from ray.serve._private.api import serve_start
from ray.serve.schema import ServeDeploySchema

LOOK_EVERY_S = 0.5
DEPLOYS = 5


def deploy_what_comes() -> None:
    """Again where Serve's own waits, for its proxies for instance, were too short for a machine that does much else."""
    for line in sys.stdin:
        config = ServeDeploySchema.model_validate(json.loads(line))
        for _ in range(DEPLOYS):
            try:
                client = serve_start(
                    http_options=config.http_options.model_dump(), proxy_location=config.proxy_location
                )
                client.deploy_apps(config)
                break
            except Exception as error:
                print(f"not deployed: {error!r}", file=sys.stderr, flush=True)
                time.sleep(LOOK_EVERY_S)


def look() -> dict:
    at = time.monotonic()
    applications = serve.status().applications
    name, found = next(iter(applications.items()), ("", None))
    deployments = found.deployments if found else {}
    return {
        "at": at,
        "application": name,
        "status": found.status.value if found else "",
        "message": found.message if found else "",
        "deployments": {
            name: {
                "status": one.status.value,
                "message": one.message,
                "states": {getattr(state, "value", state): count for state, count in one.replica_states.items()},
            }
            for name, one in deployments.items()
        },
    }


def main() -> None:
    ray.init(address=sys.argv[1], log_to_driver=False)
    threading.Thread(target=deploy_what_comes, daemon=True).start()
    while True:
        print(json.dumps(look()), flush=True)
        time.sleep(LOOK_EVERY_S)


if __name__ == "__main__":
    main()
