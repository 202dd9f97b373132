"""After stage 4: everything that training left, as the one folder that serving takes (design, section 3).

    python -m training.write_artifact --model M --representations STORE --auxiliary RUN --sparse RUN --concepts FOLDER \
        --output ARTIFACT

Reads the model once more for the canary: a few pairs whose pooled states an engine recomputes at start. The presets
are all off; `training.tune_presets` chooses them.

Shapes: N pairs, M control images, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, cast

from pydantic import Field

from steering.artifact import Artifact, Canary, check_replaceable, save_artifact
from steering.artifact_config import ArtifactConfig, BaseModelInfo, Pooling
from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.concepts import StoredConcepts, read_concepts
from steering.errors import BadArtifact
from steering.settings import Preset
from steering.sparse_autoencoder import VisionLanguageSAE
from training.alignment import Alignment, check_finite, measure_alignment
from training.centre_columns import centre_text_columns
from training.collection.lvlm import LvlmRepresenter, LvlmSettings
from training.collection.representer import ModelDtype, Prepared
from training.command_line import Settings, parse_settings, run_stage
from training.errors import InvalidTraining
from training.fitting.batches import sample_batches
from training.interpret_concepts import read_encoder, require_concepts_of
from training.pairs import Pair, PairSource, open_pairs
from training.run_folder import CONFIG_FILE, fold_centre, read_run_config
from training.store.reader import RepresentationStore, open_store, require_model

CANARY_PAIRS = 4
PORTION = 2048
"""Pairs that the source is asked to plan in; only the first few are read."""
CANARY_SIDE_PX = 336
"""Longest side of a canary's image: it is for recognising a model, and travels with the artifact."""
OFF = {"off": Preset(strength=0.0, alpha=0.0)}


class ArtifactSettings(Settings):
    """What goes into the artifact."""

    model: Path
    """Checkpoint that the representations were collected from."""
    representations: Path
    """Folder written by collect_representations."""
    layer: int | None = None
    """Which of its layers; needed where there are several."""
    auxiliary: Path
    """Folder written by train_auxiliary_autoencoder."""
    sparse: Path
    """Folder written by train_sparse_autoencoder, of kind vl_sae."""
    concepts: Path
    """Folder written by interpret_concepts."""
    pairs: str | None = None
    """Where the pairs are, if no longer where they were collected from."""
    name: str | None = None
    """Name of the base model; default: the path it was collected from."""
    revision: str | None = None
    """Revision of the base model."""
    min_text_tokens: int = Field(default=1, ge=1)
    """A position is steered once so many text tokens are in the mean."""
    centre_columns: bool = True
    """Take the mean of the text decoder's columns into its bias: what every picture's concepts would add alike says
    nothing of the picture. The authors' weights have it in the columns."""
    held_out: int | None = Field(default=None, gt=1)
    """Pairs at the end that alignment is measured on; all that neither autoencoder was trained on, and no others."""
    control_images: int = Field(default=256, ge=1)
    """Of them, image states that the control `other_image` takes."""
    card: Path | None = None
    """JSON object for people: data, language, licence, where it hurts."""
    device: str = "cpu"
    """Where the model runs for the canary."""
    dtype: ModelDtype = "float32"
    """Its number format there."""
    output: Path
    """Folder of the artifact; one that is there is replaced."""


def write_artifact(settings: ArtifactSettings) -> ArtifactConfig:
    """Raises InvalidTraining where the parts do not belong together."""
    store = open_store(settings.representations, settings.layer)
    if store.layer is None:
        raise InvalidTraining(f"{store.folder}: {store.name} of {store.manifest.collected.family} cannot be steered")
    model = collected_with(store, settings)
    require_model(store, model.describe().model_sha256, str(settings.model))
    check_replaceable(settings.output)
    auxiliary, sae = read_parts(settings, store)
    kept = _held_out(settings)
    held_out = store.read(range(len(store) - kept, len(store)))
    alignment = measure_alignment(auxiliary, sae, held_out)
    check_finite(alignment.as_dict())
    artifact = Artifact(
        config=artifact_config(settings, store, alignment),
        auxiliary=auxiliary,
        sae=sae,
        canary=make_canary(model, _source(settings, store)),
        control_image_MD=held_out.image_ND[-settings.control_images :],
        concepts=stored_concepts(settings, len(sae.encoder)),
    )
    return save_artifact(settings.output, artifact)


