"""An independent implementation to compare with: whole sequences, no KV cache, dense codes, straight from the
equations (design, section 1). It shares no code with `steering/` but the two autoencoder modules' parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def _dense_code(sae, shared_NS: Tensor) -> tuple[Tensor, Tensor]:
    """z [N, K] and the dense activations a [N, K]."""
    x = shared_NS / shared_NS.norm(dim=-1, keepdim=True)
    w = sae.encoder / sae.encoder.norm(dim=-1, keepdim=True)
    a = 2 - torch.cdist(x.double(), w.double()).float()
    kth = a.sort(dim=-1, descending=True).values[:, sae.active_concepts - 1 : sae.active_concepts]
    return torch.where(a >= kth, a, 0.0), a


def _decode_text(artifact, z: Tensor) -> Tensor:
    return artifact.auxiliary.text_decoder(artifact.sae.text_decoder(z))


def _delta(artifact, settings, image_D: Tensor, text_D: Tensor) -> Tensor:
    z_v, a_v = _dense_code(artifact.sae, artifact.auxiliary.vision_projection(image_D[None]))
    z_t, a_t = _dense_code(artifact.sae, artifact.auxiliary.text_projection(text_D[None]))

    def mix(image: Tensor, text: Tensor) -> Tensor:
        up, down = (image - text).clamp(min=0), (text - image).clamp(min=0)
        return text + settings.beta_up * up - settings.beta_down * down

    zero = torch.zeros_like(z_t)
    if settings.form == "published":
        change = _decode_text(artifact, mix(z_v, z_t)) - text_D
    elif settings.form == "difference":
        change = _decode_text(artifact, mix(z_v, z_t) - z_t) - _decode_text(artifact, zero)
    else:
        support = (z_v > 0) | (z_t > 0)
        change = _decode_text(artifact, torch.where(support, mix(a_v, a_t) - a_t, 0.0)) - _decode_text(artifact, zero)
    delta_D = settings.strength * settings.alpha * change[0]
    delta_D = -delta_D if settings.control == "reversed" else delta_D
    edited = torch.zeros_like(z_t)
    for concept, factor, add in settings.edits:
        edited[:, concept] = (factor - 1) * z_t[:, concept] + add
    return delta_D + (_decode_text(artifact, edited) - _decode_text(artifact, zero))[0]


def _within(settings, delta_D: Tensor, hidden_D: Tensor) -> Tensor:
    if settings.max_shift is None:
        return delta_D
    return delta_D * min(1.0, float(settings.max_shift * hidden_D.norm() / delta_D.norm()))


@torch.no_grad()
def explained(model, artifact, settings, prompt: list[int], generated: list[int], image_inputs: Tensor) -> dict:
    """At the end of a prompt and generated tokens: dense z_v, z_t and the code aimed at [K], both mismatches.

    For the forms whose codes are sparse.
    """
    token_ids = torch.tensor([*prompt, *generated])
    is_image = token_ids == model.config.image_token_id
    is_image[len(prompt) :] = False
    inputs = _inputs(model, prompt, generated, {"pixel_values": image_inputs})
    _, hidden_TD = _with_output(model, artifact.config.hook_layer, inputs, None)
    start = int(is_image.nonzero().max()) + 1
    (z_v,), _ = _dense_code(artifact.sae, artifact.auxiliary.vision_projection(hidden_TD[is_image].mean(0)[None]))
    (z_t,), _ = _dense_code(artifact.sae, artifact.auxiliary.text_projection(hidden_TD[start:].mean(0)[None]))
    up, down = (z_v - z_t).clamp(min=0), (z_t - z_v).clamp(min=0)
    steered = z_t + (settings.strength if settings.active else 0) * (settings.beta_up * up - settings.beta_down * down)
    for concept, factor, add in settings.edits:
        steered[concept] += (factor - 1) * z_t[concept] + add
    steered = steered.clamp(min=0)
    before, after = (1 - torch.minimum(z_v, z).sum() / torch.maximum(z_v, z).sum() for z in (z_t, steered))
    return {"image": z_v, "text": z_t, "steered": steered, "before": float(before), "after": float(after)}


def _with_output(model, layer: int, inputs: dict, replacement: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits [T, V] and the layer's output [T, D] of a whole forward pass, the output optionally replaced."""
    seen = {}

    def hook(_module, _inputs, output):
        seen["hidden"] = output
        return output if replacement is None else replacement[None]

    handle = model.model.language_model.layers[layer].register_forward_hook(hook)
    try:
        logits = model(**inputs, use_cache=False).logits[0].float()
    finally:
        handle.remove()
    return logits, seen["hidden"][0]


