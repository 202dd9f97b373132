"""What the gate lets through and what not, on autoencoders whose codes agree or do not by construction."""

import pytest
import torch

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.sparse_autoencoder import VisionLanguageSAE
from training.alignment import FAITHFULNESS, Alignment, alignment_gate, measure_alignment
from training.errors import InvalidTraining
from training.losses import unexplained_variance
from training.store.reader import PairBatch

WIDTH = 16
ALIGNED = {"paired_overlap": 0.6, "stranger_overlap": 0.2, "overlap_beyond_chance": 0.35, "recall_at_1": 0.3} | {
    "pairs": 500.0
}
FAITHFUL = dict.fromkeys(FAITHFULNESS, 0.1)


@pytest.fixture(scope="module")
def autoencoders():
    """The same for both modalities."""
    torch.manual_seed(0)
    auxiliary, sae = AuxiliaryAutoencoder(WIDTH, WIDTH), VisionLanguageSAE(WIDTH, 64, 4)
    with torch.no_grad():
        auxiliary.text_projection.load_state_dict(auxiliary.vision_projection.state_dict())
    return auxiliary, sae


def measured(autoencoders: tuple[AuxiliaryAutoencoder, VisionLanguageSAE], pairs: PairBatch) -> Alignment:
    auxiliary, sae = autoencoders
    return measure_alignment(auxiliary, sae, pairs)


def batch(image_ND, text_ND, begun_ND=None, image_ids=None):
    count = len(image_ND)
    ids_N = torch.arange(count) if image_ids is None else image_ids
    return PairBatch(image_ND, text_ND, text_ND if begun_ND is None else begun_ND, torch.arange(count), ids_N)


def gate(alignment, faithfulness=FAITHFUL):
    return alignment_gate(alignment, faithfulness)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, None),
        ({"stranger_overlap": 0.399}, None),
        ({"stranger_overlap": 0.41}, "at least 1.5 times as much is needed"),
        ({"stranger_overlap": 0.6, "overlap_beyond_chance": 0.2}, "at least 1.5 times as much is needed"),
        ({"overlap_beyond_chance": 0.05}, None),
        ({"overlap_beyond_chance": 0.049}, "at least 0.05 beyond chance is needed"),
        ({"overlap_beyond_chance": -0.3}, "at least 0.05 beyond chance is needed"),
        ({"paired_overlap": 0.003, "stranger_overlap": 0.001, "overlap_beyond_chance": 0.0019}, "beyond chance"),
        ({"paired_overlap": 0.0, "stranger_overlap": 0.0, "overlap_beyond_chance": 0.0}, "beyond chance"),
        ({"paired_overlap": float("nan")}, "at least 1.5 times"),
        ({"overlap_beyond_chance": float("nan")}, "beyond chance is needed"),
    ],
)
def test_codes_of_pairs_must_overlap_more_than_those_of_strangers(changed, why):
    passed, figures = gate(ALIGNED | changed)
    assert passed is (why is None)
    assert figures.startswith(f"codes of a pair overlap {(ALIGNED | changed)['paired_overlap']:.3f}, of strangers ")
    assert why is None or why in figures
    assert passed is ("needed" not in figures)


@pytest.mark.parametrize("name", FAITHFULNESS)
@pytest.mark.parametrize(("value", "passes"), [(0.5, True), (0.501, False), (1.3, False), (float("nan"), False)])
def test_what_is_generated_must_be_explained(name, value, passes):
    passed, figures = gate(ALIGNED, FAITHFUL | {name: value})
    assert passed is passes
    assert passes is ("at most 0.5 may be unexplained" not in figures)
    assert f"{value:.3f}" in figures


@pytest.mark.parametrize(("pairs", "passes"), [(4.0, False), (49.0, False), (50.0, True)])
def test_a_handful_of_pairs_shows_nothing(pairs, passes):
    passed, figures = gate(ALIGNED | {"pairs": pairs})
    assert passed is passes
    assert passes is ("at least 50 held-out pairs are needed" not in figures)


def test_all_that_fails_is_said():
    passed, figures = gate(
        ALIGNED | {"stranger_overlap": 0.6, "overlap_beyond_chance": 0.0}, dict.fromkeys(FAITHFULNESS, 1)
    )
    assert not passed
    assert all(why in figures for why in ("1.5 times", "0.05 beyond chance is needed", "at most 0.5"))


