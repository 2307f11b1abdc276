"""What clients may send to /v1/responses, and the chat that it is. There is no store to go on from."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, PrivateAttr, Tag, ValidationError
from pydantic import model_validator as validator
from pydantic_core import PydanticCustomError
from stageline.runtime.service.errors import first_message
from stageline.runtime.service.schema import MOST_MESSAGES, Body, ChatRequest, Generating
from stageline.runtime.service.structured import NamedSchema, ResponseFormat, structure

LOGPROBS = "message.output_text.logprobs"
"""In `include`: give the log probabilities of the text."""
_ELSEWHERE = {
    "previous_response_id": "no responses are stored here; send the messages before in input",
    "conversation": "no conversations are stored here; send the messages before in input",
    "prompt": "no prompts are stored here; send it as instructions and input",
    "background": "no responses are stored here; leave background out, and stream",
    "max_tool_calls": "tools are called by the client, who can count; leave max_tool_calls out",
    "truncation": "nothing is left out of what does not fit; leave truncation out, or send disabled",
    "response_format": "response_format is of chats; send text.format",
    "max_tokens": "max_tokens is of chats; send max_output_tokens",
}
"""Parameters that cannot be done, and what to do."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "reasoning": ({}, {"effort": "none"}, {"effort": None}, {"effort": None, "summary": None}),
    "truncation": ("disabled",),
}


class TextContent(Body):
    """A part of a message, as a client made it or as it was answered."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[Any] = Field(default_factory=list)


class MessageItem(Body):
    """A message, as a client made it or as it was answered."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: list[TextContent] = Field(fail_fast=True)
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: str | None = None

    @validator(mode="before")
    @classmethod
    def _of_one_form(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        if isinstance(text := values.get("content"), str):
            return {**values, "content": [{"type": "input_text", "text": text}]}
        return values

    @property
    def of_chats(self) -> dict[str, Any]:
        """The message as chats have it, text parts joined by line ends."""
        return {"role": self.role, "content": "\n".join(part.text for part in self.content)}


class CallItem(Body):
    """A call of a tool, as it was answered."""

    type: Literal["function_call"]
    name: str
    arguments: str
    call_id: str
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None

    @property
    def of_chats(self) -> dict[str, Any]:
        """The message of the assistant as chats have it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"role": "assistant", "tool_calls": [{"id": self.call_id, "type": "function", "function": function}]}


class OutputItem(Body):
    """What a tool has answered."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Annotated[list[TextContent], Field(fail_fast=True)]
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None

    @property
    def of_chats(self) -> dict[str, Any]:
        """The message as chats have it."""
        text = self.output if isinstance(self.output, str) else "\n".join(part.text for part in self.output)
        return {"role": "tool", "tool_call_id": self.call_id, "content": text}


class ReasoningText(Body):
    """A part of a reasoning."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Body):
    """What the assistant thought, as it was answered."""

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningText], Field(fail_fast=True)] | None = None
    summary: list[ReasoningText] = Field(default_factory=list, fail_fast=True)
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None

    @property
    def of_chats(self) -> dict[str, Any]:
        """A part of the assistant's message as chats have it."""
        return {"role": "assistant", "reasoning_content": "\n".join(part.text for part in self.content or self.summary)}


def _kind(item: Any) -> str:
    kind = item.get("type") if isinstance(item, Mapping) else None
    return f"<{kind or 'message'}>"


InputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[CallItem, Tag("<function_call>")]
    | Annotated[OutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    Discriminator(
        _kind,
        custom_error_type="item",
        custom_error_message="items of this type are not supported; send messages, function calls and their outputs",
    ),
]


class FunctionTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @validator(mode="before")
    @classmethod
    def _a_function(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and (kind := values.get("type")) not in (None, "function"):
            raise PydanticCustomError(
                "tool", "tools of type {kind} are not supported; send functions", {"kind": repr(kind)}
            )
        return values

    @property
    def of_chats(self) -> dict[str, Any]:
        """The tool as chats have it."""
        given = self.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
        return {"type": "function", "function": given}


class NamedFunction(Body):
    """A `tool_choice` that names one of the tools."""

    type: Literal["function"]
    name: str


def _may_follow(before: Mapping[str, Any], message: Mapping[str, Any]) -> bool:
    """Whether it goes on with the turn of the assistant: thought, then text, then calls."""
    order = ("reasoning_content", "content", "tool_calls")
    place = max(order.index(name) for name in before if name in order)
    own = min(order.index(name) for name in message if name in order)
    return place < own or place == own == 2


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

    input: list[InputItem] = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    instructions: str | None = None
    """A system message before all others."""
    max_output_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    text: TextConfig = TextConfig()
    include: list[str] = Field(default_factory=list, fail_fast=True)
    """`LOGPROBS`, or what only tools and reasoning have."""
    top_logprobs: int | None = None
    n: Literal[1] = 1
    prompt_logprobs: None = None  # have no place in a response
    metadata: dict[str, str] = Field(default_factory=dict)
    """Given back."""
    tools: list[FunctionTool] = Field(default_factory=list, fail_fast=True)
    tool_choice: Literal["none", "auto", "required"] | NamedFunction = "auto"
    parallel_tool_calls: bool = True
    _chat: ChatRequest = PrivateAttr()

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

    @validator(mode="after")
    def _a_chat(self) -> Self:
        choice: Any = self.tool_choice
        if isinstance(choice, NamedFunction):
            choice = {"type": "function", "function": {"name": choice.name}}
        try:
            self._chat = ChatRequest.model_validate(
                {
                    "model": self.model,
                    "messages": self._messages,
                    "tools": [tool.of_chats for tool in self.tools],
                    "tool_choice": choice,
                    "parallel_tool_calls": self.parallel_tool_calls,
                }
            )
        except ValidationError as error:
            raise PydanticCustomError("chat", "{said}", {"said": first_message(error)}) from None
        return self

    @property
    def chat(self) -> ChatRequest:
        """The messages and tools, as a chat."""
        return self._chat

    @property
    def _messages(self) -> list[dict[str, Any]]:
        """The messages of a chat. What the assistant thought, said and called in one turn is one message."""
        found: list[dict[str, Any]] = []
        if self.instructions is not None:
            found.append({"role": "system", "content": self.instructions})
        for item in self.input:
            message = item.of_chats
            before = found[-1] if found else {}
            if message["role"] == before.get("role") == "assistant" and _may_follow(before, message):
                calls = [*before.get("tool_calls", ()), *message.get("tool_calls", ())]
                found[-1] = {**before, **message, **({"tool_calls": calls} if calls else {})}
            else:
                found.append(message)
        return [message if "content" in message or "tool_calls" in message else {**message, "content": ""}
                for message in found]  # fmt: skip

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
