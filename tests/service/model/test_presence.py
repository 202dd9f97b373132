"""Whether the model has a replica, when Serve's controller says it, and when it says nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from ray.serve._private.common import DeploymentStatus, DeploymentStatusTrigger, ReplicaState
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatusOverview, ServeStatus

from service.model import presence
from service.model.presence import Presence, ServePresence, presence_of


def status(deployment: str, **replicas: int) -> ServeStatus:
    """As Serve's own types have it."""
    model = DeploymentStatusOverview(
        status=DeploymentStatus(deployment),
        status_trigger=DeploymentStatusTrigger.AUTOSCALING,
        replica_states={ReplicaState(state): number for state, number in replicas.items()},
        message="",
    )
    application = ApplicationStatusOverview(
        status=ApplicationStatus.RUNNING, message="", last_deployed_time_s=0.0, deployments={"Model": model}
    )
    return ServeStatus(applications={"app": application})


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], ServeStatus]], None]:
    return lambda answer: monkeypatch.setattr(presence.serve, "status", answer)


@pytest.mark.parametrize(
    ("deployment", "replicas", "expected"),
    [
        ("UPDATING", {"STARTING": 1}, Presence.ABSENT),
        ("HEALTHY", {"RUNNING": 1}, Presence.AWAKE),
        ("UPDATING", {"RUNNING": 1, "STARTING": 1}, Presence.AWAKE),
        ("UNHEALTHY", {"RUNNING": 1, "STOPPING": 1}, Presence.AWAKE),
        ("DOWNSCALING", {"STOPPING": 1}, Presence.ASLEEP),
        ("HEALTHY", {}, Presence.ASLEEP),
        ("UPSCALING", {"STARTING": 1}, Presence.ASLEEP),
        ("UNHEALTHY", {"STARTING": 1}, Presence.ABSENT),
        ("DEPLOY_FAILED", {}, Presence.ABSENT),
    ],
)
async def test_presence_is_what_serve_says_of_the_deployment(
    deployment: str, replicas: dict[str, int], expected: Presence, controller
) -> None:
    assert presence_of(deployment, replicas) is expected
    controller(lambda: status(deployment, **replicas))
    assert await ServePresence("app", "Model").look() is expected


async def test_one_that_serve_does_not_know_is_absent(controller) -> None:
    controller(ServeStatus)
    assert await ServePresence("app", "Model").look() is Presence.ABSENT


async def test_a_lost_controller_changes_nothing_and_holds_one_thread(
    controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ServePresence("app", "Model")
    controller(lambda: status("HEALTHY", RUNNING=1))
    assert await model.look() is Presence.AWAKE

    def fails() -> ServeStatus:
        raise RuntimeError("the controller died")

    controller(fails)
    assert await model.look() is Presence.AWAKE
    asked, may_answer = [], threading.Event()

    def hangs() -> ServeStatus:
        asked.append(1)
        may_answer.wait()
        return status("HEALTHY")

    controller(hangs)
    monkeypatch.setattr(presence, "LOOK_TIMEOUT_S", 0.01)
    assert [await model.look() for _ in range(5)] == [Presence.AWAKE] * 5
    assert len(asked) == 1
    may_answer.set()
    monkeypatch.setattr(presence, "LOOK_TIMEOUT_S", 5.0)
    assert await model.look() is Presence.ASLEEP
