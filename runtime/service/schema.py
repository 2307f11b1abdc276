"""What clients may send, under OpenAI's names and defaults. The runtime's Sampling checks the ranges of values.

Parameters that change nothing here are accepted (`IGNORED`), and so are values that ask for what is done anyway
(`NEUTRAL`); null means that a parameter is not given. All others are refused by name: a client that asks for an image
must not get an answer made without it.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    Tag,
    ValidationError,
    WrapValidator,
)
from pydantic import model_validator as validator
from pydantic_core import PydanticCustomError
from stageline.runtime.service.structured import ResponseFormat, StructuredOutputs, structure
from stageline.runtime.service.tools import ToolCall, Tooled

IGNORED = frozenset(
    {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
     "prediction"}
)  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "annotations": ([],), "audio": ({},), "bad_words": ([],), "cache_prompt": (True,),
    "documents": ([],), "early_stopping": (False,), "echo": (False,),
    "function_call": ("none", "auto"), "functions": ([],),
    "include_stop_str_in_output": (False,), "length_penalty": (1, 1.0), "logit_bias": ({},), "logprobs": (False,),
    "raw_scores": (False,),
    "reasoning": ("",), "reasoning_content": ("",), "reasoning_effort": ("none",), "refusal": ("",),
    "response_format": ({"type": "text"},), "seed": (-1,), "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,), "suffix": ("",), "tool_calls": ([],), "tools": ([],),
    "use_beam_search": (False,), "verbosity": ("medium",),
}  # fmt: skip
"""Parameters of OpenAI's and vLLM's servers -> the values that change nothing here."""
UNKNOWN_DROPPED: ContextVar[list[str] | None] = ContextVar("UNKNOWN_DROPPED", default=None)
"""Where the names of unknown parameters go, which are then left out; None: they are refused."""
RESERVED = frozenset(
    {"messages", "tools", "add_generation_prompt", "continue_final_message", "self", "chat_template", "tokenize",
     "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"}
)  # fmt: skip
"""Names that chat_template_kwargs may not set: a prompt without the template's rules would be made of them."""
_MOST_BIAS = 100  # OpenAI's range of a logit's bias
MOST_MESSAGES = 2048
_MOST_NAMES = 1000
_DEFAULT_COMPLETION_TOKENS = 16  # of /v1/completions; a chat continues until it ends

