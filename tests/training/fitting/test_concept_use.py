import torch

from training.fitting.concept_use import ConceptUse


def counts(*used, concepts=4):
    table = torch.zeros(concepts, 2, dtype=torch.int64)
    for concept, column in used:
        table[concept, column] += 1
    return table


def test_a_concept_that_nothing_used_for_an_epoch_is_dead():
    use = ConceptUse(4, steps_per_epoch=2)
    use.add(counts((0, 0), (1, 1)), 8)
    assert use.dead_K2.tolist() == [[False, True], [True, False], [True, True], [True, True]]
    use.add(counts((2, 0)), 8)
    assert use.dead_K2[:, 0].tolist() == [False, True, False, True]
    use.add(counts((2, 0)), 8)
    assert use.dead_K2[:, 0].tolist() == [True, True, False, True]
    assert use.measures()["image/dead_fraction"] == 0.75
    use.start_window()
    assert use.dead_K2[:, 0].tolist() == [True, True, False, True]


def test_frequencies_are_of_the_rows_since_the_last_evaluation():
    use = ConceptUse(4, steps_per_epoch=2)
    use.add(counts((0, 0), (0, 0), (3, 1)), 8)
    assert use.frequencies_K("image").tolist() == [0.25, 0, 0, 0]
    assert use.frequencies_K("text").tolist() == [0, 0, 0, 0.125]
    assert use.measures()["image/frequency_max"] == 0.25
    use.start_window()
    use.add(counts((1, 0)), 2)
    assert use.frequencies_K("image").tolist() == [0, 0.5, 0, 0]
