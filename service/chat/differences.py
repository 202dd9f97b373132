"""Where two answers differ, by token. Knows token ids and bytes, no request and no engine."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

MAX_COMPARED_TOKENS = 1024
"""Of what is left between the equal beginning and the equal end of two answers: time grows with the square."""


def spell(spelled: Sequence[bytes], length: int) -> list[str]:
    """The tokens' texts, whole characters only, and no more than `length` of them all together: a stop string, say, is
    generated and not shown."""
    decoder, texts, left = codecs.getincrementaldecoder("utf-8")("replace"), [], length
    for index, token in enumerate(spelled):
        text = decoder.decode(token, final=index == len(spelled) - 1)[:left]
        texts.append(text)
        left -= len(text)
    return texts


def differences(first: Sequence[int], other: Sequence[int]) -> list[bool]:
    """Of every token of `other`, whether it is not one of those that stand, in order, in `first`, too."""
    shorter = min(len(first), len(other))
    start = next((at for at in range(shorter) if first[at] != other[at]), shorter)
    end = next((at for at in range(shorter - start) if first[-1 - at] != other[-1 - at]), shorter - start)
    one, two = first[start : len(first) - end], other[start : len(other) - end]
    differs = [False] * start + [True] * len(two) + [False] * end
    for at in _common(one[:MAX_COMPARED_TOKENS], two[:MAX_COMPARED_TOKENS]):
        differs[start + at] = False
    return differs


def similarity(one: Sequence[int], other: Sequence[int]) -> float:
    """2 M / T, where M of the T tokens of both stand in both, in order: 1 is the same."""
    return 2 * differences(one, other).count(False) / (len(one) + len(other)) if one or other else 1.0


def _common(one: Sequence[int], two: Sequence[int]) -> list[int]:
    """Places in `two` of a longest common subsequence. (difflib takes the cube of the length for an answer that repeats
    itself, and this the square for any.)"""
    rows = [[0] * (len(two) + 1)]  # rows[i][j]: its length for the last i tokens of `one` and the last j of `two`
    for token in reversed(one):
        above, row = rows[-1], [0]
        for at, other in enumerate(reversed(two)):
            row.append(above[at] + 1 if token == other else max(above[at + 1], row[at]))
        rows.append(row)
    found, at = [], 0
    for token, left in zip(one, range(len(one), 0, -1), strict=True):
        while at < len(two) and token != two[at] and rows[left][len(two) - at] == rows[left][len(two) - at - 1]:
            at += 1
        if at < len(two) and token == two[at]:
            found.append(at)
            at += 1
    return found
