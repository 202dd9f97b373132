"""When two engines agree, in the sense of design section 1: logprobs within a tolerance, and equal tokens up to the
first step at which the two most likely ones are closer than that."""

from __future__ import annotations

from tests.steering.engines.driving import Answer

TOLERANCE = 1e-3
VOCABULARY = 261


class Disagreement(AssertionError):
    """Two answers differ by more than rounding."""


def compare(answer: Answer, expected: Answer, choice: int = 0) -> tuple[float, bool]:
    """Largest difference of a logprob, and whether a near tie ended the comparison early. Raises Disagreement."""
    got, wanted = answer.logprobs(choice), expected.logprobs(choice)
    tokens, wanted_tokens = answer.tokens(choice), expected.tokens(choice)
    largest = 0.0
    for step, (ours, theirs) in enumerate(zip(got, wanted, strict=False)):
        if set(ours) != set(theirs) or len(ours) < VOCABULARY:
            raise Disagreement(f"step {step}: not the full vocabulary on both sides")
        difference = max(abs(ours[token] - theirs[token]) for token in theirs)
        if difference > TOLERANCE:
            raise Disagreement(f"step {step}: logprobs differ by {difference:.2g}")
        largest = max(largest, difference)
        first, second = sorted(theirs.values(), reverse=True)[:2]
        if first - second <= TOLERANCE:
            return largest, True
        if tokens[step] != wanted_tokens[step]:
            raise Disagreement(f"step {step}: token {tokens[step]} instead of {wanted_tokens[step]}")
    if len(tokens) != len(wanted_tokens):
        raise Disagreement(f"{len(tokens)} tokens instead of {len(wanted_tokens)}")
    return largest, False


def assert_agree(answers: list[Answer], expected: list[Answer]) -> float:
    """All of them, and near ties in at most 1 % of the steps; the largest difference."""
    compared = [compare(ours, theirs) for ours, theirs in zip(answers, expected, strict=True)]
    steps = sum(len(answer.tokens()) for answer in expected)
    ties = sum(tie for _, tie in compared)
    assert ties <= max(1, 0.01 * steps), f"{ties} near ties in {steps} steps"
    return max(difference for difference, _ in compared)