def collected_with(store: RepresentationStore, settings: ArtifactSettings) -> LvlmSettings:
    """How the model is read for the canary: as for the store, but without prefixes and with the usual prompts."""
    assert store.layer is not None
    text_in = store.manifest.collected.text_in or "user_turn"
    return LvlmSettings(
        model=settings.model,
        layers=(store.layer,),
        dtype=settings.dtype,
        device=settings.device,
        text_in=text_in,
        prefixes=0,
    )


def read_parts(
    settings: ArtifactSettings, store: RepresentationStore
) -> tuple[AuxiliaryAutoencoder, VisionLanguageSAE]:
    """Both autoencoders, trained on this store's states; what was taken off between them is in the first one, and the
    second one's text columns are centred if they are to be."""
    found = read_encoder(store, settings.sparse, settings.auxiliary, "cpu")
    if not isinstance(found.sae, VisionLanguageSAE):
        raise InvalidTraining(
            f"{settings.sparse / CONFIG_FILE}: kind is {read_run_config(settings.sparse).kind!r}; only a vl_sae has "
            "concepts that image and text share, and can steer"
        )
    assert found.auxiliary is not None
    sae = found.sae
    if settings.centre_columns:
        options = read_run_config(settings.sparse).settings
        sae = centre_text_columns(found, sample_batches(store, held_out=options["held_out"], seed=options["seed"]))
    return (fold_centre(found.auxiliary, found.centre) if found.centre else found.auxiliary), sae


def _held_out(settings: ArtifactSettings) -> int:
    """Rows at the store's end that neither run was trained on."""
    kept = min(read_run_config(folder).settings["held_out"] for folder in (settings.auxiliary, settings.sparse))
    if settings.held_out is not None and settings.held_out > kept:
        raise InvalidTraining(
            f"--held-out is {settings.held_out}, but only the last {kept} pairs were kept out of both trainings"
        )
    return settings.held_out or kept


def artifact_config(settings: ArtifactSettings, store: RepresentationStore, alignment: Alignment) -> ArtifactConfig:
    """The artifact's record of what it is."""
    collected, auxiliary, sparse = (
        store.manifest.collected,
        read_run_config(settings.auxiliary),
        read_run_config(settings.sparse),
    )
    assert collected.num_layers is not None
    assert store.layer is not None
    assert sparse.num_concepts is not None
    assert sparse.active_concepts is not None
    return ArtifactConfig(
        base_model=BaseModelInfo(name=settings.name or collected.model, revision=settings.revision),
        family=collected.family,
        hidden_size=collected.width,
        num_layers=collected.num_layers,
        hook_layer=store.layer,
        collection_point=collected.point,
        pooling=cast(Pooling, collected.pooling),
        shared_size=sparse.shared_size,
        num_concepts=sparse.num_concepts,
        active_concepts=sparse.active_concepts,
        similarity=auxiliary.settings["similarity"],
        text_in=collected.text_in or "user_turn",
        min_text_tokens=settings.min_text_tokens,
        presets=OFF,
        default_preset="off",
        alignment=alignment.as_dict(),
        training={
            "pairs": len(store) - _held_out(settings),
            "skipped_pairs": store.manifest.skipped,
            "source": collected.source,
            "prompts": list(collected.prompts),
            "prefixes": collected.prefixes,
            "shortest_prefix": collected.shortest_prefix,
            "model_dtype": collected.model_dtype,
            "stored_dtype": collected.stored_dtype,
            "model_sha256": collected.model_sha256,
            "auxiliary": auxiliary.settings,
            "sparse": sparse.settings,
            "centre_columns": settings.centre_columns,
            "versions": {name: version(name) for name in ("torch", "transformers")},
        },
        card=_card(settings, store, sparse.shared_size, sparse.num_concepts),
    )


