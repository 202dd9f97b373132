"""What an answer to a yes/no question says: yes, no, or neither. Knows no question, no picture and no model.

An answer is read clause by clause, and the first clause that decides, decides. A clause that says that the speaker
cannot tell ('Not sure', 'I can't tell whether it is a dog or not') is neither, though it holds a negation; after one,
only a plain yes or no is taken ('I am not sure, but yes').

Deviation from POPE's script, which takes every answer without 'no' or 'not' as a yes: an answer that says neither is
unparsed, which is wrong and is reported.
"""

from __future__ import annotations

import re

_CLAUSE_END = re.compile(r"[^\w ']+|(?=\b(?:but|however|although|though)\b)")
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
_YES = frozenset({"yes", "yeah", "yep", "yup", "yea"})
_NO = frozenset({"no", "nope", "nah", "none", "not", "never", "cannot", "incorrect", "false"})
_PLAIN_NO = frozenset({"no", "nope", "nah"})
_BUT = ("but", "however", "although", "though")

_DEGREE = r"(?:(?:\w+ly|quite|so|too|very|all that|at all) )?"
_DOUBT = re.compile(
    rf"(?:\bnot|\w+n't|\bnever) {_DEGREE}(?:sure|certain|clear|evident|obvious|possible to|able to|necessarily)\b"
    rf"|(?:\bcannot|\bcan not|\bcould not|\w+n't|\bdo not|\bunable to|\bnot able to) {_DEGREE}"
    r"(?:tell|say|know|determine|answer|judge|confirm|verify|be (?:sure|certain|determined|confirmed|verified|told))\b"
    r"|\b(?:unclear|uncertain|unsure|unknown|undetermined|indeterminate|ambiguous)\b"
    r"|\b(?:hard|difficult|impossible) to (?:tell|say|know|determine|answer|judge|be sure)\b"
)
"""A clause in which the speaker says that the answer is not known."""
_AGREES = re.compile(
    r"^(?:(?:that|this|it)(?: is|'s) )?"
    r"(?:sure|correct|true|certainly|definitely|absolutely|surely|indeed|affirmative|of course)\b"
)
"""Words that are a yes where an answer opens with them, and may be anything further on ('I am sure there is none')."""


def parse_answer(text: str) -> bool | None:
    """True for yes, False for no, None for neither."""
    doubted = False
    for number, clause in enumerate(_clauses(text)):
        if _DOUBT.search(" ".join(clause)):
            doubted = True
            continue
        said = _after_doubt(clause) if doubted else _said(clause, opens=number == 0)
        if said is not None:
            return said
    return None


def _clauses(text: str) -> list[list[str]]:
    """Words in lower case, clause by clause; 'but' opens one."""
    parts = _CLAUSE_END.split(text.lower().replace("’", "'"))
    return [words for part in parts if (words := _WORD.findall(part))]


def _said(clause: list[str], *, opens: bool) -> bool | None:
    """The first word that decides; 'certainly not' is a no."""
    if opens and (agreed := _AGREES.match(" ".join(clause))):
        following = " ".join(clause)[agreed.end() :].split()
        if not following or not _denies(following[0]):
            return True
    for word in clause:
        if word in _YES:
            return True
        if _denies(word):
            return False
    return None


def _after_doubt(clause: list[str]) -> bool | None:
    """What is said in spite of doubt: all that follows a 'but', and else a yes or no that opens or ends the clause."""
    if clause[0] in _BUT:
        return _said(clause[1:], opens=False)
    for word in (clause[0], clause[-1]):
        if word in _YES:
            return True
        if word in _PLAIN_NO:
            return False
    return None


def _denies(word: str) -> bool:
    return word in _NO or word.endswith("n't")
