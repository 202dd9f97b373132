"""Settings: one class, three sources, and clear words for what is wrong."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import service.command_line
from service.command_line import check_installation, parse_settings
from service.settings import (
    BUNDLED_ARTIFACT,
    EngineSettings,
    LaunchSettings,
    Settings,
    SettingsError,
)

REPOSITORY = Path(__file__).parent.parent.parent


def test_flags_win_over_environment_over_defaults() -> None:
    environment = {"VLSAE_MAX_IMAGES": "3", "VLSAE_MAX_CHOICES": "5", "PATH": "/bin"}
    settings = parse_settings(["--max-images", "2"], environment)
    assert (settings.max_images, settings.max_choices, settings.engine.max_batch_size) == (2, 5, 32)


def test_empty_values_count_as_not_given() -> None:
    settings = parse_settings(["--artifact", "", "--engine.device", "", "--engine.dtype", ""], {"VLSAE_PORT": ""})
    assert settings == LaunchSettings()


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
        (["--engine.device", "tpu"], {}, "--engine.device"),
        (["--engine.device", "cuda:1"], {}, "--engine.device.*'cuda'"),
        (["--engine.branches", "3"], {}, "--engine.branches.*2"),
        (["--engine.compile", "maybe"], {}, "--engine.compile.*boolean"),
        (["--engine.kv-cache-gib", "0"], {}, "--engine.kv-cache-gib"),
        (["--engine.gpu-memory-share", "90"], {}, "--engine.gpu-memory-share.*1"),
        ([], {"VLSAE_MAX_IMAGE": "3"}, "VLSAE_MAX_IMAGE: there is no such setting; is it max_image"),
        (["--max-image", "3"], {}, "--max-image: there is no such setting; is it max_image"),
        (["--device", "cpu"], {}, "--device: is engine.device now"),
        (["--device=cpu"], {}, "--device=cpu: is engine.device now"),
        (["--engine.branch", "1"], {}, "--engine.branch: there is no such setting; is it engine.branches"),
        ([], {"VLSAE_NAME": "x"}, "VLSAE_NAME: there is no such setting"),
        ([], {"VLSAE_BRANCHES": "2"}, "VLSAE_BRANCHES: is engine.branches now"),
        ([], {"VLSAE_ENGINE__BRANCH": "2"}, "VLSAE_ENGINE__BRANCH: there is no such setting; is it engine.branches"),
        ([], {"VLSAE_UNREADY_AFTER_S": "2"}, "VLSAE_UNREADY_AFTER_S: cannot be set any more"),
        ([], {"VLSAE_DEFAULT_STRENGTH": "2"}, "--default-strength"),
    ],
)
def test_wrong_settings_are_named(arguments: list[str], environment: dict[str, str], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        parse_settings(arguments, environment)


def test_what_kubernetes_says_of_a_service_named_vlsae_is_no_setting() -> None:
    told = {
        "VLSAE_SERVICE_HOST": "10.96.0.7",
        "VLSAE_SERVICE_PORT": "8000",
        "VLSAE_SERVICE_PORT_HTTP": "8000",
        "VLSAE_PORT": "tcp://10.96.0.7:8000",
        "VLSAE_PORT_8000_TCP": "tcp://10.96.0.7:8000",
        "VLSAE_PORT_8000_TCP_PROTO": "tcp",
        "VLSAE_PORT_8000_TCP_PORT": "8000",
        "VLSAE_PORT_8000_TCP_ADDR": "10.96.0.7",
        "VLSAE_HEAD_SVC_SERVICE_HOST": "10.96.0.8",
        "VLSAE_HEAD_SVC_PORT": "tcp://10.96.0.8:8000",
    }
    assert parse_settings([], told) == LaunchSettings()
    assert parse_settings([], told | {"VLSAE_MAX_IMAGES": "3"}).max_images == 3


def test_help_shows_every_setting_with_its_unit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_settings(["--help"], {})
    shown = " ".join(capsys.readouterr().out.split())
    units = {
        "_s": "second",
        "_bytes": "bytes",
        "_pixels": "pixels",
        "_tokens": "okens",
        "_side": "pixels",
        "_gib": "GiB",
    }
    groups = (LaunchSettings, EngineSettings)
    for name, field in (item for group in groups for item in group.model_fields.items() if item[0] != "engine"):
        assert field.description, name
        assert field.description in shown
        for ending, unit in units.items():
            assert not name.endswith(ending) or unit in field.description, name


def test_a_model_without_an_artifact_needs_steering_off(tiny_llava: Path) -> None:
    with pytest.raises(SettingsError, match="--steering off"):
        check_installation(parse_settings(["--model", str(tiny_llava)], {}))
    check_installation(parse_settings(["--model", str(tiny_llava), "--steering", "off"], {}))


def test_a_missing_vllm_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = parse_settings(["--engine", "vllm"], {})
    monkeypatch.setattr(service.command_line, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"--engine: .*'vl-sae-steering\[vllm\]'.*make serve ENGINE=vllm") as caught:
        check_installation(settings)
    extra = str(caught.value).partition("[")[2].partition("]")[0]
    assert extra in tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    check_installation(parse_settings([], {}))


@pytest.mark.vllm
def test_looking_for_vllm_does_not_import_it() -> None:
    program = (
        "import sys; from service.settings import *; from service.command_line import *;"
        "check_installation(parse_settings(['--engine', 'vllm'], {}));"
        "print([name for name in ('vllm', 'torch') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert shown.stdout.strip() == "[]"


def test_candidates_are_a_json_object_of_names_and_folders() -> None:
    assert parse_settings(["--candidates", '{"next": "/a"}'], {}).candidates == {"next": "/a"}
    for text, says in (("next", "JSON object"), ('{"main": "/a"}', "own artifact"), ('{"a b": "/a"}', "pattern")):
        with pytest.raises(SettingsError, match=rf"--candidates.*{says}"):
            parse_settings([], {"VLSAE_CANDIDATES": text})


def test_settings_of_vllm() -> None:
    environment = {"VLSAE_ENGINE__COMPILE": "on", "VLSAE_ENGINE__BRANCHES": "1", "VLSAE_ENGINE__KV_CACHE_GIB": "0.5"}
    arguments = ["--engine", "vllm", "--engine.gpu-memory-share", "0.5", "--engine.tensor-parallel-size", "2"]
    settings = parse_settings(arguments, environment).engine
    assert (settings.name, settings.compile, settings.branches, settings.kv_cache_gib) == ("vllm", True, 1, 0.5)
    assert (settings.gpu_memory_share, settings.tensor_parallel_size) == (0.5, 2)
    assert parse_settings(["--engine.compile", "off"], environment).engine.compile is False


def test_only_vllm_shares_a_model_among_devices() -> None:
    with pytest.raises(SettingsError, match=r"--engine\.tensor-parallel-size: only --engine vllm"):
        check_installation(parse_settings(["--engine.tensor-parallel-size", "2"], {}))


def test_a_log_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    check_installation(parse_settings(["--log-file", str(tmp_path / "service.log")], {}))
    with pytest.raises(SettingsError, match=r"--log-file: .*nowhere is not a folder"):
        check_installation(parse_settings(["--log-file", str(tmp_path / "nowhere" / "service.log")], {}))


@pytest.mark.parametrize("flag", ["--model", "--artifact"])
def test_missing_folders_are_named(flag: str, tiny_llava: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(tiny_llava), "--artifact", str(tmp_path), flag, str(tmp_path / "nowhere")]
    with pytest.raises(SettingsError, match=f"{flag}: .*nowhere is not"):
        check_installation(parse_settings(arguments, {}))


def test_automatic_choices() -> None:
    assert EngineSettings(device="cpu").settled().dtype == "float32"
    assert EngineSettings(device="cuda").settled().dtype == "bfloat16"
    assert EngineSettings(device="cuda", dtype="float32").settled().dtype == "float32"


def test_the_model_s_name_is_its_folder_s() -> None:
    assert Settings(model="/models/llava-1.5-7b-hf/").model_name == "llava-1.5-7b-hf"
    assert Settings(model="/x", served_model_name="org/name").model_name == "org/name"


@pytest.mark.parametrize(
    "arguments", [["--max-memory-bytes", "1000"], ["--max-image-pixels", "9" * 12], ["--max-body-bytes", "9" * 12]]
)
def test_one_request_at_its_limits_must_fit(arguments: list[str]) -> None:
    with pytest.raises(SettingsError, match=r"^--max-memory-bytes: .*max_request_pixels: at least \d+ bytes"):
        parse_settings(arguments, {})
