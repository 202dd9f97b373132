"""`make demo`: the main job end to end. Starts the service, asks it with steering off and on, shows both and the truth.

    python -m training.miniature.demo

A user's view: HTTP through the official `openai` client, nothing imported from the service. The pictures are scenes
that nothing was trained, tuned or evaluated on. Exit status 0 only if every answer came and every receipt was true.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from openai import OpenAI
from pydantic import Field

from steering.artifact_config import read_config
from training.command_line import Settings, parse_settings
from training.evaluation.conditions import TASKS, Task, TunedPresets, as_request, tuned_presets
from training.miniature.drawing import draw_scene
from training.miniature.language import CAPTION_PROMPT, existence_question, shapes_mentioned
from training.miniature.paths import ARTIFACT, LLAVA
from training.miniature.world import SHAPES, Scene, scenes
from training.yes_or_no import parse_answer

ROOT = Path(__file__).parents[2]
OFF = {"enabled": False}


class DemoSettings(Settings):
    """One caption and three questions per picture, with steering off and on, and the truth beside them."""

    pictures: int = Field(default=4, ge=1, le=100)
    """Number of scenes shown."""
    model: Path = LLAVA
    """Folder of the LVLM."""
    artifact: Path = ARTIFACT
    """Folder of the steering artifact."""
    startup_timeout_s: float = Field(default=300, gt=0)
    """The service may take so many seconds to become ready."""


@dataclass
class Tally:
    """What went wrong, and how often steering off and on were right."""

    failures: list[str] = field(default_factory=list)
    invented: dict[str, int] = field(default_factory=lambda: {"off": 0, "on": 0})
    right: dict[str, int] = field(default_factory=lambda: {"off": 0, "on": 0})
    asked: int = 0


@contextmanager
def running_service(settings: DemoSettings) -> Iterator[str]:
    """The service as a process of its own on a free port; its URL, once it is ready. Always stopped."""
    port = free_port()
    command = [sys.executable, "-m", "service", "--port", str(port)]
    command += ["--model", str(settings.model), "--artifact", str(settings.artifact)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        print("$ " + " ".join(["python", *command[1:5]]), flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, stdin=subprocess.DEVNULL
        )
        try:
            url = f"http://127.0.0.1:{port}"
            began = time.monotonic()
            try:
                wait_until_ready(process, url, settings.startup_timeout_s)
            except RuntimeError:
                log.seek(0)
                print("".join(log.readlines()[-30:]), file=sys.stderr)
                raise
            print(f"ready after {time.monotonic() - began:.0f} s\n", flush=True)
            yield url
        finally:
            stop(process)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(process: subprocess.Popen, url: str, timeout_s: float) -> None:
    """Until `/readyz` is 200. Raises RuntimeError where it never is."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the service ended with status {process.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.3)
    raise RuntimeError(f"the service was not ready after {timeout_s:g} s")


