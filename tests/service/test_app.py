"""The application as a cluster builds it."""

from __future__ import annotations

from typing import Any, cast

import pytest
from pydantic import ValidationError
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build_as_a_cluster_does

from service.app import build_application
from service.settings import Settings


def test_a_cluster_s_args_are_settings() -> None:
    args = {"model": "/models/tiny", "artifact": "/a", "max_choices": 3, "max_ongoing_requests": 7}
    assert isinstance(build_as_a_cluster_does(build_application, args), Application)


@pytest.mark.parametrize(("args", "gpus"), [({"device": "cuda", "tensor_parallel_size": 2}, 2), ({"device": "cpu"}, 0)])
def test_a_model_gets_the_gpus_it_computes_with(args: dict, gpus: int) -> None:
    application = build_application(Settings(engine="vllm", **args))
    _settings, model = cast(tuple[Any, Any], application._bound_deployment.init_args)
    assert model._bound_deployment.ray_actor_options["num_gpus"] == gpus


@pytest.mark.parametrize("args", [{"max_choice": 3}, {"max_choices": 0}, {"engine": "other"}])
def test_wrong_args_are_refused(args: dict) -> None:
    with pytest.raises(ValidationError):
        build_as_a_cluster_does(build_application, args)
