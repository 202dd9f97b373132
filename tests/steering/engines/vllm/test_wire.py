"""The salt of the prefix cache holds everything that cached states depend on, and nothing that they do not."""

from __future__ import annotations

import pytest

from steering.engines.vllm.plugin.wire import WireSteering, cache_salt

BASE = {"id": "a", "form": "difference", "scale": 1.0, "beta_up": 0.5, "beta_down": 0.5}
REST = {"fingerprint": "f", "last_image_index": 7, "prompt_length": 20, "tenant": "t"}


def salt(wire: dict | None = None, **rest):
    return cache_salt(WireSteering(**(BASE | (wire or {}))), **(REST | rest))


@pytest.mark.parametrize(
    "changed",
    [
        {"form": "union"}, {"scale": 0.5}, {"beta_up": 0.6}, {"beta_down": 0.4}, {"gamma": 0.5},
        {"plausibility": 0.1}, {"control": "reversed"}, {"control_seed": 3}, {"task": "probe"},
        {"min_answer_tokens": 0},
    ],
    ids=lambda one: next(iter(one)),
)  # fmt: skip
def test_what_changes_states_changes_the_salt(changed):
    assert salt(changed) != salt()


@pytest.mark.parametrize("changed", [{"fingerprint": "g"}, {"last_image_index": 8}, {"tenant": "u"}])
def test_artifact_image_and_tenant_change_the_salt(changed):
    assert salt(**changed) != salt()


def test_the_prompt_s_length_changes_the_salt_where_it_decides_what_is_steered():
    assert salt(prompt_length=21) == salt()
    for wait in (0, 2):
        assert salt({"min_answer_tokens": wait}, prompt_length=21) != salt({"min_answer_tokens": wait})
    assert salt({"min_answer_tokens": 2}) != salt({"min_answer_tokens": 0})


def test_what_changes_only_logits_does_not():
    assert salt({"id": "b"}) == salt()
    assert salt({"gamma": 0.5}) == salt({"gamma": 0.2, "plausibility": 0.9})


def test_off_shares_with_its_tenant_only():
    nothing = {"fingerprint": "f", "last_image_index": 7, "prompt_length": 20}
    other = {"fingerprint": None, "last_image_index": 2, "prompt_length": 21}
    assert cache_salt(None, **nothing, tenant="") is None
    assert cache_salt(None, **nothing, tenant="t") == cache_salt(None, **other, tenant="t")
    assert cache_salt(None, **nothing, tenant="t") != cache_salt(None, **nothing, tenant="u")
