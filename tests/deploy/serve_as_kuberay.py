"""A Ray of our own that is handed a `serveConfigV2` as KubeRay hands it over, until standard input ends.

`python -m tests.deploy.serve_as_kuberay FILE`: what Ray's dashboard does with the file that KubeRay sends it, without
the dashboard; then with each further file that a line of standard input names.
"""

from __future__ import annotations

import sys
from pathlib import Path

from steering.cluster.local_ray import private_ray

CPUS = 4


def main() -> None:
    [file] = sys.argv[1:]
    with private_ray(cpus=CPUS, gpus=0):
        import yaml
        from ray.serve._private.api import serve_start
        from ray.serve.schema import ServeDeploySchema

        def read(name: str) -> ServeDeploySchema:
            return ServeDeploySchema.model_validate(yaml.safe_load(Path(name).read_text()))

        config = read(file)
        client = serve_start(http_options=config.http_options.model_dump(), proxy_location=config.proxy_location)
        client.deploy_apps(config)
        print("deployed", flush=True)
        for line in sys.stdin:
            client.deploy_apps(read(line.strip()))


if __name__ == "__main__":
    main()
