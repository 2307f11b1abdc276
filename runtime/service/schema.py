"""What clients may send, under OpenAI's names and defaults. The runtime's Sampling checks the ranges of values.

Parameters that change nothing here are accepted (`IGNORED`), and null means that a parameter is not given. All others
are refused by name: a client that asks for tools or a logit bias must not get an answer made without them.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, WrapValidator
from pydantic import model_validator as validator
from pydantic_core import PydanticCustomError

IGNORED = frozenset(
    {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
     "prediction", "parallel_tool_calls"}
)  # fmt: skip
_DEFAULT_COMPLETION_TOKENS = 16  # of /v1/completions; a chat continues until it ends


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @validator(mode="before")
    @classmethod
    def _without_what_changes_nothing(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {name: value for name, value in values.items() if value is not None and name not in IGNORED}


class StreamOptions(_Body):
    """`include_usage`: add a last chunk with the token counts."""

    include_usage: bool = False
    include_obfuscation: bool = False  # OpenAI pads chunks; not here


class Generating(_Body):
    """Parameters of both chats and completions."""

    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    stop: str | list[str] = Field(default_factory=list)
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = None
    # vLLM's, not OpenAI's.
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop_token_ids: list[int] = Field(default_factory=list)
    # Ours: seconds.
    deadline_s: float | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """Keywords for the runtime's `Sampling`."""
        names = (
            "n", "temperature", "top_p", "stop", "seed", "presence_penalty", "frequency_penalty", "max_tokens",
            "top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


class TextPart(_Body):
    """A part of a message; only text is accepted."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def for_template(self) -> dict[str, str]:
        """The form that chat templates read, text parts joined by line ends."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": "\n".join(parts), **named}


class TextFormat(_Body):
    """The only response format."""

    type: Literal["text"]


class ChatRequest(Generating):
    """/v1/chat/completions"""

    messages: list[Message]
    max_completion_tokens: int | None = None
    """The newer name of `max_tokens`; wins if both are given."""
    logprobs: bool = False
    top_logprobs: int | None = None
    response_format: TextFormat = TextFormat(type="text")
    modalities: list[Literal["text"]] = Field(default_factory=list)
    tool_choice: Literal["none"] = "none"

    @property
    def sampling(self) -> dict[str, Any]:
        """Keywords for the runtime's `Sampling`."""
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return {**super().sampling, "max_tokens": max_tokens, "logprobs": logprobs}

    @validator(mode="after")
    def _logprobs_to_be_top_of(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
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
TextsOrTokens = Annotated[str | list[str] | list[Token] | list[list[Token]], WrapValidator(_one_message)]


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
    echo: Literal[False] = False

    @validator(mode="after")
    def _best_of_all(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != self.n:
            raise PydanticCustomError("best_of", "best_of must equal n; ask for n choices and pick the best")
        return self

    @property
    def sampling(self) -> dict[str, Any]:
        """Keywords for the runtime's `Sampling`."""
        return {**super().sampling, "logprobs": self.logprobs}


class EmbeddingRequest(_Body):
    """/v1/embeddings"""

    model: str
    input: TextsOrTokens
    encoding_format: Literal["float", "base64"] = "float"
    truncate: bool = False
    """Not OpenAI's: truncate texts that are too long instead of refusing them."""
    prompt_name: str | None = None
    """Not OpenAI's: which of the model's prompts is put before each text."""
