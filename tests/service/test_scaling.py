"""How many replicas there may be: numbers derived from the settings, and contradictions refused by name."""

from __future__ import annotations

from typing import Any, cast

import pytest

from service import scaling
from service.app import assemble
from service.command_line import parse_settings
from service.scaling import check_scaling, ingress_options, model_options, most_cpus
from service.settings import LaunchSettings, SettingsError


def settings_of(*arguments: str) -> LaunchSettings:
    return parse_settings(["--engine.device", "cpu", *arguments], {})


def test_without_a_word_the_number_of_replicas_is_fixed() -> None:
    settings = settings_of("--model-replicas", "2", "--ingress-replicas", "3")
    check_scaling(settings)
    assert model_options(settings) == {"num_replicas": 2}
    assert ingress_options(settings) == {"num_replicas": 3}
    assert most_cpus(settings) == 5


def test_a_model_grows_at_three_quarters_of_its_batch_and_there_is_room() -> None:
    settings = settings_of("--max-replicas", "3", "--engine.max-batch-size", "16", "--engine.cpu-threads", "2")
    check_scaling(settings)
    model = model_options(settings)["autoscaling_config"]
    assert (model["min_replicas"], model["initial_replicas"], model["max_replicas"]) == (1, 1, 3)
    assert model["target_ongoing_requests"] == 12
    assert ingress_options(settings)["autoscaling_config"]["max_replicas"] == 3
    assert most_cpus(settings) == 3 + 3 * 2


def test_one_that_may_go_to_zero_starts_all_the_same() -> None:
    """A damaged artifact is found at the start, not by the first client."""
    settings = settings_of("--min-replicas", "0")
    check_scaling(settings)
    model = model_options(settings)["autoscaling_config"]
    assert (model["min_replicas"], model["initial_replicas"], model["max_replicas"]) == (0, 1, 1)
    assert ingress_options(settings) == {"num_replicas": 1}


def test_serve_takes_what_is_derived_and_a_replica_holds_more_than_its_target() -> None:
    settings = settings_of("--max-replicas", "3", "--min-replicas", "0", "--scale-down-delay-s", "7")
    application = assemble(
        settings.model_copy(update={"allow_anonymous": True, "gateway": "off"}),
        ingress=ingress_options(settings),
        model=model_options(settings),
    )
    _settings, model, _ledger = cast(tuple[Any, ...], application._bound_deployment.init_args)
    for deployment in (model._bound_deployment, application._bound_deployment):
        config: Any = deployment._deployment_config
        assert config.autoscaling_config.max_replicas == 3
        assert config.autoscaling_config.downscale_delay_s == 7
        assert config.autoscaling_config.target_ongoing_requests < config.max_ongoing_requests
        assert config.graceful_shutdown_timeout_s > settings.request_timeout_s


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--max-replicas", "2", "--model-replicas", "3"), "--max-replicas: it is 2, fewer than the 3"),
        (("--min-replicas", "2"), "--min-replicas: it is 2, more than the 1"),
        (("--max-replicas", "2", "--max-ongoing-requests", "24"), "--max-ongoing-requests: it is 24, .*more than 24"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(arguments: tuple[str, ...], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        check_scaling(settings_of(*arguments))


@pytest.mark.parametrize(
    ("gpus", "arguments", "says"),
    [
        (0, (), "--engine.device: there is no CUDA device"),
        (3, ("--model-replicas", "2", "--engine.tensor-parallel-size", "2"), "--model-replicas: .* of 2 GPUs need 4"),
        (2, ("--max-replicas", "3"), "--max-replicas: 3 model replicas of 1 GPU need 3, .*there are 2; .*at most 2"),
        (3, ("--max-replicas", "3"), None),
    ],
)
def test_more_gpus_than_there_are_are_refused(
    gpus: int, arguments: tuple[str, ...], says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "gpus_here", lambda: gpus)
    settings = settings_of(*arguments, "--engine.device", "cuda")
    if says is None:
        check_scaling(settings)
        return
    with pytest.raises(SettingsError, match=says):
        check_scaling(settings)
