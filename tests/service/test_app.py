"""The application as a cluster builds it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import ValidationError
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build_as_a_cluster_does

from service.app import assemble, build_application
from service.live_settings import LiveSettings
from service.settings import EngineSettings, Settings, SettingsError


def test_a_cluster_s_args_are_settings() -> None:
    args = {"model": "/models/tiny", "artifact": "/a", "max_choices": 3, "allow_anonymous": True, "gateway": "off"}
    for engine in ("huggingface", {"name": "vllm", "device": "cpu"}):
        assert isinstance(build_as_a_cluster_does(build_application, args | {"engine": engine}), Application)


@pytest.mark.parametrize(("args", "gpus"), [({"device": "cuda", "tensor_parallel_size": 2}, 2), ({"device": "cpu"}, 0)])
def test_a_model_gets_the_gpus_it_computes_with(args: dict, gpus: int) -> None:
    application = build_application(
        Settings(engine=EngineSettings(name="vllm", **args), gateway="off", allow_anonymous=True)
    )
    _settings, model, _ledger = cast(tuple[Any, ...], application._bound_deployment.init_args)
    assert model._bound_deployment.ray_actor_options["num_gpus"] == gpus


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"max_choice": 3}, "max_choice: there is no such setting; is it max_choices"),
        ({"max_choices": 0}, "max_choices"),
        ({"engine": "other"}, "engine.name"),
        ({"engine": {"branch": 1}}, "branch: there is no such setting; is it engine.branches"),
        ({"device": "cpu"}, "device: is engine.device now"),
        ({"model_replicas": 2}, "model_replicas: is num_replicas under `deployments:`"),
        ({"max_replicas": 3}, "max_replicas: stands under `autoscaling_config:`"),
        ({"port": 80}, "port: stands under `http_options:`"),
    ],
)
def test_wrong_and_retired_args_are_refused_by_name(args: dict, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        build_as_a_cluster_does(build_application, args)


def test_a_cluster_needs_keys_unless_it_says_otherwise() -> None:
    """A cluster's build does not know who can reach it. The file need not be where the application is built."""
    with pytest.raises(SettingsError, match=r"--keys-file: .*--allow-anonymous"):
        build_application(Settings())
    assert isinstance(build_application(Settings(keys_file="/secrets/keys.json", gateway="external")), Application)


def test_a_cluster_says_what_stands_in_front(monkeypatch: pytest.MonkeyPatch) -> None:
    """And Serve may not open a way around it."""
    with pytest.raises(SettingsError, match=r"gateway: say external, .* or off"):
        build_application(Settings(allow_anonymous=True))
    for variable in ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_ENABLE_DIRECT_INGRESS"):
        monkeypatch.setenv(variable, "1")
        with pytest.raises(SettingsError, match=f"{variable}: .*unset it"):
            build_application(Settings(allow_anonymous=True, gateway="external"))
        monkeypatch.delenv(variable)


def test_all_ingress_replicas_share_a_ledger() -> None:
    """Of one, too: how many there are is Serve's matter."""
    application = assemble(Settings(allow_anonymous=True, gateway="off"), ingress={"num_replicas": 3})
    assert application._bound_deployment.num_replicas == 3
    _settings, _model, ledger = cast(tuple[Any, ...], application._bound_deployment.init_args)
    assert ledger._bound_deployment.num_replicas == 1
    cpus = [cast(Any, one._bound_deployment.ray_actor_options)["num_cpus"] for one in (application, ledger)]
    assert cpus[1] > 0, "never on a head without CPUs"
    assert sum(cpus) == 1, "room for it wherever a replica is, and for a replica beside it"


def test_ray_is_told_how_many_cores_a_model_computes_with() -> None:
    application = build_application(
        Settings(allow_anonymous=True, gateway="off", engine=EngineSettings(device="cpu", cpu_threads=4))
    )
    _settings, model, _ledger = cast(tuple[Any, ...], application._bound_deployment.init_args)
    assert model._bound_deployment.ray_actor_options["num_cpus"] == 3.99


def test_a_cluster_s_user_config_is_a_live_change() -> None:
    ingress = build_application(Settings(allow_anonymous=True, gateway="off"))._bound_deployment.func_or_class
    live = LiveSettings(Settings(allow_anonymous=True))
    cast(Any, ingress).reconfigure(SimpleNamespace(_live=live), {"default_strength": 0.5})
    assert live.current.default_strength == 0.5
