import tracemalloc

import pytest

from training.interpretation.phrases import MAX_WORDS, PhraseCounts, find_phrases


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A red star.", ["a red", "red", "red star", "star"]),
        ("red, blue", ["red", "blue"]),
        ("don't e-mail", ["don't", "don't e", "e mail", "mail"]),
        ("Красная звезда", ["красная", "красная звезда", "звезда"]),
        ("红星", ["红", "红星", "星"]),
        ("हिन्दी भाषा", ["हिन्दी", "हिन्दी भाषा", "भाषा"]),
        ("نجمة حمراء", ["نجمة", "نجمة حمراء", "حمراء"]),
        ("", []),
        ("!!! 🙂 ...", []),
    ],
)
def test_words_and_neighbours_in_any_script(text, expected):
    found = find_phrases(text)
    assert sorted(found) == sorted(expected)
    assert all(phrase.text == name for name, phrase in found.items())


def test_composed_and_decomposed_letters_are_one_word():
    assert find_phrases("cafe\u0301").keys() == find_phrases("caf\u00e9").keys()


def test_only_the_first_words_of_a_very_long_text_are_read():
    assert len(find_phrases(" ".join(f"word{index}" for index in range(10_000)))) == 2 * MAX_WORDS - 1


def test_texts_are_counted_not_occurrences():
    counts = PhraseCounts()
    counts.add(["star star star", "a red star"])
    counts.add(["ring"])
    assert counts.texts == 3
    assert counts.count(["star", "red star", "ring", "moon"]).tolist() == [2, 1, 1, 0]


def test_memory_does_not_grow_with_the_corpus():
    tracemalloc.start()
    counts = PhraseCounts()
    before = tracemalloc.get_traced_memory()[0]
    for start in range(0, 20_000, 1000):
        counts.add([f"word{index} other{index * 7}" for index in range(start, start + 1000)])
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 100_000
    assert counts.count(["word19999 other139993"]).tolist() == [1]
