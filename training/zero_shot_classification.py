"""Zero-shot classification by a CLIP, plain and with a sparse autoencoder's concepts (paper, section 4.4).

    score(image, class) = cos(v, t) + weight * cos(z_v, z_t)

v and t are the embeddings of image and prompt, z their codes. A class has several prompts: t is the mean of their unit
vectors, z_t the mean of their codes. The weight is chosen on a validation split, 0 being one of the choices, and
reported on the rest, with the codes alone beside it.

    python -m training.zero_shot_classification --clip FOLDER --sparse RUN --images LABELLED --classes classes.json
    python -m training.zero_shot_classification --sparse RUN --miniature

Shapes: N images, E width of embeddings, K concepts, C classes, P prompts, W weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from steering.sparse_autoencoder import Modality, SparseCode
from training.baseline_autoencoders import SparseAutoencoder, encode
from training.clip_model import PREFIX, ClipModel, load_clip
from training.command_line import Settings, parse_settings, run_stage
from training.durable_files import write_json
from training.errors import InvalidTraining
from training.evaluation.manifest import weights_digest
from training.evaluation.paired_bootstrap import Interval, draw_scenes, intervals, paired_differences, ratio
from training.interpret_concepts import choose_device
from training.interpretation.scan import num_concepts
from training.labelled_images import Classes, LabelledImage, read_classes, read_labelled_images
from training.miniature.paths import CLIP
from training.miniature.single_objects import SHAPE_CLASSES, single_objects
from training.run_folder import CONFIG_FILE, Centre, read_centre, read_run_config, read_sparse

BATCH = 64
CODES_ALONE = float("inf")
"""The weight at which only codes count."""


class ZeroShotSettings(Settings):
    """How the weight is chosen and what is reported."""

    weights: tuple[Annotated[float, Field(ge=0)], ...] = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
    """Weights of the codes' similarity to choose from."""
    validation_share: float = Field(default=0.5, gt=0, lt=1)
    """Share of the images that the weight is chosen on; they are not reported on."""
    seed: int = 0
    """Of the split and the intervals."""


class CommandLine(ZeroShotSettings):
    """What is classified, by what."""

    clip: str = str(CLIP)
    """Folder of the open_clip model."""
    sparse: Path
    """Run folder of train_sparse_autoencoder, trained on that model's embeddings."""
    images: Path | None = None
    """Folder with a folder of pictures for each class, or JSON lines with `image` and `label`."""
    classes: Path | None = None
    """JSON: `classes` (label to its names, or a list of labels) and `templates` ("a photo of a {}.")."""
    miniature: bool = False
    """Classify drawn single objects by their shape instead."""
    miniature_images: int = Field(default=2000, gt=3)
    """How many."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the models run; auto: a GPU if there is one."""
    json_file: Path | None = Field(default=None, alias="json")
    """Where the numbers go."""