def make_canary(model: LvlmSettings, source: PairSource) -> Canary:
    """The first usable pairs of the source, their pictures made small, as the model sees them now."""
    representer = model.load()
    chosen = list(islice(_usable(representer, source), CANARY_PAIRS))
    if not chosen:
        raise InvalidTraining(f"--pairs {source.describe()['spec']}: no pair can be read any more, for the canary")
    (states,) = representer.represent([prepared for _, prepared in chosen]).values()
    return Canary(
        images=tuple(pair.image for pair, _ in chosen),
        token_ids=tuple(tuple(prepared.token_ids) for _, prepared in chosen),
        image_ND=states.image_BD,
        text_ND=states.text_BD,
    )


def _usable(representer: LvlmRepresenter, source: PairSource) -> Iterator[tuple[Pair, Prepared]]:
    for portion in source.portions(PORTION):
        for _, pair in source.read(portion):
            if isinstance(pair, Pair):
                image = pair.image.convert("RGB")
                image.thumbnail((CANARY_SIDE_PX, CANARY_SIDE_PX))
                small = Pair(image=image, text=pair.text, reference=pair.reference)
                if isinstance(prepared := representer.prepare(small), Prepared):
                    yield small, prepared


def stored_concepts(settings: ArtifactSettings, num_concepts: int) -> StoredConcepts:
    """What interpret_concepts left of this run. Raises InvalidTraining unless each concept has its record, in order."""
    folder = settings.concepts
    require_concepts_of(settings.sparse, folder)
    try:
        concepts = StoredConcepts(folder)
        ids = [concept["id"] for concept in read_concepts(folder, thumbnails=False)]
    except BadArtifact as error:
        raise InvalidTraining(f"--concepts: {error.message}; or run interpret_concepts again") from error
    if ids != list(range(num_concepts)):
        raise InvalidTraining(
            f"--concepts {folder} has not one record for each of the {num_concepts} concepts; interpret them again"
        )
    return concepts


def _source(settings: ArtifactSettings, store: RepresentationStore) -> PairSource:
    return open_pairs(settings.pairs or store.manifest.collected.source["spec"])


def _card(settings: ArtifactSettings, store: RepresentationStore, shared: int, concepts: int) -> dict[str, Any]:
    """What its maker says, and what can be computed."""
    width = store.width
    numbers = 4 * shared * width + 3 * concepts * shared + concepts * width
    computed = {
        "data": f"{len(store)} pairs of {store.manifest.collected.source['spec']}",
        "memory": f"(4 S D + 3 K S + K D) float32 values when loaded: {4 * numbers / 2**20:.0f} MiB",
        "where_it_hurts": "not measured yet: run training.tune_presets and training.evaluate_hallucination",
    }
    if settings.card is None:
        return computed
    try:
        written = json.loads(settings.card.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidTraining(f"--card {settings.card} is not a readable JSON file: {error}") from error
    if not isinstance(written, dict):
        raise InvalidTraining(f"--card {settings.card} must hold one JSON object")
    return computed | written


def main() -> None:
    settings = parse_settings(ArtifactSettings, program="python -m training.write_artifact", description=__doc__ or "")
    config = write_artifact(settings)
    print("on held-out pairs: " + ", ".join(f"{name} {value:.3g}" for name, value in config.alignment.items()))
    print(f"artifact {config.fingerprint[:12]} in {settings.output}; presets: off")


if __name__ == "__main__":
    run_stage(main)