@pytest.mark.parametrize("missing", ["paired_overlap", "stranger_overlap", "overlap_beyond_chance", "pairs"])
def test_an_artifact_without_alignment_says_what_to_do(missing):
    known = {name: value for name, value in ALIGNED.items() if name != missing}
    with pytest.raises(InvalidTraining, match=r"records no alignment .*training\.write_artifact"):
        gate(known)
    with pytest.raises(InvalidTraining, match="records no alignment"):
        gate({"paired_overlap": 0.6, "shuffled_overlap": 0.1})  # of an earlier version: shuffled captions


@pytest.mark.parametrize("missing", FAITHFULNESS)
def test_an_artifact_without_faithfulness_says_what_to_do(missing):
    known = {name: value for name, value in FAITHFUL.items() if name != missing}
    with pytest.raises(InvalidTraining, match=rf"no faithfulness \({missing}\): run training\.measure_faithfulness"):
        gate(ALIGNED, known)


def test_equal_modalities_pass_the_gate_and_unrelated_ones_do_not(autoencoders):
    torch.manual_seed(1)
    image, other = torch.randn(50, WIDTH), torch.randn(50, WIDTH)
    aligned = measured(autoencoders, batch(image, image))
    strangers = measured(autoencoders, batch(image, other))
    assert (aligned.paired_overlap, aligned.recall_at_1, aligned.pairs) == (1.0, 1.0, 50.0)
    assert aligned.stranger_overlap == pytest.approx(strangers.stranger_overlap, abs=0.1)
    assert gate(aligned.as_dict())[0]
    assert not gate(strangers.as_dict())[0]
    assert strangers.recall_at_1 < 0.2


def test_five_captions_of_each_picture_in_order_pass_where_codes_agree(autoencoders):
    """The row behind is the same picture with another caption: no stranger."""
    torch.manual_seed(1)
    pictures = torch.arange(30).repeat_interleave(5)
    image = torch.randn(30, WIDTH)[pictures]
    found = measured(autoencoders, batch(image, image + 1e-3 * torch.randn(150, WIDTH), image_ids=pictures))
    assert found.paired_overlap > 0.95
    assert found.stranger_overlap < 0.3
    assert found.recall_at_1 == 1.0
    assert gate(found.as_dict())[0]
    as_if_all_differed = measured(autoencoders, batch(image, image))
    assert not gate(as_if_all_differed.as_dict())[0]


def test_one_picture_alone_fails(autoencoders):
    torch.manual_seed(1)
    image = torch.randn(6, WIDTH)
    found = measured(autoencoders, batch(image, image, image_ids=torch.zeros(6, dtype=torch.long)))
    assert found.overlap_beyond_chance <= 0
    assert not gate(found.as_dict())[0]


def test_a_few_unrelated_pairs_do_not_pass_by_chance(autoencoders):
    """Eight pairs of unrelated texts often overlap 1.5 times as much as strangers do, and by .05 more."""
    lucky = passed = 0
    for seed in range(100):
        torch.manual_seed(seed)
        found = measured(autoencoders, batch(torch.randn(8, WIDTH), torch.randn(8, WIDTH)))
        gap = found.paired_overlap - found.stranger_overlap
        lucky += found.paired_overlap >= 1.5 * found.stranger_overlap and gap >= 0.05
        passed += gate(found.as_dict())[0]
    assert lucky > 20
    assert passed <= 2


@torch.no_grad()
def test_agreement_is_of_whole_texts_and_reconstruction_of_begun_ones(autoencoders):
    torch.manual_seed(1)
    auxiliary, sae = autoencoders
    image, begun = torch.randn(40, WIDTH), torch.randn(40, WIDTH)
    whole, prefixes = (measured(autoencoders, batch(image, image, other)) for other in (None, begun))
    for found, text in ((whole, image), (prefixes, begun)):
        rebuilt = auxiliary.text_decoder(sae.decode(sae.encode(auxiliary.text_projection(text)), "text"))
        assert found.text_unexplained == pytest.approx(unexplained_variance(rebuilt, text))
    assert whole.text_unexplained != pytest.approx(prefixes.text_unexplained)
    for name in ("paired_overlap", "stranger_overlap", "overlap_beyond_chance", "recall_at_1", "image_unexplained"):
        assert getattr(whole, name) == getattr(prefixes, name)
