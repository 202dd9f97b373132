"""`python -m service`: the service in the foreground, on a Ray of its own, until Ctrl-C.

Whatever asks it to stop lets running requests finish first (`draining.py`); who asks twice does not wait.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import AbstractContextManager, nullcontext, suppress
from ipaddress import ip_address
from pathlib import Path

from service import APPLICATION
from service.callers.keys import load_keys, without_keys_on_loopback
from service.command_line import check_drain_file, check_installation, check_port, parse_settings
from service.draining import drain
from service.errors import explained
from service.example import curl_command
from service.gateway import Gateway, GatewayError, check_serve_mode, free_port, settle_gateway
from service.metrics.machine import FOLDER_VARIABLE
from service.model.object_store import fits_into_memory, needed_bytes
from service.model.replica import ModelStatus
from service.scaling import check_scaling, ingress_options, model_options, most_cpus, most_ingresses
from service.settings import MIB, LaunchSettings, SettingsError
from steering.cluster.local_ray import SHARED_MEMORY, private_ray, short_folder

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_S = 0.2
STATUS_TIMEOUT_S = 5.0
STARTUP_TIMEOUT_S = 1800.0
"""For loading the model."""
REPORT_EVERY_S = 10
LARGEST_KEPT_BLOCK_BYTES = 8 * 1024 * 1024
"""Larger ones, such as pixels, go back to the system when they are freed; glibc keeps up to 64 MB for each thread."""
HEAPS = 2
"""Of each process, shared by its threads: with one for each thread, each keeps what it once needed."""
DRAIN_MARGIN_S = 2.0
"""After their time is over, requests that were cut get so long to say so."""
DELETE_TIMEOUT_S = 10.0
"""Replicas have nothing left to do when they are asked to go; one that hangs is not waited for any longer."""
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks this machine itself, whatever proxy the environment names."""


class StartupError(Exception):
    """The service could not be started; the message says why."""


