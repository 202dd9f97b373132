import random
from itertools import islice

import pytest

from training.miniature.conversations import IGNORED, WRITERS, Piece, SequenceEncoder
from training.miniature.language import Noise
from training.miniature.processor import IMAGE_TOKENS, build_processor
from training.miniature.world import scenes

ENCODER = SequenceEncoder()
SCENES = list(islice(scenes("dev"), 30))


@pytest.mark.parametrize("kind", WRITERS)
def test_pieces_encoded_one_by_one_are_the_whole_text_encoded(kind):
    draw = random.Random(0)
    for scene in SCENES:
        pieces = WRITERS[kind](scene, Noise(caption=0.5), draw)
        ids, targets = ENCODER.encode(pieces)
        whole = ENCODER.tokenizer.encode("".join(piece.text for piece in pieces))
        image = whole.index(ENCODER.image_id)
        assert ids == whole[:image] + [ENCODER.image_id] * IMAGE_TOKENS + whole[image + 1 :]
        assert len(ids) == len(targets)


@pytest.mark.parametrize("kind", WRITERS)
def test_targets_are_the_following_tokens_of_what_is_said(kind):
    draw = random.Random(0)
    for scene in SCENES:
        pieces = WRITERS[kind](scene, Noise(), draw)
        ids, targets = ENCODER.encode(pieces)
        said = [target for target in targets if target not in (IGNORED, ENCODER.end_id)]
        spoken = "".join(piece.text for piece in pieces if piece.said)
        assert ENCODER.tokenizer.decode(said) == spoken
        followed = [ids[place + 1] for place, target in enumerate(targets[:-1]) if target not in (IGNORED, 2)]
        assert followed == said[: len(followed)]
        assert targets.count(ENCODER.end_id) == sum(piece.ends for piece in pieces)


def test_a_conversation_reads_like_the_chat_template():
    pieces = [
        Piece(text="USER: <image>\nDescribe the image. ASSISTANT:", said=False),
        Piece(text=" There is a circle in red.", said=True, ends=True),
        Piece(text=" USER: What color is the circle? ASSISTANT:", said=False),
    ]
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]},
        {"role": "assistant", "content": "There is a circle in red."},
        {"role": "user", "content": "What color is the circle?"},
    ]
    rendered = build_processor().apply_chat_template(conversation, add_generation_prompt=True)
    assert "".join(piece.text for piece in pieces) == rendered


def test_a_batch_is_padded_on_the_right_with_nothing_to_learn():
    draw = random.Random(0)
    ids_BT, targets_BT = ENCODER.batch([WRITERS["mixed"](scene, Noise(), draw) for scene in SCENES])
    padded_BT = ids_BT.eq(ENCODER.pad_id)
    assert padded_BT.any()
    assert (targets_BT[padded_BT] == IGNORED).all()
    assert not (padded_BT[:, :-1] & ~padded_BT[:, 1:]).any()
