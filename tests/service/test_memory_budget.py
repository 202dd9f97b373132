"""What requests hold together: taken piece by piece, given back however the work ends."""

from __future__ import annotations

import pytest

from service.errors import ApiError
from service.memory_budget import MemoryBudget


def test_shares_add_up_and_are_given_back() -> None:
    budget = MemoryBudget(10)
    with budget.share("") as first:
        first.take(4)
        with budget.share("") as second:
            second.take(6)
            with pytest.raises(ApiError, match="too many bytes"):
                second.take(1)
        assert budget.taken_bytes == 4, "all of the second share"
        first.take(6)
        first.give_back()
        assert budget.taken_bytes == 0, "at once, not only at the end"
    assert budget.taken_bytes == 0, "and once"


def test_one_caller_of_several_gets_half() -> None:
    budget = MemoryBudget(10)
    with budget.share("a") as one, budget.share("a") as another, budget.share("b") as of_b:
        one.take(3)
        another.take(2)
        with pytest.raises(ApiError, match="the key's"):
            another.take(1)
        of_b.take(5)
        one.give_back()
        another.take(3)
