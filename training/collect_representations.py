"""Stage 1: pooled representations of image-text pairs, from a model's residual stream, into a store on disk.

An LVLM of a known family gives its states at decoder layers (`training/collection/lvlm.py`), an open_clip model its
embeddings (`training/collection/clip.py`). Run it again with the same settings after an interruption: it goes on, and
ends with the bytes of a run that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from training.collection.clip import CONFIG_FILE, ClipSettings
from training.collection.lvlm import LvlmSettings, read_checkpoint
from training.collection.placing import PROMPTS, TextPlace, read_prompts
from training.collection.representer import ModelDtype, RepresenterSettings
from training.collection.run import CollectionOptions, collect_store
from training.command_line import parse_settings, run_stage
from training.errors import InvalidTraining

_FOR_ANSWERS = ("prompts", "prefixes", "shortest_prefix")
_FOR_LVLMS = ("layers", "point", "text_in", *_FOR_ANSWERS)


class CommandLine(CollectionOptions):
    """What is collected from which pairs, and where it goes."""

    model: Path
    """Checkpoint of an LVLM of a known family, or a folder of an open_clip model."""
    pairs: str
    """webdataset:/data/cc3m/*.tar, jsonl:/data/pairs.jsonl, miniature:RANGE:COUNT[:START], or
    huggingface:/data/saved_dataset[?split=train&image=image&text=caption]."""
    output: Path
    """Folder of the store; one that was begun with the same settings is gone on with."""
    layers: tuple[int, ...] | None = None
    """Decoder layers of an LVLM that are read, counted from 0; by default the last but one."""
    point: Literal["output", "input"] = "output"
    """Side of the layers that is read."""
    dtype: ModelDtype = "float32"
    """Number format of the model; pooling is float32 whatever it is."""
    text_in: TextPlace = "answer"
    """Where an LVLM's texts stand: in the answer, as they are served, or in the user's turn, as the paper's authors
    have it."""
    prompts: Path | None = None
    """What the texts answer: a file with one prompt a line, of which each pair draws one; by default a list of five
    requests for a description."""
    prefixes: int = Field(default=3, ge=0)
    """Prefixes of each answer, of random length, that are pooled besides the whole; they cost next to nothing."""
    shortest_prefix: int = Field(default=1, ge=1)
    """Tokens of the answer in the shortest of them; a text that has fewer is skipped."""

    def representer(self) -> RepresenterSettings:
        """Of the model that is in the folder."""
        model = self.model.absolute()
        if (model / CONFIG_FILE).exists():
            self._refuse(_FOR_LVLMS, f"for LVLMs; {self.model} is an open_clip model")
            return ClipSettings(model=model, dtype=self.dtype, device=self.device)
        if self.text_in == "user_turn":
            self._refuse(_FOR_ANSWERS, "for --text-in answer, not for a text in the user's turn")
        layers = self.layers or (read_checkpoint(model)[0].get_text_config().num_hidden_layers - 2,)
        return LvlmSettings(
            model=model,
            layers=layers,
            point=self.point,
            dtype=self.dtype,
            device=self.device,
            text_in=self.text_in,
            prompts=PROMPTS if self.prompts is None else read_prompts(self.prompts),
            prefixes=self.prefixes if self.text_in == "answer" else 0,
            shortest_prefix=self.shortest_prefix,
        )

    def _refuse(self, names: Sequence[str], why: str) -> None:
        """Raises InvalidTraining for an option that would do nothing; 0 prefixes is as it is."""
        for name in names:
            if getattr(self, name) not in (type(self).model_fields[name].default, 0):
                raise InvalidTraining(f"--{name.replace('_', '-')} is {why}")


def main() -> None:
    """The command line."""
    settings = parse_settings(CommandLine, program="python -m training.collect_representations", description=__doc__)
    options = CollectionOptions.model_validate(settings.model_dump(include=set(CollectionOptions.model_fields)))
    manifest = collect_store(settings.output, settings.pairs, settings.representer(), options)
    names = ", ".join(manifest.collected.names)
    print(f"{settings.output}: {manifest.pairs:,} pairs of {names}, {manifest.skipped:,} skipped")


if __name__ == "__main__":
    run_stage(main)