def main() -> int:
    try:
        settings = settle_gateway(parse_settings(sys.argv[1:], os.environ))
        check_serve_mode(os.environ)
        check_port(settings.host, settings.port)
        check_installation(settings)
        check_scaling(settings)
        check_drain_file(settings)
        settings = without_keys_on_loopback(settings, os.environ)
        keyed = load_keys(settings, os.environ) is not None
        gateway = Gateway.before(settings, server_port=free_port()) if settings.gateway == "on" else None
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stop_on_signals()
    try:
        serve_until_interrupted(settings, gateway, keyed=keyed)
    except (StartupError, GatewayError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    say("stopped")
    return 0


def stop_on_signals() -> None:
    """The next of these raises KeyboardInterrupt. Ray installs handlers of its own at start: call this after it."""
    for number in STOP_SIGNALS:
        signal.signal(number, _interrupt)


def ignore_signals() -> None:
    """What is being done ends by itself, soon."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _interrupt(_signal: int, _frame: object) -> None:
    ignore_signals()
    raise KeyboardInterrupt


def say(line: str) -> None:
    print(line, flush=True)


def own_url(settings: LaunchSettings) -> str:
    """Where this machine reaches the service."""
    host = settings.host
    with suppress(ValueError):
        if ip_address(host).is_unspecified:
            host = "::1" if ":" in host else "127.0.0.1"
    scheme = "https" if settings.tls_certificate else "http"
    return f"{scheme}://[{host}]:{settings.port}" if ":" in host else f"{scheme}://{host}:{settings.port}"


def serve_until_interrupted(settings: LaunchSettings, gateway: Gateway | None, *, keyed: bool) -> None:
    """Everything that is started is gone when this returns or raises."""
    public = settings
    began = time.monotonic()
    runs = settings.engine.settled()
    say(f"model     {settings.model} ({runs.name}, {runs.device}, {runs.dtype})")
    say(f"artifact  {settings.loaded_artifact or 'none: steering is off'}")
    if gateway is not None:
        say(f"gateway   HAProxy{', TLS' if settings.tls_certificate else ''}")
        inner = {"host": "127.0.0.1", "port": gateway.server_port, "tls_certificate": None}
        settings = settings.model_copy(update=inner)
    say("starting Ray ...")
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(LARGEST_KEPT_BLOCK_BYTES))
    os.environ.setdefault("MALLOC_ARENA_MAX", str(HEAPS))
    with tempfile.TemporaryDirectory(prefix="vlsae-run-", dir=short_folder()) as folder:
        os.environ[FOLDER_VARIABLE] = str(Path(folder) / "metrics")
        if settings.drain_file is None:
            settings = settings.model_copy(update={"drain_file": str(Path(folder) / "drain")})
        with gateway or nullcontext(), ray_for(settings, cpus=most_cpus(settings)):
            stop_on_signals()
            deploy(settings)  # a signal until here ends everything at once: nobody was answered yet
            try:
                wait_until_ready(settings, began)
                report(public, time.monotonic() - began, keyed=keyed)
                watch(gateway)
            except KeyboardInterrupt:
                stop_gracefully(settings)
                raise


def ray_for(settings: LaunchSettings, *, cpus: int) -> AbstractContextManager[None]:
    """A Ray whose object store holds all that requests may, in memory where this machine has room for it."""
    store_bytes = needed_bytes(settings, most_ingresses(settings))
    in_memory = fits_into_memory(store_bytes)
    if not in_memory:
        say(
            f"warning   {SHARED_MEMORY} has less than {store_bytes // MIB} MiB: pixels may go to the disk; make it "
            "larger (docker run --shm-size), or lower --max-memory-bytes"
        )
    return private_ray(cpus=cpus, object_store_bytes=store_bytes, in_memory=in_memory)


def watch(gateway: Gateway | None) -> None:
    """Until a signal comes. A gateway that is lost is back at once; one that does not start again is a GatewayError."""
    while True:
        if gateway is None:
            signal.pause()
        else:
            say(f"the gateway ended (status {gateway.wait()}): starting it again ...")
            gateway.start()


def deploy(settings: LaunchSettings) -> None:
    """Ray Serve with the application; returns before it runs."""
    from ray import serve

    from service.app import SHUTDOWN_MARGIN_S, assemble, assemble_candidate

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    timeout_s = settings.request_timeout_s + SHUTDOWN_MARGIN_S
    http = {"host": settings.host, "port": settings.port, "request_timeout_s": timeout_s}
    serve.start(http_options=http, proxy_location="HeadOnly")
    places = {name: getattr(settings, name) for name in ("max_ongoing_requests", "max_queued_requests")}
    application = assemble(
        settings.model_copy(update={"model_may_sleep": settings.min_replicas == 0}),
        ingress=ingress_options(settings),
        model={**model_options(settings), **places},
    )
    targets = [serve.RunTarget(application, name=APPLICATION)]
    for name, folder in settings.candidates.items():
        beside = assemble_candidate(settings.model_copy(update={"artifact": folder}), model=places)
        targets.append(serve.RunTarget(beside, name=name, route_prefix=None))
    serve.run_many(targets, wait_for_applications_running=False)


def stop_gracefully(settings: LaunchSettings) -> None:
    """Running requests finish or are told that they cannot. Another signal ends the waiting."""
    from ray import serve

    assert settings.drain_file is not None
    say("stopping: running requests may finish (once more, and they may not) ...")
    try:
        stop_on_signals()
        if not drain(Path(settings.drain_file), settings.drain_timeout_s + DRAIN_MARGIN_S):
            say("some requests did not end in time")
        ignore_signals()
        serve.delete(APPLICATION, _blocking=False)
        deadline = time.monotonic() + DELETE_TIMEOUT_S
        while APPLICATION in serve.status().applications and time.monotonic() < deadline:
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        say("stopping at once ...")
    finally:
        ignore_signals()
        Path(settings.drain_file).unlink(missing_ok=True)


def wait_until_ready(settings: LaunchSettings, began: float) -> None:
    """Progress lines until `/readyz` is 200."""
    from ray import serve

    say("loading the model ...")
    reported = time.monotonic()
    while True:
        application = serve.status().applications.get(APPLICATION)
        if application is not None:
            messages = "\n".join(one.message for one in application.deployments.values())
            failed = application.status in ("DEPLOY_FAILED", "UNHEALTHY")
            if failed or explained(messages):  # nor would these heal if tried again
                raise StartupError(startup_failure(messages))
        if get(settings, "/readyz") is not None:
            return
        if time.monotonic() - began > STARTUP_TIMEOUT_S:
            raise StartupError(f"not ready after {STARTUP_TIMEOUT_S:g} s")
        if time.monotonic() - reported > REPORT_EVERY_S:
            reported = time.monotonic()
            say(f"still loading after {reported - began:.0f} s ...")
        time.sleep(POLL_S)


def startup_failure(messages: str) -> str:
    """What an operator needs of a replica's last words: our own message, or all of a traceback nobody foresaw."""
    return explained(messages) or f"the model could not be loaded:\n{messages}"


def report(settings: LaunchSettings, seconds: float, *, keyed: bool) -> None:
    """What is served, what the artifact is worth, and how to ask."""
    able = model_status().capabilities
    say(f"family    {able.model_family}, context {able.context_tokens} tokens")
    if able.artifact:
        say(f"artifact  {able.artifact[:16]}, presets {', '.join(able.presets)}")
        for title, measured in (("alignment ", able.alignment), ("faithful  ", able.faithfulness)):
            figures = ", ".join(f"{name} {value:.3g}" for name, value in (measured or {}).items())
            say(title + (figures or "not measured"))
    url = own_url(settings)
    say(f"ready after {seconds:.1f} s: {url}/v1   (Ctrl-C stops it)\n")
    say(curl_command(url, settings.model_name, keyed=keyed) + "\n")


def model_status() -> ModelStatus:
    """Asked past HTTP, where a key may be needed."""
    from ray import serve

    return serve.get_deployment_handle("Model", APPLICATION).status.remote().result(timeout_s=STATUS_TIMEOUT_S)


def get(settings: LaunchSettings, path: str) -> dict | None:
    """The JSON behind a path, or None while it is not there."""
    try:
        with DIRECT.open(own_url(settings) + path, timeout=5) as answer:
            return json.load(answer)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return None


if __name__ == "__main__":
    sys.exit(main())
