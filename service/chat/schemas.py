"""What a client may ask: OpenAI's chat completion request, typed and bounded. Knows no HTTP and no engine.

Responses need no schema of ours: they are built from the `openai` package's own types (`streaming.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from service.chat.json_schema import canonical_json_schema
from service.chat.strict_model import Neutral, Strict, by, inconsistent, uncallable
from steering.request import SteeringRequest

MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS_ENTRIES = 1024
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
INSTEAD_OF_TOOLS = "for an answer that follows a schema send response_format"


SenderName = Annotated[str, Field(max_length=64)] | None
"""Tells senders of one role apart. Accepted and not used: no chat template of ours has a place for it."""


class CacheBreakpoint(Strict):
    """Where a provider's prompt cache may end. Accepted and not used: prompts are cached wherever they agree."""

    mode: Literal["explicit"]
    ttl: Literal["30m", "12h"] | None = None


class CacheOptions(Strict):
    """Accepted and not used, as CacheBreakpoint."""

    mode: Literal["implicit", "explicit"] | None = None
    ttl: Literal["30m"] | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: CacheBreakpoint | None = None


class ImageUrl(Strict):
    url: str
    """A `data:` URL with base64 content, or an `https://` URL of a host that the server allows."""
    detail: Literal["auto", "low", "high", "original"] | None = None
    """Accepted and not used: a model looks at every picture in the one way that it was trained with."""


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl
    prompt_cache_breakpoint: CacheBreakpoint | None = None


PARTS = {"text": "<text>", "image_url": "<image>", "refusal": "<refusal>"}
STRING_OR_PARTS = Discriminator(lambda content: "<parts>" if isinstance(content, list) else "<text>")
UserPart = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image>")],
    by("type", PARTS, "'text' or 'image_url'"),
]
UserContent = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[UserPart], Field(min_length=1, fail_fast=True), Tag("<parts>")],
    STRING_OR_PARTS,
]
TextContent = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("<parts>")],
    STRING_OR_PARTS,
]


class InstructionMessage(Strict):
    """`developer` is what newer clients call `system`; both are the template's system message."""

    role: Literal["system", "developer"]
    content: TextContent
    name: SenderName = None


class UserMessage(Strict):
    role: Literal["user"]
    content: UserContent
    name: SenderName = None


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """What the assistant said."""
        return self.refusal


AnswerPart = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[RefusalPart, Tag("<refusal>")],
    by("type", PARTS, "'text' or 'refusal'"),
]
AnswerContent = Annotated[
    Annotated[str | None, Tag("<text>")] | Annotated[list[AnswerPart], Field(fail_fast=True), Tag("<parts>")],
    STRING_OR_PARTS,
]


class AssistantMessage(Strict):
    """An earlier answer, which may be empty. The extra fields are those that responses carry, so that one can be sent
    back."""

    role: Literal["assistant"]
    content: AnswerContent = None
    name: SenderName = None
    refusal: str | None = None
    """What the assistant said instead of `content`."""
    annotations: Annotated[Any, Neutral([])] = None
    audio: Annotated[Any, Neutral()] = None
    function_call: Annotated[Any, Neutral()] = None
    tool_calls: Annotated[Any, Neutral([])] = None
    provider_specific_fields: dict[str, Any] | None = None
    """What LiteLLM notes on an answer and sends back with it. Accepted and not used."""


Message = Annotated[
    Annotated[InstructionMessage, Tag("<system>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")],
    by(
        "role",
        {"system": "<system>", "developer": "<system>", "user": "<user>", "assistant": "<assistant>"},
        "'system', 'developer', 'user' or 'assistant'",
    ),
]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, Neutral(False)] = None


class TextFormat(Strict):
    type: Literal["text"]


class ObjectFormat(Strict):
    type: Literal["json_object"]


