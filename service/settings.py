"""Every setting of the service: `Settings` are a cluster's args, `LaunchSettings` have besides what `python -m service`
settles for itself. `command_line.py` reads them from flags and environment. Reads no files.
"""

from __future__ import annotations

import difflib
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator

from service.artifacts import MAIN
from service.experiments.arms import Experiment, Name, Part, read_json
from steering.request import SteeringRequest

KEYS_VARIABLE = "VLSAE_KEYS"
"""Not a setting, since settings are shown and passed around: `keys.py` reads it."""
BUNDLE = Path(__file__).parent.parent / "training" / "miniature" / "bundle"
BUNDLED_MODEL, BUNDLED_ARTIFACT = BUNDLE / "llava", BUNDLE / "artifact"
MIB = 1024 * 1024
MAX_ONGOING_REQUESTS, MAX_QUEUED_REQUESTS = 128, 64
"""Of one model replica, and of one ingress replica while all of those are full."""
COPIES_OF_A_BODY = 3
"""Held at a time: as it came, as text, and as the bytes that base64 meant."""
BYTES_PER_PIXEL = 3
IMAGES_AT_LIMIT = 2
"""As large as one image may be, a request may have so many."""


class Group(Part):
    """Its docstrings are what `--help` says."""

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, values: Any) -> Any:
        for name in values if isinstance(values, dict) else ():
            if name not in cls.model_fields:
                raise ValueError(f"{name}: {no_such_setting(name, cls)}")
        return values


class EngineSettings(Group):
    """What runs the model, and on what."""

    name: Literal["huggingface", "vllm"] = "huggingface"
    """What runs the model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """'cpu', 'cuda' or 'auto' (CUDA where this machine has a device); which device is CUDA_VISIBLE_DEVICES' matter."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the model; 'auto' is float32 on the CPU, bfloat16 on CUDA."""
    max_context_tokens: int | None = Field(default=None, ge=1)
    """Tokens of prompt and answer together (default: what the model was made for)."""
    max_batch_size: int = Field(default=32, ge=1)
    """Sequences that share one decoding step."""
    cpu_threads: int = Field(default=1, ge=1)
    """Threads that one model replica computes with on a CPU."""
    stall_timeout_s: float = Field(default=60, gt=0)
    """An engine with work that makes no step for so many seconds is unhealthy, and replaced."""
    branches: int | None = Field(default=None, ge=1, le=2)
    """vLLM: 1 saves the steered branch's memory and time, and refuses requests that blend two (default on a GPU)."""
    cuda_graphs: Literal["full", "piecewise"] = "full"
    """vLLM on a GPU: 'full' captures decode steps whole, steering included; 'piecewise' leaves steering outside."""
    kv_cache_gib: float = Field(default=1, gt=0)
    """vLLM on a CPU: memory for keys and values, in GiB."""
    gpu_memory_share: float = Field(default=0.9, gt=0, le=1)
    """vLLM on a GPU: share of its memory, 0 to 1, for weights, keys and values."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """vLLM: number of devices that share one model."""
    compile: bool = False
    """vLLM on a CPU: compile the model at start, for faster steps (on CUDA it always is)."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, values: Any) -> Any:
        return {"name": values} if isinstance(values, str) else values

    def settled(self) -> EngineSettings:
        """With what 'auto' means on this machine."""
        device = self.device
        if device == "auto":
            device = "cuda" if Path("/dev/nvidia0").exists() else "cpu"
        dtype = self.dtype
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else "bfloat16"
        return self.model_copy(update={"device": device, "dtype": dtype})


