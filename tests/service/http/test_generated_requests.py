"""A few of the requests of `generated_requests.py`: whatever is sent, the answer is one that the document promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.service.generated_requests import LINKED, UNLINKED, counts, send_generated
from tests.service.running_server import RunningServer, any_engine_will_do

pytestmark = [pytest.mark.service, pytest.mark.slow]


@any_engine_will_do
def test_every_answer_is_one_that_the_document_promises(server: RunningServer, tmp_path: Path) -> None:
    report = send_generated(server.url, examples=8, seed=5, report=tmp_path / "report.json", only=UNLINKED)
    assert report["exit_code"] == 0, report["printed"]
    assert report["test_cases"]["generated"] > 1000
    answered = counts(report)
    assert answered["POST /v1/chat/completions"]["accepted"] > 50, "not only refusals were seen"
    followed = send_generated(server.url, examples=20, seed=5, report=tmp_path / "links.json", only=LINKED)
    assert followed["exit_code"] == 0, followed["printed"]
    assert server.metric('vlsae_http_responses_total{route="/v1/feedback",status="200"}') > 0, "so were its links"
    server.wait_until_idle()
    assert server.get("/readyz").json() == {"status": "ready", "running": 0, "waiting": 0}
