"""`python -m service`: the service in the foreground on 127.0.0.1, on a Ray of its own, until Ctrl-C."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request

from service.example import curl_command
from service.settings import Settings, SettingsError, check_installation, parse_settings
from steering.local_ray import private_ray

HOST = "127.0.0.1"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_S = 0.2
REPORT_EVERY_S = 10
EXPLAINED = tuple(
    f"{family}: "
    for family in ("steering.errors.BadArtifact", "steering.errors.EngineUnavailable", "service.settings.SettingsError")
)
"""How a traceback names the errors whose message says it all."""
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks this machine itself, whatever proxy the environment names."""


class StartupError(Exception):
    """The service could not be started; the message says why."""


def main() -> int:
    try:
        settings = parse_settings(sys.argv[1:], os.environ)
        check_port(settings.port)
        check_installation(settings)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stop_on_signals()
    try:
        serve_until_interrupted(settings)
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    say("stopped")
    return 0


def stop_on_signals() -> None:
    """The first of these stops the service. Ray installs handlers of its own at start: call this after it."""
    for number in STOP_SIGNALS:
        signal.signal(number, _interrupt)


def _interrupt(_signal: int, _frame: object) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def say(line: str) -> None:
    print(line, flush=True)


def check_port(port: int) -> None:
    """Nothing is started for a port that somebody has."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise SettingsError(
                f"--port: cannot listen on {HOST}:{port} ({error.strerror}); stop what uses it or choose another one "
                "(make serve PORT=...)"
            ) from None


def serve_until_interrupted(settings: Settings) -> None:
    began = time.monotonic()
    say(f"model     {settings.model} ({settings.engine}, {settings.resolved_device()}, {settings.resolved_dtype()})")
    say(f"artifact  {settings.loaded_artifact or 'none: steering is off'}")
    say("starting Ray ...")
    with private_ray(cpus=settings.ingress_replicas + settings.model_replicas):
        stop_on_signals()
        from ray import serve

        from service.app import APPLICATION, build_application

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(http_options={"host": HOST, "port": settings.port}, proxy_location="HeadOnly")
        target = serve.RunTarget(build_application(settings), name=APPLICATION)
        serve.run_many([target], wait_for_applications_running=False)
        try:
            wait_until_ready(settings, began)
            report(settings, time.monotonic() - began)
            while True:
                signal.pause()
        finally:
            say("stopping ...")
            serve.delete(APPLICATION)


def wait_until_ready(settings: Settings, began: float) -> None:
    """Progress lines until `/readyz` is 200."""
    from ray import serve

    from service.app import APPLICATION

    say("loading the model ...")
    reported = time.monotonic()
    while True:
        application = serve.status().applications.get(APPLICATION)
        if application is not None and application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise StartupError(startup_failure("\n".join(one.message for one in application.deployments.values())))
        if get(settings.port, "/readyz") is not None:
            return
        if time.monotonic() - began > settings.startup_timeout_s:
            raise StartupError(f"not ready after {settings.startup_timeout_s:g} s (--startup-timeout-s)")
        if time.monotonic() - reported > REPORT_EVERY_S:
            reported = time.monotonic()
            say(f"still loading after {reported - began:.0f} s ...")
        time.sleep(POLL_S)


def startup_failure(messages: str) -> str:
    """What an operator needs of a replica's last words: our own message, or all of a traceback nobody foresaw."""
    for family in EXPLAINED:
        if family in messages:
            return messages.rpartition(family)[2].strip()
    return f"the model could not be loaded:\n{messages}"


def report(settings: Settings, seconds: float) -> None:
    """What is served, what the artifact is worth, and how to ask."""
    version = get(settings.port, "/version") or {}
    say(f"family    {version['model_family']}, context {version['context_tokens']} tokens")
    if version["artifact"]:
        say(f"artifact  {version['artifact'][:16]}, presets {', '.join(version['presets'])}")
        gate = version["alignment"] or {}
        say(f"alignment {', '.join(f'{name} {value:.3g}' for name, value in gate.items()) or 'not measured'}")
    url = f"http://{HOST}:{settings.port}"
    say(f"ready after {seconds:.1f} s: {url}/v1   (Ctrl-C stops it)\n")
    say(curl_command(url, settings.model_name) + "\n")


def get(port: int, path: str) -> dict | None:
    """The JSON behind a path, or None while it is not there."""
    try:
        with DIRECT.open(f"http://{HOST}:{port}{path}", timeout=5) as answer:
            return json.load(answer)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return None


if __name__ == "__main__":
    sys.exit(main())