class Settings(Group):
    """What an operator decides, whatever starts the service."""

    gateway: Literal["auto", "on", "off", "external"] = "auto"
    """What bounds clients: 'on' starts HAProxy, 'external' is yours, 'auto' is 'on' for any host but loopback."""

    model: str = str(BUNDLED_MODEL)
    """Folder of a Hugging Face checkpoint with its processor (default: the bundled miniature)."""
    artifact: str | None = None
    """Folder of the artifact trained for that model (default: the bundled one, for the bundled model)."""
    served_model_name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._/-]{1,128}$")
    """Model id that clients send (default: the model folder's name)."""
    steering: Literal["on", "off"] = "on"
    """'off' loads no artifact: every answer is the plain model's."""
    engine: EngineSettings = EngineSettings()
    """What runs the model; as a word it is the engine's name."""

    default_preset: str | None = None
    """Preset of requests that name none (default: the artifact's own default)."""
    default_strength: float | None = Field(default=None, ge=0, le=1)
    """Strength, 0 to 1, of requests that name neither strength nor preset (default: the preset's own)."""
    default_artifact: str = MAIN
    """Candidate whose artifact answers where no arm says otherwise; meant for the live file."""
    allow_controls: bool = False
    """Whether `steering.control` is accepted; for evaluation only."""
    routing: Literal["spread", "picture"] = "spread"
    """vLLM: 'picture' sends a key's requests about a picture to the replica that has it cached, while that is free."""
    default_max_tokens: int = Field(default=512, ge=1)
    """Tokens per choice where a request sets no max_tokens; never more than the context leaves."""
    max_tokens_limit: int = Field(default=4096, ge=1)
    """Largest max_tokens, in tokens per choice."""
    max_choices: int = Field(default=8, ge=1)
    """Largest n, in choices per request."""
    max_body_bytes: int = Field(default=48 * MIB, ge=1)
    """Largest request body, in bytes."""
    body_timeout_s: float = Field(default=30, gt=0)
    """A request's body must have arrived after so many seconds."""
    max_images: int = Field(default=8, ge=0)
    """Images per request."""
    max_image_bytes: int = Field(default=16 * MIB, ge=1)
    """Largest encoded image, in bytes."""
    max_image_pixels: int = Field(default=25_000_000, ge=1)
    """Largest image, in pixels."""
    max_memory_bytes: int = Field(default=2048 * MIB, validate_default=True)
    """Bodies, pixels and kept logprobs that an ingress replica holds, in bytes; a key may hold half."""
    image_workers: int = Field(default=2, ge=1)
    """Decoding processes per ingress replica."""
    image_hosts: str = Field(default="", pattern=r"^[A-Za-z0-9.,-]*$")
    """Hosts, separated by commas, from which https:// images are fetched (default: none; only data: URLs)."""

    keys_file: str | None = None
    """JSON file of API keys, made by `python -m service.callers.keys`; read again when it changes."""
    allow_anonymous: bool = False
    """Whether a service without keys may start where it does not know that it listens on loopback only."""
    only_local_names: bool = False
    """Whether only requests to an IP address or localhost are answered (always so on loopback without keys)."""

    live_file: str | None = None
    """JSON file of settings that hold from when it changes, without a new start, such as {"default_strength": 0.5}."""
    experiment: Experiment | None = None
    """An A/B experiment as a JSON object (service/README.md); meant for the live file."""
    log_file: str | None = None
    """File to which one JSON line per request is appended (default: standard error of the replica)."""
    traces_endpoint: str | None = Field(default=None, pattern=r"^https?://")
    """OpenTelemetry collector (OTLP over HTTP, such as http://127.0.0.1:4318) that gets traces (default: none)."""

    max_concurrent_requests: int = Field(default=256, ge=1)
    """Requests that one ingress replica works on at a time, for one key half at most; more are a 503."""
    request_timeout_s: float = Field(default=300, gt=0)
    """Longest duration of a request, in seconds."""
    drain_timeout_s: float = Field(default=5, ge=0)
    """At the end, running requests may take so many more seconds; a stream that is cut says so in an error event."""
    drain_file: str | None = None
    """While this file exists, this machine's service refuses new requests and ends the running ones."""
    model_may_sleep: bool = False
    """Set it where a cluster's `min_replicas` of the model is 0: who asks how the model is then does not wake it."""

    @field_validator("max_memory_bytes")
    @classmethod
    def _one_request_fits(cls, value: int, info: ValidationInfo) -> int:
        body, pixels = info.data.get("max_body_bytes", 0), IMAGES_AT_LIMIT * info.data.get("max_image_pixels", 0)
        if value < (least := 2 * (COPIES_OF_A_BODY * body + BYTES_PER_PIXEL * pixels)):
            raise ValueError(f"must hold two requests of max_body_bytes and max_request_pixels: at least {least} bytes")
        return value

    @model_validator(mode="before")
    @classmethod
    def _bundled_artifact(cls, values: dict) -> dict:
        """The bundled artifact belongs to the bundled model, and to no other."""
        model = Path(values.get("model", BUNDLED_MODEL)).resolve()
        if "artifact" not in values and model == BUNDLED_MODEL.resolve():
            return {**values, "artifact": str(BUNDLED_ARTIFACT)}
        return values

    @property
    def behind_gateway(self) -> bool:
        """What does not come through one is refused. 'auto' is settled before this is asked."""
        return self.gateway in ("on", "external")

    @property
    def max_request_pixels(self) -> int:
        """All images of a request together."""
        return IMAGES_AT_LIMIT * self.max_image_pixels

    @property
    def default_steering(self) -> SteeringRequest:
        """Of requests that say nothing."""
        return SteeringRequest(preset=self.default_preset, strength=self.default_strength)

    @property
    def model_name(self) -> str:
        return self.served_model_name or Path(self.model).resolve().name

    @property
    def loaded_artifact(self) -> str | None:
        """The artifact to load, if any."""
        return self.artifact if self.steering == "on" else None