class ConceptClassifier:
    """A CLIP, a sparse autoencoder trained on its embeddings, and the classes' prompts as both see them."""

    def __init__(self, clip: ClipModel, sae: SparseAutoencoder, centre: Centre | None, classes: Classes) -> None:
        self._clip, self._sae, self._centre = clip, sae.cpu(), centre
        prompts = classes.prompts()
        means = [self._class(texts) for texts in prompts]
        self.text_CE = torch.stack([mean_E for mean_E, _ in means])
        """Of unit length."""
        self.code_KC = torch.stack([code_K for _, code_K in means], dim=1)
        """Of unit length."""

    def similarities(self, images: Sequence[LabelledImage]) -> tuple[Tensor, Tensor]:
        """Cosines of representations and of codes with every class, [N, C] each."""
        image_NE = self._clip.embed_images([one.image for one in images], unit=False)
        code = self._code(image_NE, "image")
        strength_Nk = F.normalize(code.activations, dim=-1)
        code_NC = F.embedding_bag(code.concept_ids, self.code_KC, per_sample_weights=strength_Nk, mode="sum")
        return F.normalize(image_NE, dim=-1) @ self.text_CE.T, code_NC

    def _class(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        text_PE = self._clip.embed_texts(prompts, unit=False)
        code = self._code(text_PE, "text")
        dense_PK = torch.zeros(len(prompts), num_concepts(self._sae)).scatter_(1, code.concept_ids, code.activations)
        return F.normalize(F.normalize(text_PE, dim=-1).mean(0), dim=0), F.normalize(dense_PK.mean(0), dim=0)

    @torch.no_grad()
    def _code(self, states_NE: Tensor, modality: Modality) -> SparseCode:
        if self._centre is not None:
            states_NE = states_NE - (self._centre.image_S if modality == "image" else self._centre.text_S)
        return encode(self._sae, states_NE, modality)


def hits_by_weight(
    classifier: ConceptClassifier, images: Iterable[LabelledImage], weights: Sequence[float]
) -> np.ndarray:
    """Whether each image is put into its own class at each weight, [N, W]."""
    remaining, found = iter(images), []
    while batch := list(islice(remaining, BATCH)):
        own_N = torch.tensor([one.label for one in batch])
        plain_NC, code_NC = classifier.similarities(batch)
        columns = [code_NC if weight == CODES_ALONE else plain_NC + weight * code_NC for weight in weights]
        found.append(torch.stack([_wins(scores_NC, own_N) for scores_NC in columns], dim=1).numpy())
    return np.concatenate(found) if found else np.zeros((0, len(weights)), dtype=bool)


def _wins(scores_NC: Tensor, own_N: Tensor) -> Tensor:
    """Whether a row's own class scores above every other; a tie is no hit."""
    own_N1 = own_N[:, None]
    others_NC = scores_NC.scatter(1, own_N1, -torch.inf)
    return scores_NC.gather(1, own_N1)[:, 0] > others_NC.amax(1)


def compare(hits_NW: np.ndarray, weights: Sequence[float], settings: ZeroShotSettings) -> dict[str, Any]:
    """Weight from the validation split; accuracies, and enhanced minus plain, on the rest.

    `hits_NW` has a column for each of `weights`, 0 and CODES_ALONE among them. Among equally good weights the smallest
    is chosen.
    """
    order = np.random.default_rng(settings.seed).permutation(len(hits_NW))
    count = round(settings.validation_share * len(hits_NW))
    validation, test = hits_NW[order[:count]], hits_NW[order[count:]]
    if not len(validation) or not len(test):
        raise InvalidTraining(f"{len(hits_NW)} images cannot be split; give more, or another --validation-share")
    curve = {
        weight: float(validation[:, place].mean()) for place, weight in enumerate(weights) if weight != CODES_ALONE
    }
    chosen = min(curve, key=lambda weight: (-curve[weight], weight))
    resamples_RN = draw_scenes(len(test), seed=settings.seed)
    counts = {
        name: np.stack([test[:, list(weights).index(weight)], np.ones(len(test))], axis=1).astype(float)
        for name, weight in (("plain", 0.0), ("enhanced", chosen), ("codes_alone", CODES_ALONE))
    }
    difference = paired_differences(_accuracy, counts["enhanced"], counts["plain"], resamples_RN)
    return {
        "weight": chosen,
        "validation": {str(weight): round(value, 6) for weight, value in curve.items()},
        "images": {"validation": len(validation), "test": len(test)},
        "accuracy": {name: intervals(_accuracy, count, resamples_RN)["accuracy"] for name, count in counts.items()},
        "enhanced_minus_plain": difference["accuracy"],
    }


def _accuracy(counts: np.ndarray) -> dict[str, np.ndarray]:
    return {"accuracy": ratio(counts[..., 0], counts[..., 1])}


def classify(
    classifier: ConceptClassifier, images: Iterable[LabelledImage], settings: ZeroShotSettings
) -> dict[str, Any]:
    """The whole comparison."""
    weights = [*sorted({0.0, *settings.weights}), CODES_ALONE]
    return compare(hits_by_weight(classifier, images, weights), weights, settings)


def _data(settings: CommandLine) -> tuple[Classes, Iterator[LabelledImage]]:
    if settings.miniature:
        return SHAPE_CLASSES, single_objects(settings.miniature_images)
    if settings.images is None or settings.classes is None:
        raise InvalidTraining("--images and --classes are needed (or --miniature)")
    classes = read_classes(settings.classes)
    return classes, read_labelled_images(settings.images, classes, print)


def _require_trained_on(clip: str, sparse: Path) -> None:
    config = read_run_config(sparse)
    if config.auxiliary_sha256 is not None or config.store.family != "open_clip":
        raise InvalidTraining(f"{sparse / CONFIG_FILE}: not trained on a CLIP's embeddings but {config.store.family}'s")
    if config.store.model_sha256 != weights_digest(Path(clip.removeprefix(PREFIX))):
        raise InvalidTraining(
            f"{sparse / CONFIG_FILE}: trained on the embeddings of {config.store.model}, whose weights are not those "
            f"of --clip {clip}; give that model"
        )


def _in_words(interval: Interval) -> str:
    return f"{interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def main() -> None:
    """The command line."""
    settings = parse_settings(CommandLine, program="python -m training.zero_shot_classification", description=__doc__)
    classes, images = _data(settings)
    clip = load_clip(settings.clip, choose_device(settings.device))
    _require_trained_on(settings.clip, settings.sparse)
    classifier = ConceptClassifier(clip, read_sparse(settings.sparse), read_centre(settings.sparse), classes)
    found = classify(classifier, images, settings)
    print(f"{len(classes.names)} classes, {found['images']['test']} images; weight {found['weight']:g} chosen on "
          f"{found['images']['validation']} others")  # fmt: skip
    for name, interval in found["accuracy"].items():
        print(f"{name:>20}  {_in_words(interval)}")
    print(f"enhanced minus plain  {_in_words(found['enhanced_minus_plain'])}")
    if settings.json_file:
        accuracy = {name: one._asdict() for name, one in found["accuracy"].items()}
        difference = found["enhanced_minus_plain"]._asdict()
        kind = read_run_config(settings.sparse).kind
        write_json(settings.json_file, found | {"accuracy": accuracy, "enhanced_minus_plain": difference, "kind": kind})


if __name__ == "__main__":
    run_stage(main)
