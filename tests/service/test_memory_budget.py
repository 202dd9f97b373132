"""What requests hold together: taken piece by piece, given back however the work ends."""

from __future__ import annotations

import pytest

from service.errors import ApiError
from service.memory_budget import MemoryBudget


def test_shares_add_up_and_are_given_back() -> None:
    budget = MemoryBudget(10)
    with budget.share() as first:
        first.take(4)
        with budget.share() as second:
            second.take(6)
            with pytest.raises(ApiError, match="too many bytes"):
                second.take(1)
        assert budget.taken_bytes == 4, "all of the second share"
        first.take(6)
    assert budget.taken_bytes == 0
