"""The command line that is made from a settings model."""

from typing import Literal

import pytest
from pydantic import Field

from steering.errors import BadArtifact
from training.command_line import Settings, parse_settings, run_stage
from training.errors import InvalidTraining


class Example(Settings):
    """What the help opens with."""

    layers: tuple[int, ...]
    """Layers, from 0."""
    rate: float = Field(default=0.1, gt=0)
    """Step, per update."""
    mode: Literal["fast", "slow"] | None = None
    """How."""
    deep: bool = False
    """Whether."""
    json_file: str | None = Field(default=None, alias="json")
    """Where."""


def parse(*argv: str) -> Example:
    return parse_settings(Example, program="example", argv=list(argv))


def test_values_are_parsed_to_their_types():
    settings = parse("--layers", "1", "2", "--rate", "2", "--mode", "slow", "--deep", "--json", "x")
    assert settings == Example(layers=(1, 2), rate=2.0, mode="slow", deep=True, json="x")


def test_what_is_not_given_has_its_default():
    assert parse("--layers", "3") == Example(layers=(3,))


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--rate", "1"], "--layers"),
        (["--layers", "1", "--rate", "-1"], "--rate: Input should be greater than 0"),
        (["--layers", "x"], "--layers: Input should be a valid integer"),
        (["--layers", "1", "--mode", "odd"], "--mode"),
        (["--layers", "1", "--unheard-of", "1"], "--unheard-of"),
    ],
)
def test_a_mistake_ends_the_program_and_names_the_option(argv: list[str], told: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_the_help_says_what_the_docstrings_say(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        parse("--help")
    told = capsys.readouterr().out
    assert "What the help opens with." in told
    assert "Step, per update. (default: 0.1)" in told


@pytest.mark.parametrize(
    "error", [InvalidTraining("--k: too many"), BadArtifact("a: broken"), OSError(28, "full", "f")]
)
def test_bad_input_ends_a_stage_with_one_line(error: Exception, capsys: pytest.CaptureFixture):
    def stage() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run_stage(stage)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_our_own_bugs_keep_their_traceback():
    def stage() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        run_stage(stage)
