"""The advice on errors: complete, true to the statuses, and on the service's page word for word."""

from __future__ import annotations

import pytest

from service.errors import ERROR_KINDS, ApiError
from service.http.error_guide import GUIDE, LATER, markdown_table
from tests.pages import read, sections


def test_every_error_has_its_advice_in_the_order_of_the_table() -> None:
    assert list(GUIDE) == list(ERROR_KINDS)


@pytest.mark.parametrize("code", ERROR_KINDS)
def test_whether_to_wait_is_what_the_header_says(code: str) -> None:
    headers = ApiError(code, "").headers()
    assert (GUIDE[code].retry == LATER) == ("Retry-After" in headers and "x-should-retry" not in headers)


def test_the_service_s_page_has_the_table() -> None:
    assert markdown_table() in sections(read("service/README.md"))["Errors"]