class LaunchSettings(Settings):
    """Of `python -m service`: where it listens, and how large it is."""

    host: str = Field(default="127.0.0.1", pattern=r"^[0-9A-Za-z.:-]{1,253}$")
    """Address to listen on; any but a loopback address needs keys."""
    port: int = Field(default=8000, ge=1, le=65535)
    """TCP port."""
    tls_certificate: str | None = None
    """PEM file of certificate and key: the gateway speaks TLS (default: none)."""
    ingress_replicas: int = Field(default=1, ge=1)
    """Processes that answer HTTP; on a cluster `deployments:` has the number."""
    model_replicas: int = Field(default=1, ge=1)
    """Processes that each hold one engine, at the start; on a cluster `deployments:` has the number."""
    min_replicas: int | None = Field(default=None, ge=0)
    """Model replicas that stay without load; of 0 the next request waits for one to load (default: model_replicas)."""
    max_replicas: int | None = Field(default=None, ge=1)
    """Replicas, of the model and of the ingress each, that load may bring (default: no more than at the start)."""
    scale_down_delay_s: float = Field(default=300, ge=0)
    """So many seconds of less load take a replica away."""
    candidates: dict[Name, str] = Field(default_factory=dict)
    """Artifacts to load beside, each with a model of its own, as a JSON object of names and folders."""
    max_ongoing_requests: int = Field(default=MAX_ONGOING_REQUESTS, ge=1)
    """Requests that one model replica holds at a time; its engine batches or queues them."""
    max_queued_requests: int = Field(default=MAX_QUEUED_REQUESTS, ge=0)
    """Requests that wait in one ingress replica while every model replica is full; more are refused with 503."""

    @field_validator("candidates", mode="before")
    @classmethod
    def _from_text(cls, values: Any) -> Any:
        if MAIN in (found := read_json(values)):
            raise ValueError(f"{MAIN!r} is the service's own artifact; take another name")
        return found

    @property
    def on_loopback(self) -> bool:
        """Nobody but this machine reaches the host."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


RETIRED = {
    **{name: "is engine.{name} now" for name in EngineSettings.model_fields if name != "name"},
    **dict.fromkeys(("ingress_replicas", "model_replicas"), "is num_replicas under `deployments:` on a cluster"),
    **dict.fromkeys(
        ("min_replicas", "max_replicas"), "stands under `autoscaling_config:` of a deployment on a cluster"
    ),
    "scale_down_delay_s": "is downscale_delay_s under `autoscaling_config:` on a cluster",
    **dict.fromkeys(("max_ongoing_requests", "max_queued_requests"), "stands under `deployments:` on a cluster"),
    **dict.fromkeys(("host", "port"), "stands under `http_options:` on a cluster"),
    "tls_certificate": "is the gateway's GATEWAY_CERTIFICATE on a cluster",
    "max_request_pixels": "is twice max_image_pixels now",
    **dict.fromkeys(
        ("max_text_bytes", "max_image_side", "image_memory_bytes", "image_timeout_s", "image_fetch_timeout_s"),
        "cannot be set any more: the limit is fixed",
    ),
    **dict.fromkeys(("unready_after_s", "startup_timeout_s"), "cannot be set any more: the time is fixed"),
}
"""What became of settings that were, or whose they are on a cluster."""


def no_such_setting(name: str, group: type[BaseModel]) -> str:
    """What to do instead: the successor of a retired setting, or the known one that is most like it."""
    if name in RETIRED:
        return RETIRED[name].format(name=name)
    known = {name: f"engine.{name}" for name in EngineSettings.model_fields}
    known |= {name: name for name in group.model_fields if group is not EngineSettings}
    near = [known[like] for like in difflib.get_close_matches(name, known, 1)]
    return f"there is no such setting{f'; is it {near[0]}' if near else ''}; see python -m service --help"


class SettingsError(ValueError):
    """A setting is wrong; the message names it and the remedy."""
