import random

from training.interpretation.labels import ScoredPhrase, distinctive_phrases, label_texts, unique_labels
from training.interpretation.phrases import PhraseCounts

COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("star", "ring", "moon", "arrow", "cross", "heart")


def corpus(count=400):
    draw = random.Random(0)
    texts = []
    for _ in range(count):
        parts = [f"a {draw.choice(COLOURS)} {shape}" for shape in draw.sample(SHAPES, 3)]
        texts.append(f"There is {', '.join(parts)}.")
    counts = PhraseCounts()
    counts.add(texts)
    return texts, counts


def names(phrases):
    return [phrase.text for phrase in phrases]


def test_the_word_that_a_concept_s_texts_share_comes_first():
    texts, counts = corpus()
    stars = [text for text in texts if "star" in text][:20]
    assert names(distinctive_phrases(stars, [1.0] * 20, counts))[0] == "star"


def test_a_pair_is_said_where_it_tells_more_than_its_words():
    texts, counts = corpus()
    red_stars = [text for text in texts if "red star" in text][:20]
    assert names(distinctive_phrases(red_stars, [1.0] * 20, counts))[0] == "red star"


def test_common_words_are_never_said():
    texts, counts = corpus()
    for shape in SHAPES:
        of_shape = [text for text in texts if shape in text][:20]
        said = " ".join(names(distinctive_phrases(of_shape, [1.0] * 20, counts, count=8))).split()
        assert not {"there", "is", "a"} & set(said)


def test_stronger_texts_count_more():
    _, counts = corpus()
    texts = ["kite", "kite", "zebra", "zebra"]
    counts.add(texts)
    assert names(distinctive_phrases(texts, [1, 1, 2, 2], counts, count=1)) == ["zebra"]
    assert names(distinctive_phrases(texts, [2, 2, 1, 1], counts, count=1)) == ["kite"]


def test_no_text_no_phrase():
    assert distinctive_phrases([], [], PhraseCounts()) == []


def test_labels_are_unique_and_never_a_number():
    star, ring, twelve = (ScoredPhrase(text, 3.0) for text in ("star", "ring", "12"))
    labels = unique_labels([[star], [star], [star, ring], [], [], [twelve]], [0.1, 0.5, 0.3, 0, 0, 0.2])
    assert labels == ["star #0", "star", "star, ring", "", "", "12 #5"]


def test_a_label_grows_before_it_takes_a_number():
    phrases = [ScoredPhrase(text, 3.0) for text in ("star", "red", "moon")]
    assert unique_labels([phrases, phrases, phrases], [3, 2, 1]) == ["star, red", "star, red, moon", "star, red #2"]


def test_labels_need_no_more_than_the_concepts_texts():
    texts = [[f"a harbour at {hour}" for hour in range(10)], [f"a bicycle at {hour}" for hour in range(10)], []]
    assert label_texts(texts, [1, 1, 0]) == ["harbour", "bicycle", ""]


def test_other_scripts_have_labels_too():
    cats = [f"这里有一只猫在{place}" for place in "家车桌床树山路河海店"]
    dogs = [f"这里有一条狗在{place}" for place in "家车桌床树山路河海店"]
    cat, dog = label_texts([cats, dogs], [1, 1])
    assert "猫" in cat
    assert "狗" in dog
