"""Settings: one class, three sources, and clear words for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.settings import BUNDLED_ARTIFACT, Settings, SettingsError, check_installation, parse_settings


def test_flags_win_over_environment_over_defaults() -> None:
    environment = {"VLSAE_MAX_IMAGES": "3", "VLSAE_MAX_CHOICES": "5", "PATH": "/bin"}
    settings = parse_settings(["--max-images", "2"], environment)
    assert (settings.max_images, settings.max_choices, settings.max_batch_size) == (2, 5, 32)


def test_empty_values_count_as_not_given() -> None:
    settings = parse_settings(["--artifact", "", "--device", "", "--dtype", ""], {"VLSAE_PORT": ""})
    assert settings == Settings()


def test_the_bundled_artifact_goes_with_the_bundled_model_only(tmp_path: Path) -> None:
    assert parse_settings([], {}).artifact == str(BUNDLED_ARTIFACT)
    assert parse_settings(["--model", str(tmp_path)], {}).artifact is None
    assert parse_settings(["--artifact", "/a"], {}).artifact == "/a"


def test_steering_off_loads_no_artifact() -> None:
    assert parse_settings(["--steering", "off", "--artifact", "/a"], {}).loaded_artifact is None


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["--port", "none"], {}, "--port.*valid integer"),
        (["--port", "70000"], {}, "--port.*65535"),
        (["--engine", "tgi"], {}, "--engine.*'huggingface'"),
        (["--max-image-pixels", "-1"], {}, "--max-image-pixels"),
        (["--request-timeout-s", "nan"], {}, "--request-timeout-s.*finite"),
        (["--device", "tpu"], {}, "--device"),
        ([], {"VLSAE_MAX_IMAGE": "3"}, "VLSAE_MAX_IMAGE: there is no such setting"),
        ([], {"VLSAE_DEFAULT_STRENGTH": "2"}, "--default-strength"),
    ],
)
def test_wrong_settings_are_named(arguments: list[str], environment: dict[str, str], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        parse_settings(arguments, environment)


def test_help_shows_every_setting_with_its_unit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_settings(["--help"], {})
    shown = " ".join(capsys.readouterr().out.split())
    units = {"_s": "second", "_bytes": "bytes", "_pixels": "pixels", "_tokens": "okens", "_side": "pixels"}
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description in shown
        for ending, unit in units.items():
            assert not name.endswith(ending) or unit in field.description, name


def test_a_model_without_an_artifact_needs_steering_off(tiny_llava: Path) -> None:
    with pytest.raises(SettingsError, match="--steering off"):
        check_installation(parse_settings(["--model", str(tiny_llava)], {}))
    check_installation(parse_settings(["--model", str(tiny_llava), "--steering", "off"], {}))


def test_vllm_is_refused_by_what_is_missing(tiny_llava: Path) -> None:
    with pytest.raises(SettingsError, match=r"--engine: vllm needs .*not installed; use --engine huggingface"):
        check_installation(parse_settings(["--model", str(tiny_llava), "--engine", "vllm"], {}))


@pytest.mark.parametrize("flag", ["--model", "--artifact"])
def test_missing_folders_are_named(flag: str, tiny_llava: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(tiny_llava), "--artifact", str(tmp_path), flag, str(tmp_path / "nowhere")]
    with pytest.raises(SettingsError, match=f"{flag}: .*nowhere is not"):
        check_installation(parse_settings(arguments, {}))


def test_automatic_choices() -> None:
    assert Settings(device="cpu").resolved_dtype() == "float32"
    assert Settings(device="cuda:1").resolved_dtype() == "bfloat16"
    assert Settings(device="cuda", dtype="float32").resolved_dtype() == "float32"


def test_the_model_s_name_is_its_folder_s() -> None:
    assert Settings(model="/models/llava-1.5-7b-hf/").model_name == "llava-1.5-7b-hf"
    assert Settings(model="/x", served_model_name="org/name").model_name == "org/name"
