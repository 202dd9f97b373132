"""An open_clip model gives its own embeddings, as it gives them."""

from __future__ import annotations

import open_clip
import pytest
import torch

from training.collection.clip import ClipSettings
from training.collection.representer import Prepared
from training.errors import InvalidTraining
from training.miniature.paths import CLIP
from training.pairs import Pair, open_pairs


def test_embeddings_are_those_of_the_encoders():
    source = open_pairs("miniature:dev:5")
    pairs = [pair for _, pair in source.read(source.portions(5)[0]) if isinstance(pair, Pair)]
    representer = ClipSettings(model=CLIP).load()
    prepared = [one for pair in pairs if isinstance(one := representer.prepare(pair), Prepared)]
    found = representer.represent(prepared)["embedding"]
    name = f"local-dir:{CLIP}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    with torch.no_grad():
        image_BD = model.eval().encode_image(torch.stack([preprocess(pair.image) for pair in pairs]))  # type: ignore
        text_BD = model.encode_text(open_clip.get_tokenizer(name)([pair.text for pair in pairs]))  # type: ignore
    torch.testing.assert_close(found.image_BD, image_BD)
    torch.testing.assert_close(found.text_BD, text_BD)
    assert not torch.allclose(found.image_BD.norm(dim=1), torch.ones(5)), "as they are, not normalised"


def test_captions_it_cannot_take_whole_are_not_used():
    representer = ClipSettings(model=CLIP).load()
    (_, pair), *_ = open_pairs("miniature:dev:1").read({"first": 0, "count": 1})
    assert isinstance(pair, Pair)

    def fault(text: str) -> object:
        return representer.prepare(Pair(image=pair.image, text=text, reference="r"))

    assert fault("a star " * 10_000) == "the caption has more than the 48 tokens of the model's context"
    assert fault("a </s> b") == "the caption spells the special token </s>"
    longest = max(size for size in range(1, 60) if isinstance(fault(" ".join(["star"] * size)), Prepared))
    assert isinstance(fault(" ".join(["star"] * (longest + 1))), str)


def test_it_is_described_without_its_weights(tmp_path):
    described = ClipSettings(model=CLIP).describe()
    assert (described.family, described.names, described.width) == ("open_clip", ("embedding",), 64)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InvalidTraining, match=r"open_clip_config\.json describes no open_clip model"):
        ClipSettings(model=tmp_path).describe()