def _inputs(model, prompt: list[int], generated: list[int], image_inputs: Mapping[str, Tensor]) -> dict:
    """What a whole forward pass over prompt and generated tokens takes; a generated image token is text.

    With M-RoPE the prompt's positions are the model's own, and every token after it stands one further on each axis.
    """
    token_ids = torch.tensor([*prompt, *generated])
    is_image = token_ids[: len(prompt)] == model.config.image_token_id
    embeds_TD = model.get_input_embeddings()(token_ids)
    features = model.get_image_features(**image_inputs, return_dict=True).pooler_output
    embeds_TD[: len(prompt)][is_image] = torch.cat(list(features))
    if not hasattr(model.model, "get_rope_index"):
        return {"inputs_embeds": embeds_TD[None]}
    prompt_31T, _ = model.model.get_rope_index(
        torch.tensor([prompt]), is_image[None].int(), image_inputs["image_grid_thw"]
    )
    following_T = prompt_31T.max() + 1 + torch.arange(len(generated))
    positions_31T = torch.cat([prompt_31T, following_T.expand(3, 1, -1)], dim=2)
    return {"inputs_embeds": embeds_TD[None], "position_ids": positions_31T}


@torch.no_grad()
def next_token_logprobs(
    model,
    artifact,
    settings,
    prompt: list[int],
    generated: list[int],
    image_inputs: Tensor | Mapping[str, Tensor],
    min_text_tokens: int,
) -> Tensor:
    """Logprobs [V] of the token after prompt (image tokens expanded) and generated ones, blended and masked.

    `image_inputs` as the checkpoint's processor names them; a tensor alone is `pixel_values`.
    """
    if isinstance(image_inputs, Tensor):
        image_inputs = {"pixel_values": image_inputs}
    layer = artifact.config.hook_layer
    token_ids = torch.tensor([*prompt, *generated])
    is_image = token_ids == model.config.image_token_id
    is_image[len(prompt) :] = False
    inputs = _inputs(model, prompt, generated, image_inputs)
    base_TV, hidden_TD = _with_output(model, layer, inputs, None)
    start = int(is_image.nonzero().max()) + 1
    image_D = hidden_TD[is_image].mean(0)
    steered_TD = hidden_TD.clone()
    length, wait = len(token_ids), settings.min_answer_tokens

    def is_late_enough(position: int) -> bool:
        """With this position, enough tokens are in the mean, of the text and, where that is asked, of the answer."""
        enough = position - start + 1 >= min_text_tokens
        return enough and (wait is None or position - len(prompt) + 1 >= wait)

    if settings.mode == "exact":
        if is_late_enough(length - 1):
            delta_D = _delta(artifact, settings, image_D, hidden_TD[start:].mean(0))
            for position in range(start, length):
                if wait is None or is_late_enough(position):
                    steered_TD[position] += _within(settings, delta_D, hidden_TD[position])
    else:
        for position in filter(is_late_enough, range(start, length)):
            text_D = hidden_TD[start : position + 1].mean(0)
            delta_D = _delta(artifact, settings, image_D, text_D)
            steered_TD[position] += _within(settings, delta_D, hidden_TD[position])
    steered_TV, _ = _with_output(model, layer, inputs, steered_TD)
    base, steered = base_TV[-1], steered_TV[-1]
    blended = (1 - settings.gamma) * base + settings.gamma * steered
    if settings.plausibility > 0:
        floor = torch.log(torch.tensor(settings.plausibility)) + base.max()
        blended[base < floor] = float("-inf")
    return blended.log_softmax(-1)
