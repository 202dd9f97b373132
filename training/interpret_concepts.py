"""Stage 4: what each concept stands for, read off the pairs that activate it most.

    python -m training.interpret_concepts --representations STORE --sparse RUN --auxiliary RUN --pairs SPEC --output DIR

One pass over the store keeps the top texts and pictures of every concept and counts the corpus's phrases; a label is
the phrases that a concept's texts have and the corpus has not. One pass over the pictures makes thumbnails and, with
--clip, the paper's similarity scores. Leaves DIR/concepts.jsonl (what an artifact takes), DIR/similarity.json and
DIR/atlas/index.html, and in DIR/interpreted.json whose concepts they are. Knows no LVLM: a store, a sparse autoencoder
of any kind, for an LVLM's store the auxiliary one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from training.clip_model import ClipModel, load_clip
from training.command_line import parse_settings, run_stage
from training.durable_files import sha256_of, write_json, write_json_lines
from training.errors import InvalidTraining
from training.interpretation.atlas import THUMBNAILS, AtlasColumns, AtlasConcept, strongest_first, write_atlas
from training.interpretation.concepts import Interpretation, InterpretationSettings, concept_records, interpret
from training.interpretation.pictures import make_thumbnails, thumbnail_file
from training.interpretation.scan import ConceptEncoder
from training.interpretation.similarity import Similarity, SimilarityMeter
from training.pairs import PairSource, open_pairs
from training.run_folder import MODEL_FILE, read_auxiliary, read_centre, read_run_config, read_sparse, require_states
from training.store.reader import RepresentationStore, open_store

CONCEPTS_FILE, SIMILARITY_FILE, ATLAS_FOLDER = "concepts.jsonl", "similarity.json", "atlas"
INTERPRETED_FILE = "interpreted.json"
"""Which weights' concepts these are."""
Report = Callable[[str], None]


class CommandLine(InterpretationSettings):
    """What is interpreted."""

    representations: Path
    """Store written by collect_representations."""
    layer: int | None = None
    """Which of its layers; needed where it has several."""
    sparse: Path
    """Run folder of train_sparse_autoencoder."""
    auxiliary: Path | None = None
    """Run folder of train_auxiliary_autoencoder; none for CLIP."""
    pairs: str | None = None
    """Where the pictures are, as for collect_representations; not given: where the store's pairs were from; none: no
    pictures."""
    clip: str | None = None
    """Folder of an open_clip model that judges how alike a concept's pictures and texts are."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the autoencoders and CLIP run; auto: a GPU if there is one."""
    output: Path
    """Folder for concepts.jsonl, similarity.json and atlas/."""


def write_interpretation(
    folder: Path,
    found: Interpretation,
    settings: InterpretationSettings,
    *,
    source: PairSource | None,
    clip: ClipModel | None,
    about: str,
    report: Report = print,
) -> None:
    """concepts.jsonl, atlas/ and, where there is a CLIP, similarity.json."""
    thumbnails = folder / ATLAS_FOLDER / THUMBNAILS
    pictures = [found.references(concept, settings.top_images) for concept in range(len(found.labels))]
    texts = [found.texts(concept, settings.top_texts) for concept in range(len(found.labels))]
    meter = SimilarityMeter(pictures, texts, clip, settings.seed) if clip else None
    if source is not None:
        references = sorted({reference for of_concept in pictures for reference in of_concept})
        look = meter.see_pictures if meter else _ignore
        make_thumbnails(source, references, thumbnails, settings.thumbnail_side_px, look, report)
    scores_K: dict[str, np.ndarray] = {}
    if meter is not None:
        measured = meter.measure()
        own = measured["concepts"]
        scores_K = {"intra_image": own.intra_K["image"], "intra_text": own.intra_K["text"], "cross": own.cross_K}
        write_json(folder / SIMILARITY_FILE, {name: part.as_dict() for name, part in measured.items()})
        report("; ".join(f"{name}: {_in_words(part)}" for name, part in measured.items()))
    write_json_lines(folder / CONCEPTS_FILE, concept_records(found, settings, thumbnails))
    columns = AtlasColumns(
        labels=found.labels,
        mean_K=found.mean_K,
        image_K=found.scan.mean_K["image"],
        text_K=found.scan.mean_K["text"],
        scores_K=scores_K,
    )
    show = partial(_atlas_concept, found, settings, folder / ATLAS_FOLDER)
    write_atlas(folder / ATLAS_FOLDER, about, columns, map(show, strongest_first(found.mean_K).tolist()))
    labelled = sum(bool(label) for label in found.labels)
    report(f"wrote {folder}: {labelled} of {len(found.labels)} concepts have a label; see {ATLAS_FOLDER}/index.html")


