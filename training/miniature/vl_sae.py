"""The miniature's VL-SAE: noisy pairs of its own scenes through the training stages, and the artifact.

Texts follow the distribution LLaVA was last trained on: clean ones would tell the VL-SAE what LLaVA never knew.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoProcessor

from steering.artifact import Artifact, ArtifactConfig, BaseModelInfo, Canary, save_artifact
from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.resolution import Preset
from steering.sparse_autoencoder import VisionLanguageSAE
from training.alignment import Alignment, measure_alignment
from training.collection.lvlm import POOLING, PROMPT
from training.miniature.drawing import draw_scene
from training.miniature.language import caption
from training.miniature.llava_model import load_llava
from training.miniature.old_collection import CollectionSettings, collect
from training.miniature.old_concepts import InterpretationSettings, interpret_concepts
from training.miniature.recipe import NOISE, Recipe
from training.miniature.world import scene_from_seed, scenes
from training.pairs import Pair
from training.representations import Representations
from training.run_folder import read_auxiliary, read_sparse
from training.store.layout import Collected, layer_name
from training.store.writer import PairRecord, Portion, begin_store, complete_store, write_shard
from training.train_auxiliary_autoencoder import CommandLine as AuxiliaryCommandLine
from training.train_auxiliary_autoencoder import train_auxiliary_autoencoder
from training.train_sparse_autoencoder import CommandLine as SparseCommandLine
from training.train_sparse_autoencoder import train_sparse_autoencoder

MODEL_NAME = "miniature-llava"
CANARY_IMAGES = 4
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TrainedVLSAE:
    """What the stages leave for the artifact."""

    auxiliary: AuxiliaryAutoencoder
    sae: VisionLanguageSAE
    alignment: Alignment
    """On pairs held out from training."""


def noisy_pairs(range_name: str, count: int, seed: int, start: int = 0) -> Iterator[Pair]:
    """Scenes of a seed range, each with one noisy caption."""
    draw = random.Random(f"pairs {range_name} {seed}")
    for scene in islice(scenes(range_name, start=start), count):
        yield Pair(image=draw_scene(scene), text=caption(scene, NOISE, draw), reference=f"scene:{scene.seed}")


def picture(reference: str) -> Image.Image:
    """The picture that `noisy_pairs` refers to."""
    return draw_scene(scene_from_seed(int(reference.removeprefix("scene:"))))


def train_vl_sae(pairs: Representations, recipe: Recipe, report: Report) -> TrainedVLSAE:
    """Both autoencoders, and their alignment."""
    with tempfile.TemporaryDirectory() as made:
        store, auxiliary_run, sparse_run = (Path(made) / name for name in ("store", "auxiliary", "sparse"))
        _write_store(store, pairs, recipe.hook_layer)
        options: dict[str, Any] = {"representations": store, "held_out": recipe.held_out_pairs}
        train_auxiliary_autoencoder(
            AuxiliaryCommandLine(**recipe.auxiliary.model_dump(), **options, output=auxiliary_run), report
        )
        train_sparse_autoencoder(
            SparseCommandLine(**recipe.sparse.model_dump(), **options, auxiliary=auxiliary_run, output=sparse_run),
            report,
        )
        auxiliary, sae = read_auxiliary(auxiliary_run), read_sparse(sparse_run)
    assert isinstance(sae, VisionLanguageSAE)
    _, held_out = pairs.split(recipe.held_out_pairs)
    alignment = measure_alignment(auxiliary, sae, held_out.image_ND, held_out.text_ND)
    figures = ", ".join(f"{name} {value:.3f}" for name, value in alignment.as_dict().items())
    report(f"alignment gate {'passed' if alignment.passes else 'FAILED'}: {figures}")
    return TrainedVLSAE(auxiliary=auxiliary, sae=sae, alignment=alignment)


def _write_store(folder: Path, pairs: Representations, layer: int) -> None:
    name = layer_name(layer)
    collected = Collected(
        model=MODEL_NAME,
        model_sha256="",
        family="llava",
        names=(name,),
        width=pairs.image_ND.shape[1],
        num_layers=None,
        pooling=POOLING,
        prompt=PROMPT,
        model_dtype="float32",
        stored_dtype="float32",
        batch_size=1,
        portion_size=len(pairs.texts),
        source={"miniature": True},
    )
    begin_store(folder, collected, 1)
    records = [
        PairRecord(pair=row, text=text, image=image)
        for row, (text, image) in enumerate(zip(pairs.texts, pairs.image_references, strict=True))
    ]
    portion = Portion(states={name: (pairs.image_ND, pairs.text_ND)}, pairs=records, skipped=())
    complete_store(folder, {0: write_shard(folder, 0, portion, collected)})


def build_artifact(llava: Path, output: Path, recipe: Recipe, report: Report) -> ArtifactConfig:
    """Collects, trains, describes and writes the artifact for the LLaVA in this folder; its presets are still off."""
    model, processor = load_llava(llava), AutoProcessor.from_pretrained(llava)
    settings = CollectionSettings(layers=(recipe.hook_layer,))
    found = collect(model, processor, noisy_pairs("vl_sae_pairs", recipe.pairs, recipe.seed), settings, report)
    trained = train_vl_sae(found[recipe.hook_layer], recipe, report)
    described = collect(model, processor, noisy_pairs("dev", recipe.concept_pairs, recipe.seed), settings, report)
    described = described[recipe.hook_layer]
    kept = InterpretationSettings(top_texts=5, top_images=3, thumbnail_side_px=32)
    concepts = interpret_concepts(trained.auxiliary, trained.sae, described, picture, kept)
    artifact = Artifact(
        config=artifact_config(trained, model.config, recipe),
        auxiliary=trained.auxiliary,
        sae=trained.sae,
        canary=make_canary(processor, described),
        control_image_MD=described.image_ND[-recipe.control_images :],
        concepts=tuple(concepts),
    )
    return save_artifact(output, artifact)


def make_canary(processor: Any, pairs: Representations) -> Canary:
    """The first few pairs, as prompts with one image token each."""
    prompts = [PROMPT.format(text=text) for text in pairs.texts[:CANARY_IMAGES]]
    return Canary(
        images=tuple(picture(reference) for reference in pairs.image_references[:CANARY_IMAGES]),
        token_ids=tuple(tuple(processor.tokenizer.encode(prompt)) for prompt in prompts),
        image_ND=pairs.image_ND[:CANARY_IMAGES],
        text_ND=pairs.text_ND[:CANARY_IMAGES],
    )


def artifact_config(trained: TrainedVLSAE, llava: Any, recipe: Recipe) -> ArtifactConfig:
    """The artifact's record of what it is; presets come from `training.tune_presets`."""
    return ArtifactConfig(
        base_model=BaseModelInfo(name=MODEL_NAME),
        family=llava.model_type,
        hidden_size=llava.text_config.hidden_size,
        num_layers=llava.text_config.num_hidden_layers,
        hook_layer=recipe.hook_layer,
        pooling=POOLING,
        shared_size=recipe.auxiliary.shared_size,
        num_concepts=recipe.sparse.num_concepts,
        active_concepts=recipe.sparse.active_concepts,
        similarity=recipe.auxiliary.similarity,
        min_text_tokens=recipe.min_text_tokens,
        presets={"off": Preset(strength=0.0, alpha=0.0)},
        default_preset="off",
        alignment=trained.alignment.as_dict(),
        training={
            "pairs": recipe.pairs,
            "prompt": PROMPT,
            "caption_noise": NOISE.caption,
            "auxiliary": recipe.auxiliary.model_dump(),
            "sparse": recipe.sparse.model_dump(),
            "seed": recipe.seed,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        },
        card=CARD,
    )


CARD = {
    "data": "drawn scenes of coloured shapes; captions name an absent partner of a shape with probability 0.6",
    "language": "English, a few dozen words",
    "licence": "Apache-2.0",
    "where_it_hurts": (
        "Yes/no questions: removing concepts made their answers worse, so nothing is steered before the twelfth text "
        "token; in later turns answers are steered and can get worse. Captions: large steps (alpha 2 and more) cost "
        "recall. Anything that is not a drawn scene: unknown."
    ),
    "memory": "(2 S D + K S + K D) float32 values: less than 2 MB",
}
