"""What Serve says of applications, turned into candidates; Serve's own answers, without a Serve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from ray.exceptions import RayActorError
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatusOverview

from service.app import build_candidate
from service.artifacts import Able
from service.errors import ApiError
from service.model.candidates import CANDIDATE, Candidates, Known
from service.model.replica import ModelStatus
from service.settings import BUNDLED_ARTIFACT, Settings, SettingsError
from steering.artifact_config import read_config
from tests.service.examples import ScriptedModel

CONFIG = read_config(Path(BUNDLED_ARTIFACT))
BAD = "ray::ServeReplica\nTraceback ...\nsteering.errors.BadArtifact: the artifact was made for another model"


def application(status: str = "RUNNING", *, deployment: str | None = CANDIDATE, at: float = 1, message: str = ""):
    one = DeploymentStatusOverview("HEALTHY", "CONFIG_UPDATE_COMPLETED", {}, message)  # pyright: ignore
    deployments = {} if deployment is None else {deployment: one}
    return ApplicationStatusOverview(ApplicationStatus(status), "", at, deployments)


class Cluster:
    """What Serve would say, and which candidates were asked."""

    def __init__(self, **applications: ApplicationStatusOverview) -> None:
        self.applications, self.asked = applications, []
        self.model = ScriptedModel()
        self.known: Known | ApiError | None = None
        self.silent = False
        self.candidates = Candidates(self.model.status, self.ask, self.say)

    def say(self) -> dict[str, ApplicationStatusOverview]:
        if self.silent:
            raise RayActorError
        return self.applications

    async def ask(self, name: str) -> Known:
        self.asked.append(name)
        if isinstance(self.known, ApiError):
            raise self.known
        return self.known or (await self.model.status(), CONFIG)


async def test_one_that_runs_is_asked_once() -> None:
    cluster = Cluster(next=application(), service=application(deployment="Ingress"), main=application())
    found = await cluster.candidates.look()
    assert isinstance(found["next"], Able)
    assert found["next"].config == CONFIG
    assert list(found) == ["next"], "neither the service nor one that has the name of its own"
    assert await cluster.candidates.look() == found
    assert cluster.asked == ["next"], "a model that sleeps is not woken"
    cluster.applications["next"] = application(at=2)
    await cluster.candidates.look()
    assert cluster.asked == ["next", "next"], "deployed anew"


async def test_one_that_does_not_load_says_why() -> None:
    cluster = Cluster(next=application("DEPLOY_FAILED", message=BAD), early=application("DEPLOYING", deployment=None))
    found = await cluster.candidates.look()
    assert found["next"] == "not loaded (DEPLOY_FAILED): the artifact was made for another model"
    assert found["early"] == "not loaded (DEPLOYING): `serve status` says more"
    assert cluster.asked == []


async def test_what_answered_does_while_it_is_replaced_and_not_when_it_goes() -> None:
    cluster = Cluster(next=application())
    found = await cluster.candidates.look()
    for status in ("DEPLOYING", "UNHEALTHY", "DEPLOY_FAILED"):
        cluster.applications = {"next": application(status, at=2)}
        assert await cluster.candidates.look() == found, status
    cluster.applications = {"next": application("DELETING")}
    assert await cluster.candidates.look() == {}
    cluster.applications = {"next": application("DEPLOYING")}
    assert isinstance((await cluster.candidates.look())["next"], str), "it is forgotten"


async def test_another_model_or_no_artifact_is_refused() -> None:
    cluster = Cluster(next=application())
    status: ModelStatus = await cluster.model.status()
    for known, says in (
        ((replace(status, checkpoint="d" * 64), CONFIG), "serves another model"),
        ((status, None), "steering is off"),
        (ApiError("engine_unavailable", "the model does not answer yet"), "does not answer yet"),
    ):
        cluster.known = known
        assert says in str((await cluster.candidates.look())["next"])
    cluster.known = None
    assert isinstance((await cluster.candidates.look())["next"], Able), "asked again until it can"


async def test_where_serve_is_silent_all_is_as_it_was() -> None:
    cluster = Cluster(next=application())
    found = await cluster.candidates.look()

    cluster.silent = True
    assert await cluster.candidates.look() == found


@pytest.mark.parametrize("artifact", [None, "off"])
def test_a_candidate_is_an_artifact(artifact: str | None) -> None:
    settings = Settings(artifact=None) if artifact is None else Settings(steering="off")
    with pytest.raises(SettingsError, match="artifact: a candidate is one"):
        build_candidate(settings)