def stop(process: subprocess.Popen, patience_s: float = 60) -> None:
    """As Ctrl-C would; what does not end by then is killed."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def steering_on(tuned: TunedPresets, task: Task) -> tuple[dict[str, Any], str]:
    """What switches steering on for a task, and how that is called: its preset, else one that is on, else a form."""
    for name in (task, *TASKS):
        if tuned.is_on(name):
            return {"enabled": True, "preset": name}, f"preset {name}"
    preset = tuned.of_form(tuned.form, task)
    return as_request(preset).model_dump(exclude_none=True), f"form {preset.form}, though every preset is off"


class Interview:
    """Asks one service about pictures, and checks each receipt against what was asked."""

    def __init__(self, url: str, tally: Tally) -> None:
        self._client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)
        self._model = next(model.id for model in self._client.models.list() if ":" not in model.id)
        self.tally = tally
        self.receipt: dict[str, Any] = {}
        """The last one of an answer that was steered."""

    def ask(self, image: str, text: str, steering: dict[str, Any], *, max_tokens: int) -> str:
        """One greedy answer."""
        completion = self._client.chat.completions.create(
            model=self._model,
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": image}},
                        {"type": "text", "text": text},
                    ],
                }
            ],
            temperature=0,
            max_tokens=max_tokens,
            extra_body={"steering": steering},
        )
        answer = (completion.choices[0].message.content or "").strip()
        receipt = (completion.model_extra or {}).get("steering") or {}
        wanted = steering["enabled"]
        if receipt.get("applied") is not wanted:
            self.tally.failures.append(f"{text!r}: applied should be {wanted}, the receipt is {receipt}")
        if not answer:
            self.tally.failures.append(f"{text!r}: the answer is empty with steering {'on' if wanted else 'off'}")
        if wanted:
            self.receipt = receipt
        return answer


def show_scene(interview: Interview, scene: Scene, on: Mapping[Task, dict[str, Any]]) -> None:
    """Caption and questions, off and on, with the truth."""
    image = data_url(scene)
    tally = interview.tally
    print(f"picture {scene.seed}: {', '.join(f'{item.color} {item.shape}' for item in scene.objects)}")
    for name, steering in (("off", OFF), ("on", on["captions"])):
        caption = interview.ask(image, CAPTION_PROMPT, steering, max_tokens=100)
        invented = [shape for shape in shapes_mentioned(caption) if shape not in scene.shapes]
        tally.invented[name] += len(invented)
        print(f"  {name:>3}  {mark_invented(caption, scene)}")
    for shape in questions_about(scene):
        truth = shape in scene.shapes
        answers = {}
        for name, steering in (("off", OFF), ("on", on["questions"])):
            answers[name] = interview.ask(image, existence_question(shape), steering, max_tokens=8)
            tally.right[name] += parse_answer(answers[name]) is truth
        tally.asked += 1
        row = "   ".join(
            f"{name} {answer!r}{'' if parse_answer(answer) is truth else '  <- wrong'}"
            for name, answer in answers.items()
        )
        print(f"       {existence_question(shape)}  truth {'Yes' if truth else 'No'}   {row}")
    print(flush=True)


def questions_about(scene: Scene) -> list[str]:
    """A shape that is there, one that is not, and one that likes to be invented."""
    absent = [shape for shape in SHAPES if shape not in scene.shapes and shape not in scene.absent_partners]
    return [scene.objects[0].shape, *absent[:1], *scene.absent_partners[:1]]


def mark_invented(caption: str, scene: Scene) -> str:
    """Shapes that are not in the picture in capitals between arrows."""
    absent = "|".join(shape for shape in SHAPES if shape not in scene.shapes)
    return re.sub(rf"\b({absent})\b", lambda match: f">>{match[0].upper()}<<", caption)


def data_url(scene: Scene) -> str:
    """The picture, as a client sends one that it has at hand."""
    file = io.BytesIO()
    draw_scene(scene).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def main() -> int:
    settings = parse_settings(DemoSettings, program="python -m training.miniature.demo")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # so that the service is stopped, too
    tuned = tuned_presets(read_config(settings.artifact))
    chosen: dict[Task, tuple[dict[str, Any], str]] = {task: steering_on(tuned, task) for task in TASKS}
    tally = Tally()
    try:
        with running_service(settings) as url:
            interview = Interview(url, tally)
            print("on = " + "; ".join(f"{how} for {task}" for task, (_, how) in chosen.items()))
            print(">>SHAPE<< = not in the picture\n")
            on: dict[Task, dict[str, Any]] = {task: chosen[task][0] for task in TASKS}
            for scene in islice(scenes("demo", absent_partner=True), settings.pictures):
                show_scene(interview, scene, on)
            print("receipt of the last steered answer:\n" + json.dumps(interview.receipt, indent=2))
    except RuntimeError as error:
        tally.failures.append(str(error))
    print(
        f"\ninvented objects   off {tally.invented['off']}, on {tally.invented['on']}, in {settings.pictures} captions"
    )
    print(f"right answers      off {tally.right['off']}, on {tally.right['on']}, of {tally.asked}")
    print("A few pictures prove nothing: python -m training.evaluate_hallucination measures.")
    for failure in tally.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