def _atlas_concept(found: Interpretation, settings: InterpretationSettings, atlas: Path, concept: int) -> AtlasConcept:
    images = []
    for reference in found.references(concept, settings.top_images):
        file = thumbnail_file(atlas / THUMBNAILS, reference)
        images.append(
            {"reference": reference, "thumbnail": file.relative_to(atlas).as_posix() if file.exists() else None}
        )
    return AtlasConcept(found.texts(concept, settings.top_texts), images)


def _ignore(references: Sequence[str], images: Sequence[Image.Image]) -> None:
    """Looks at nothing."""


def _in_words(similarity: Similarity) -> str:
    figures = similarity.as_dict()
    within, between = figures["intra"], figures["inter"]
    return (
        f"pictures {within['image']} within, {between['image']} between concepts, texts {within['text']} within, "
        f"{between['text']} between, pictures to texts {figures['cross']}"
    )


def read_encoder(store: RepresentationStore, sparse: Path, auxiliary: Path | None, device: str) -> ConceptEncoder:
    """Both autoencoders, checked against the store and each other."""
    require_states(store, sparse)
    needed = read_run_config(sparse).auxiliary_sha256
    if (needed is None) != (auxiliary is None):
        missing = "--auxiliary is needed: the run was trained behind one" if needed else "give no --auxiliary"
        raise InvalidTraining(f"{sparse}: {missing}")
    if auxiliary is not None:
        require_states(store, auxiliary)
        if sha256_of(auxiliary / MODEL_FILE) != needed:
            raise InvalidTraining(f"{sparse} was trained behind another auxiliary autoencoder than {auxiliary}")
    sae, centre = read_sparse(sparse).to(device), read_centre(sparse)
    return ConceptEncoder(
        sae=sae,
        auxiliary=read_auxiliary(auxiliary).to(device) if auxiliary else None,
        centre=type(centre)(*(part.to(device) for part in centre)) if centre else None,
    )


def open_source(store: RepresentationStore, spec: str | None) -> PairSource | None:
    """The pairs that the store was collected from, or where else they are; None for 'none'."""
    return None if spec == "none" else open_pairs(spec or store.manifest.collected.source["spec"])


def choose_device(asked: Literal["auto", "cpu", "cuda"]) -> str:
    """Raises InvalidTraining where a GPU is asked for and there is none."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise InvalidTraining("--device is cuda, but torch finds no CUDA device here; give --device cpu")
    return "cuda" if asked == "cuda" or (asked == "auto" and torch.cuda.is_available()) else "cpu"


def interpret_store(settings: CommandLine) -> None:
    """The stage: a store's pairs through the autoencoders, into the output folder."""
    if settings.clip and settings.pairs == "none":
        raise InvalidTraining("--clip judges pictures: it needs --pairs")
    device = choose_device(settings.device)
    store = open_store(settings.representations, settings.layer)
    encoder = read_encoder(store, settings.sparse, settings.auxiliary, device)
    source = open_source(store, settings.pairs)
    clip = load_clip(settings.clip, device) if settings.clip else None
    found = interpret(store, encoder, settings)
    kind, collected = read_run_config(settings.sparse).kind, store.manifest.collected
    about = (
        f"{encoder.num_concepts:,} concepts of {collected.model} ({store.name}), {kind}; "
        f"described by {len(store):,} pairs"
    )
    (settings.output / INTERPRETED_FILE).unlink(missing_ok=True)
    write_interpretation(settings.output, found, settings, source=source, clip=clip, about=about)
    write_json(settings.output / INTERPRETED_FILE, {"sparse_sha256": sha256_of(settings.sparse / MODEL_FILE)})


def require_concepts_of(sparse: Path, concepts: Path) -> None:
    """Raises InvalidTraining unless the concepts in a folder are those of the run's weights."""
    file = concepts / INTERPRETED_FILE
    try:
        interpreted = json.loads(file.read_text(encoding="utf-8"))["sparse_sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise InvalidTraining(
            f"--concepts: {file}, which says whose concepts these are, cannot be read; run interpret_concepts again"
        ) from error
    if interpreted != sha256_of(sparse / MODEL_FILE):
        raise InvalidTraining(
            f"--concepts {concepts} are those of another run than --sparse {sparse}; run interpret_concepts on this one"
        )


def main() -> None:
    """The command line."""
    interpret_store(parse_settings(CommandLine, program="python -m training.interpret_concepts", description=__doc__))


if __name__ == "__main__":
    run_stage(main)
