"""A command line from a settings model: one option per field, its docstring as the help; and how a stage ends.

Knows no stage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from steering.errors import SteeringError
from training.errors import InvalidTraining


class Settings(BaseModel):
    """Base of every stage's settings: frozen, unknown keys refused, field docstrings kept for the help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


S = TypeVar("S", bound=Settings)


def parse_settings(model: type[S], *, program: str, description: str | None = None, argv: list[str] | None = None) -> S:
    """Settings from `argv` (None: this process's own); a bad value ends the program with a message that names it.

    The help opens with `description`, or where there is none with the model's docstring.
    """
    parser = argparse.ArgumentParser(
        prog=program, description=description or model.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name, field in model.model_fields.items():
        parser.add_argument(f"--{(field.alias or name).replace('_', '-')}", help=field.description, **_option(field))
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = "--" + str(first["loc"][0]).replace("_", "-") + ": " if first["loc"] else ""
        parser.error(f"{where}{first['msg']}")


def run_stage(stage: Callable[[], None]) -> None:
    """What a module's `__main__` calls: bad input ends the program with one line and status 2, Ctrl-C with 130."""
    try:
        stage()
    except (InvalidTraining, SteeringError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None


def _option(field: Any) -> dict[str, Any]:
    if field.annotation is bool:
        return {"action": argparse.BooleanOptionalAction, "default": field.default}
    option: dict[str, Any] = {"required": True} if field.is_required() else {"default": field.default}
    if choices := [c for part in _parts(field.annotation) if get_origin(part) is Literal for c in get_args(part)]:
        option["choices"] = choices
    if any(get_origin(part) is tuple for part in _parts(field.annotation)):
        option["nargs"] = "+"
    return option


def _parts(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, a plain type's only member being itself."""
    return (annotation,) if get_origin(annotation) in (Literal, tuple, None) else get_args(annotation)