# What validates a list ends at the first that is wrong: it keeps Python's lock, and would write a line on each.
Texts = Annotated[list[str], Field(fail_fast=True)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @validator(mode="before")
    @classmethod
    def _without_what_changes_nothing(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        if len(values) > _MOST_NAMES:
            raise PydanticCustomError("names", "an object has {many} names; send fewer", {"many": len(values)})
        needed = {name for name, field in cls.model_fields.items() if field.is_required()}
        left = {
            name: value
            for name, value in values.items()
            if not (
                (name in IGNORED and name not in cls.model_fields)
                or value is None
                or (name not in needed and _neutral(name, value))
            )
        }
        dropped = UNKNOWN_DROPPED.get()
        if dropped is None:
            return left
        dropped.extend(str(name) for name in left if name not in cls.model_fields)
        return {name: value for name, value in left.items() if name in cls.model_fields}


def _neutral(name: str, value: Any) -> bool:
    """Whether the value says nothing; 0 is not False here."""
    return any(type(value) is type(one) and value == one for one in NEUTRAL.get(name, ()))


class StreamOptions(Body):
    """`include_usage`: add a last chunk with the token counts. `continuous_usage_stats` (vLLM's): also give the counts
    so far with each chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # OpenAI pads chunks; not here


class Generating(Body):
    """Parameters of both chats and completions."""

    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    stop: str | Texts | None = None
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = None
    logit_bias: dict[str, float] = Field(default_factory=dict)
    """Token id -> what is added to its logit, -100 to 100."""
    # vLLM's, not OpenAI's; -1 as top_k: off.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool = False
    priority: int = 0
    prompt_logprobs: int | None = None
    """Of each token of the prompt, and of as many of the likeliest there; not in streams."""
    stop_token_ids: list[int] = Field(default_factory=list, fail_fast=True)
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None  # OpenAI's, of chats
    # Ours: seconds.
    deadline_s: float | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """Keywords for `Pipeline.request`."""
        names = (
            "n", "temperature", "top_p", "stop", "seed", "presence_penalty", "frequency_penalty", "max_tokens",
            "top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos",
            "priority", "prompt_logprobs",
        )  # fmt: skip
        bias = tuple(((int(token),), bias) for token, bias in self.logit_bias.items())
        top_k = 0 if self.top_k == -1 else self.top_k
        return {
            **{name: getattr(self, name) for name in names},
            "top_k": top_k,
            "sequence_bias": bias or None,
            "structure": structure(self.response_format, self.structured_outputs),
        }

    @validator(mode="after")
    def _prompt_logprobs_of_a_whole(self) -> Self:
        if self.prompt_logprobs is not None and self.stream:
            raise PydanticCustomError("prompt_logprobs", "prompt_logprobs are not for streams; leave out one of them")
        return self

    @validator(mode="after")
    def _bias_of_tokens(self) -> Self:
        for token, bias in self.logit_bias.items():
            if not (token.isascii() and token.isdigit()) or not -_MOST_BIAS <= bias <= _MOST_BIAS:
                raise PydanticCustomError(
                    "logit_bias",
                    "logit_bias gives {token} a bias of {bias}; give token ids biases from -100 to 100",
                    {"token": repr(token), "bias": bias},
                )
        return self


class TextPart(Body):
    """A part of a message; only text is accepted."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    """No parts at all beside `tool_calls`, which come without a text."""
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] = Field(default_factory=list, fail_fast=True)
    tool_call_id: str | None = None

    @property
    def for_template(self) -> dict[str, Any]:
        """The form that chat templates read, text parts joined by line ends."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        others = {name: getattr(self, name) for name in ("name", "reasoning_content", "tool_call_id")}
        given = {name: value for name, value in others.items() if value is not None}
        if self.tool_calls:
            given["tool_calls"] = [call.for_template for call in self.tool_calls]
        if parts or not self.tool_calls:
            given["content"] = "\n".join(parts)
        return {"role": self.role, **given}

    @validator(mode="before")
    @classmethod
    def _calls_without_a_text(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("tool_calls") and values.get("content") is None:
            return {**values, "content": []}
        return values

    @validator(mode="after")
    def _of_its_role(self) -> Self:
        if (self.tool_calls and self.role != "assistant") or (self.tool_call_id is not None and self.role != "tool"):
            raise PydanticCustomError("role", "tool_calls are the assistant's, and tool_call_id is a tool's")
        return self


class Templated(Body, Tooled):
    """Messages and tools, and how the template makes a prompt of them."""

    messages: list[Message] = Field(max_length=MOST_MESSAGES, fail_fast=True)
    # vLLM's.
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """What the template knows beside messages, such as enable_thinking."""

    @property
    def template_variables(self) -> dict[str, Any]:
        """Keywords for `Pipeline.chat_ids`."""
        return {
            **self.chat_template_kwargs,
            "tools": [tool.given for tool in self.offered] or None,
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
        }

    @validator(mode="after")
    def _nothing_of_ours(self) -> Self:
        if reserved := sorted(RESERVED & self.chat_template_kwargs.keys()):
            raise PydanticCustomError(
                "chat_template_kwargs", "chat_template_kwargs may not set {name}", {"name": repr(reserved[0])}
            )
        return self


class ChatRequest(Generating, Templated):
    """/v1/chat/completions"""

    max_completion_tokens: int | None = None
    """The newer name of `max_tokens`; wins if both are given."""
    logprobs: bool = False
    top_logprobs: int | None = None
    modalities: list[Literal["text"]] = Field(default_factory=list, fail_fast=True)

    @property
    def sampling(self) -> dict[str, Any]:
        """Keywords for the runtime's `Sampling`."""
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return {**super().sampling, "max_tokens": max_tokens, "logprobs": logprobs}

    @validator(mode="after")
    def _logprobs_to_be_top_of(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs is given without logprobs; set logprobs to true")
        return self


def _one_message(value: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
    try:
        return handler(value)
    except ValidationError:
        raise PydanticCustomError(
            "texts_or_tokens", "give a text, a list of texts, a list of token ids or a list of such lists"
        ) from None


Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(fail_fast=True)]
TextsOrTokens = Annotated[
    str | Texts | Tokens | Annotated[list[Tokens], Field(fail_fast=True)], WrapValidator(_one_message)
]


def each(given: str | list[str] | list[Token] | list[list[Token]]) -> list[str] | list[list[Token]]:
    """A list of texts or a list of lists of token ids, whichever of the four forms was given."""
    if isinstance(given, str):
        return [given]
    if given and isinstance(given[0], int):
        return [given]
    return given  # type: ignore[return-value]


class CompletionRequest(Generating):
    """/v1/completions"""

    prompt: TextsOrTokens
    logprobs: int | None = None
    max_tokens: int | None = _DEFAULT_COMPLETION_TOKENS
    best_of: int | None = None
    suffix: str | None = None
    """What comes after the completion, for models that fill in the middle."""
    echo: bool = False
    """Put the prompt before each text, and with `logprobs` its tokens before those of each choice."""

    @validator(mode="after")
    def _best_of_all(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != self.n:
            raise PydanticCustomError("best_of", "best_of must equal n; ask for n choices and pick the best")
        if self.suffix is not None and self.echo:
            raise PydanticCustomError("suffix", "echo and suffix exclude each other; leave one of them out")
        return self

    @property
    def sampling(self) -> dict[str, Any]:
        """Keywords for the runtime's `Sampling`."""
        sampling = super().sampling
        if self.echo and (self.logprobs is not None or self.max_tokens == 0):
            sampling["prompt_logprobs"] = max(self.logprobs or 0, self.prompt_logprobs or 0)
        return {**sampling, "logprobs": self.logprobs}


class EmbeddingRequest(Body):
    """/v1/embeddings"""

    model: str
    input: TextsOrTokens
    encoding_format: Literal["float", "base64"] = "float"
    truncate: bool = False
    """Not OpenAI's: truncate texts that are too long instead of refusing them."""
    prompt_name: str | None = None
    """Not OpenAI's: which of the model's prompts is put before each text."""
    dimensions: int | None = Field(default=None, ge=1)
    """How many of a vector's first numbers to give, normalised again."""
    input_type: str | None = None
    """Cohere's and NVIDIA's: what the texts are; chooses among the model's prompts, if it has some."""
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    """vLLM's: keep this many tokens of each text; -1: as many as the model takes."""


class RerankDocument(Body):
    """A document of /rerank that is no plain text."""

    text: str


class Cut(Body):
    """What says to how many tokens a text, or a pair, is cut."""

    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    """vLLM's; -1: as many as the model takes."""

    @property
    def limit(self) -> int | None:
        """None: what the model takes."""
        return None if self.truncate_prompt_tokens in (None, -1) else self.truncate_prompt_tokens


class RerankRequest(Cut):
    """/rerank, as Cohere and Jina have it, or as Text Embeddings Inference has it, with `texts`"""

    model: str | None = None
    """None, as of the latter: the first model that scores."""
    query: str
    documents: list[str | RerankDocument] = Field(default_factory=list, fail_fast=True)
    texts: Texts | None = None
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool = True
    return_text: bool = False
    truncate: bool = True

    @validator(mode="before")
    @classmethod
    def _documents_or_texts(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and ("documents" in values) == (values.get("texts") is not None):
            raise PydanticCustomError("documents", "give documents (or texts, as Text Embeddings Inference has it)")
        return values


class ScoreRequest(Cut):
    """/score, vLLM's"""

    model: str
    text_1: str | Texts
    text_2: str | Texts

    @validator(mode="before")
    @classmethod
    def _newer_names(cls, values: Any) -> Any:
        """vLLM has renamed them twice."""
        if not isinstance(values, Mapping):
            return values
        names = {"queries": "text_1", "data_1": "text_1", "documents": "text_2", "data_2": "text_2"}
        return {names.get(name, name): value for name, value in values.items()}


class ClassifyRequest(Cut):
    """/classify, vLLM's"""

    model: str
    input: str | Texts
    truncate: bool = False


class TokenizeRequest(Body):
    """/tokenize, of a text"""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(Templated):
    """/tokenize, of messages"""

    model: str | None = None
    return_token_strs: bool = False


def _has_messages(body: Any) -> str:
    return "chat" if isinstance(body, Mapping) and "messages" in body else "text"


# Chosen by what it has: a body tried as the other kind would have its own parameters named as unknown.
TextOrChat = Annotated[
    Annotated[TokenizeRequest, Tag("text")] | Annotated[TokenizeChatRequest, Tag("chat")], Discriminator(_has_messages)
]


class DetokenizeRequest(Body):
    """/detokenize"""

    model: str | None = None
    tokens: Tokens
