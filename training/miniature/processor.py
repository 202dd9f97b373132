"""The miniature's tokenizer and processor: real Hugging Face objects, built from the world's words.

Byte-level BPE: every word of the world is one token, and any other text still has tokens, byte by byte. The chat
template says what llava-1.5-7b-hf's says. Knows no scenes and no models.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from training.miniature.language import all_sentences

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
IMAGE_SIDE_PX = 48
PATCH_SIDE_PX = 16
IMAGE_TOKENS = (IMAGE_SIDE_PX // PATCH_SIDE_PX) ** 2
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]

CHAT_TEMPLATE = """\
{% for message in messages -%}
{% set parts = message['content'] -%}
{% if parts is string %}{% set parts = [{'type': 'text', 'text': parts}] %}{% endif -%}
{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif -%}
{% for part in parts if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor -%}
{% for part in parts if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor -%}
{% endfor -%}
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


def build_tokenizer(*, closing: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer; `closing` appends </s> and pads behind it, which is how CLIP's text tower reads a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(all_sentences(), trainer)
    ends = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    template = "<s> $A </s>" if closing else "<s> $A"
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        padding_side="right" if closing else "left",
    )


def build_image_processor() -> CLIPImageProcessor:
    """Any image: to RGB, shortest side to IMAGE_SIDE_PX, centre crop, CLIP's normalisation."""
    side = {"height": IMAGE_SIDE_PX, "width": IMAGE_SIDE_PX}
    return CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIDE_PX}, crop_size=side, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )


def build_processor() -> LlavaProcessor:
    """What `AutoProcessor.from_pretrained` gives back once it is saved."""
    return LlavaProcessor(
        image_processor=build_image_processor(),
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIDE_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