class NamedSchema(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    canonical: Annotated[str, BeforeValidator(canonical_json_schema, json_schema_input_type=dict[str, Any])] = Field(
        alias="schema"
    )
    """A JSON schema of at most 64 KiB, 32 levels and 1,000 parts, without references to elsewhere."""
    strict: bool | None = None
    """Accepted either way: an answer follows all of its schema that can be enforced."""
    description: str | None = Field(default=None, max_length=1024)
    """Accepted and not used."""


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[ObjectFormat, Tag("<object>")]
    | Annotated[SchemaFormat, Tag("<schema>")],
    by(
        "type",
        {"text": "<text>", "json_object": "<object>", "json_schema": "<schema>"},
        "'text', 'json_object' or 'json_schema'",
    ),
]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
StopList = Annotated[list[StopString], Field(max_length=4)]
StopStrings = Annotated[
    StopList,
    BeforeValidator(
        lambda stop: [stop] if isinstance(stop, str) else stop, json_schema_input_type=StopString | StopList | None
    ),
]
TokenId = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
BiasTable = Annotated[
    dict[TokenId, Bias], Field(max_length=MAX_LOGIT_BIAS_ENTRIES, json_schema_extra={"additionalProperties": False})
]
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


Tools = Annotated[list[dict[str, Any]], Field(max_length=128)] | None


class ChatCompletionRequest(Strict):
    """A chat request; fields that stand here with a single value or two are accepted because they ask for nothing."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=1024)

    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens per choice; `max_completion_tokens` is its newer name."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    """0 leaves the most likely token only."""
    top_k: int | None = Field(default=None, ge=-1, le=1_000_000)
    """An extension that vLLM's users know; 0 and -1 keep all tokens."""
    n: int | None = Field(default=None, ge=1)
    stop: StopStrings | None = None
    """The text ends before the first of these."""
    seed: int | None = Field(default=None, ge=INT64_MIN, le=INT64_MAX)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: BiasTable | None = None
    """Token id to what is added to its logit."""
    response_format: ResponseFormat | None = None
    """What shape the answer has: free text, a JSON object, or JSON that follows a schema."""
    steering: SteeringRequest | None = None
    """How the answer is steered; an extension."""

    user: str | None = Field(default=None, max_length=512)
    """Who asks: while an experiment runs, the unit that falls into an arm."""
    safety_identifier: str | None = Field(default=None, max_length=512)
    """Accepted and not used, as are `metadata` and what is said of the prompt's cache: they change no answer."""
    prompt_cache_key: str | None = Field(default=None, max_length=512)
    prompt_cache_options: CacheOptions | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    metadata: dict[MetadataKey, MetadataValue] | None = Field(default=None, max_length=16)

    audio: Annotated[Any, Neutral()] = None
    function_call: Annotated[Any, Neutral("none", "auto", instead=INSTEAD_OF_TOOLS)] = None
    functions: Tools = None
    modalities: Annotated[Any, Neutral(["text"])] = None
    moderation: Annotated[Any, Neutral()] = None
    parallel_tool_calls: Annotated[Any, Neutral(True, False)] = None
    prediction: Annotated[Any, Neutral()] = None
    reasoning_effort: Annotated[Any, Neutral("none")] = None
    service_tier: Annotated[Any, Neutral("auto", "default")] = None
    store: Annotated[Any, Neutral(False)] = None
    tool_choice: Annotated[Any, Neutral("none", "auto", instead=INSTEAD_OF_TOOLS)] = None
    tools: Tools = None
    """Accepted and not used where `tool_choice` is "none"; the model calls no tools. `functions` likewise."""
    verbosity: Annotated[Any, Neutral("medium")] = None
    web_search_options: Annotated[Any, Neutral()] = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise inconsistent("top_logprobs", "needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise inconsistent("stream_options", "needs stream: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise inconsistent("max_tokens", "differs from max_completion_tokens; send one of them")
        for field, choice in (("tools", "tool_choice"), ("functions", "function_call")):
            if getattr(self, field) and getattr(self, choice) != "none":
                raise uncallable(field, choice, INSTEAD_OF_TOOLS)
        return self
