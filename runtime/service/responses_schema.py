"""What clients may send to /v1/responses. Messages only: there is no store to go on from, and there are no tools."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field
from pydantic import model_validator as validator
from pydantic_core import PydanticCustomError
from stageline.runtime.service.schema import Body, Generating
from stageline.runtime.service.structured import NamedSchema, ResponseFormat, structure

LOGPROBS = "message.output_text.logprobs"
"""In `include`: give the log probabilities of the text."""
_ELSEWHERE = {
    "previous_response_id": "no responses are stored here; send the messages before in input",
    "conversation": "no conversations are stored here; send the messages before in input",
    "prompt": "no prompts are stored here; send it as instructions and input",
    "background": "no responses are stored here; leave background out, and stream",
    "tools": "tools are not supported here",
    "truncation": "nothing is left out of what does not fit; leave truncation out, or send disabled",
    "response_format": "response_format is of chats; send text.format",
    "max_tokens": "max_tokens is of chats; send max_output_tokens",
}
"""Parameters that cannot be done, and what to do."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "reasoning": ({}, {"effort": "none"}, {"effort": None}, {"effort": None, "summary": None}),
    "tools": ([],),
    "truncation": ("disabled",),
}


class TextContent(Body):
    """A part of a message, as a client made it or as it was answered."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[Any] = Field(default_factory=list)


class InputItem(Body):
    """A message, as a client made it or as it was answered."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: list[TextContent]
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: str | None = None

    @validator(mode="before")
    @classmethod
    def _of_one_form(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        kind = values.get("type")
        if kind not in (None, "message"):
            raise PydanticCustomError(
                "item", "items of type {kind} are not supported; send messages", {"kind": repr(kind)}
            )
        if isinstance(text := values.get("content"), str):
            return {**values, "content": [{"type": "input_text", "text": text}]}
        return values

    @property
    def for_template(self) -> dict[str, str]:
        """The form that chat templates read, text parts joined by line ends."""
        return {"role": self.role, "content": "\n".join(part.text for part in self.content)}


class TextFormat(Body):
    """`text.format`: what `response_format` is for chats, in one object."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @validator(mode="after")
    def _schema_where_one_is_meant(self) -> Self:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise PydanticCustomError("schema", "give a schema with the type json_schema, and only with it")
        return self

    @property
    def of_chats(self) -> ResponseFormat:
        """The same as chats have it."""
        if self.schema_ is None:
            return ResponseFormat(type=self.type)
        return ResponseFormat(type=self.type, json_schema=NamedSchema(schema=self.schema_))


class TextConfig(Body):
    """`text`: what the text must look like."""

    format: TextFormat = TextFormat(type="text")


class ResponsesRequest(Generating):
    """/v1/responses"""

    input: list[InputItem] = Field(min_length=1)
    instructions: str | None = None
    """A system message before all others."""
    max_output_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    text: TextConfig = TextConfig()
    include: list[str] = Field(default_factory=list)
    """`LOGPROBS`, or what only tools and reasoning have."""
    top_logprobs: int | None = None
    n: Literal[1] = 1
    metadata: dict[str, str] = Field(default_factory=dict)
    """Given back."""
    # Of tools, which are not there.
    tool_choice: Literal["none", "auto"] = "auto"
    parallel_tool_calls: bool = True
    max_tool_calls: int | None = None

    @validator(mode="before")
    @classmethod
    def _what_can_be_done(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        left = {name: value for name, value in values.items() if value not in _NEUTRAL.get(name, ())}
        for name, what in _ELSEWHERE.items():
            if left.get(name) is not None:
                raise PydanticCustomError("elsewhere", "{what}", {"what": what})
        if isinstance(text := left.get("input"), str):
            left["input"] = [{"role": "user", "content": text}]
        return left

    @property
    def messages(self) -> list[dict[str, str]]:
        """What the chat template makes a prompt of."""
        before = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        return [*before, *(item.for_template for item in self.input)]

    @property
    def wants_logprobs(self) -> bool:
        """Whether log probabilities of the text are asked for."""
        return LOGPROBS in self.include or bool(self.top_logprobs)

    @property
    def sampling(self) -> dict[str, Any]:
        """Keywords for the runtime's `Sampling`."""
        return {
            **super().sampling,
            "max_tokens": self.max_output_tokens,
            "logprobs": (self.top_logprobs or 0) if self.wants_logprobs else None,
            "structure": structure(self.text.format.of_chats, self.structured_outputs),
        }
