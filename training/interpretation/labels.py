"""A name for each concept: the phrases that its texts have and others have not. Text statistics, no other model.

A phrase scores by the log-odds of a text of the concept having it against a text of the corpus, over their standard
deviation, with a prior drawn from the corpus (Monroe et al., Fightin' Words, 2008). Texts count by their activation.
Knows texts and numbers; no store and no autoencoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from training.interpretation.phrases import Phrase, PhraseCounts, find_phrases

PRIOR_TEXTS = 5.0
"""Weight of the prior: as many texts as the corpus has them on average."""
MIN_SCORE = 1.0
"""Standard deviations above the corpus, for a phrase to be said."""
MIN_TEXTS = 2
"""Texts of the concept that must have it, where it has so many."""
PAIR_GAIN = 1.1
"""A pair of words must score so many times more than either of them."""
MOST_TERMS = 4
"""Terms that a label may grow to where a shorter one is another concept's already."""
SEPARATOR = ", "


class ScoredPhrase(NamedTuple):
    """How much a phrase tells a concept's texts from others."""

    text: str
    score: float


def distinctive_phrases(
    texts: Sequence[str], weights: Sequence[float], corpus: PhraseCounts, count: int = MOST_TERMS
) -> list[ScoredPhrase]:
    """The most telling first; none says again what an earlier one says. `weights` are the texts' activations."""
    phrases: dict[str, Phrase] = {}
    weight: dict[str, float] = {}
    occurrences: dict[str, int] = {}
    mean = sum(weights) / len(weights) if weights else 1.0
    for text, activation in zip(texts, weights, strict=True):
        for name, phrase in find_phrases(text).items():
            phrases[name] = phrase
            weight[name] = weight.get(name, 0.0) + activation / mean
            occurrences[name] = occurrences.get(name, 0) + 1
    needed = min(MIN_TEXTS, len(texts))
    names = [name for name in phrases if occurrences[name] >= needed]
    if not names:
        return []
    scores = _scores(np.array([weight[name] for name in names]), len(texts), corpus.count(names), corpus.texts)
    return _choose({name: (phrases[name], score) for name, score in zip(names, scores.tolist(), strict=True)}, count)


def unique_labels(
    phrases: Sequence[Sequence[ScoredPhrase]], mean_activations: Sequence[float], terms: int = 2
) -> list[str]:
    """One label for each concept, all different but those of concepts without any text, which have none.

    Concepts that are strongest on average choose first; a later one with the same phrases says more of them, or at
    last its number. A label is never a number, so that it cannot be taken for an id.
    """
    labels = [""] * len(phrases)
    taken: set[str] = set()
    for concept in sorted(range(len(phrases)), key=lambda index: (-mean_activations[index], index)):
        names = [phrase.text for phrase in phrases[concept]]
        options = [SEPARATOR.join(names[:size]) for size in range(min(terms, len(names)), len(names) + 1)]
        free = (option for option in options if option and option not in taken and not option.isdigit())
        labels[concept] = next(free, f"{options[0]} #{concept}" if options[0] else "")
        taken.add(labels[concept])
    return labels


def label_texts(texts: Sequence[Sequence[str]], mean_activations: Sequence[float], terms: int = 2) -> list[str]:
    """Labels of concepts of which no more is known than their texts: all of these together are the corpus."""
    corpus = PhraseCounts()
    for of_concept in texts:
        corpus.add(of_concept)
    phrases = [distinctive_phrases(of_concept, [1.0] * len(of_concept), corpus) for of_concept in texts]
    return unique_labels(phrases, mean_activations, terms)


def _scores(weight_P: np.ndarray, texts: int, corpus_P: np.ndarray, corpus_texts: int) -> np.ndarray:
    """Log-odds over their standard deviation, for P phrases."""
    common_P = np.minimum(corpus_P, corpus_texts - 0.5) + 0.25
    rare_P = corpus_texts + 0.5 - common_P
    with_P = np.minimum(weight_P, texts) + PRIOR_TEXTS * common_P / (corpus_texts + 0.5)
    without_P = texts + PRIOR_TEXTS - with_P
    log_odds_P = np.log(with_P / without_P) - np.log(common_P / rare_P)
    return log_odds_P / np.sqrt(1 / with_P + 1 / without_P + 1 / common_P + 1 / rare_P)


def _choose(scored: dict[str, tuple[Phrase, float]], count: int) -> list[ScoredPhrase]:
    """Best first; among equals one word before two, then in the order of the alphabet."""
    ranked = sorted(scored.values(), key=lambda one: (-one[1], len(one[0].words), one[0].text))
    chosen: list[ScoredPhrase] = []
    said: set[str] = set()
    for phrase, score in ranked:
        if score < MIN_SCORE or len(chosen) == count:
            break
        if said.intersection(phrase.words) or not _says_more(phrase, score, scored):
            continue
        chosen.append(ScoredPhrase(phrase.text, score))
        said.update(phrase.words)
    return chosen


def _says_more(phrase: Phrase, score: float, scored: dict[str, tuple[Phrase, float]]) -> bool:
    """A pair must tell more than its words; a word that is no phrase by itself (an article) tells nothing."""
    if len(phrase.words) == 1:
        return True
    parts = [scored[word][1] for word in phrase.words if word in scored]
    return len(parts) == len(phrase.words) and min(parts) >= MIN_SCORE and score >= PAIR_GAIN * max(parts)
