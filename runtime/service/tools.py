"""Tools as OpenAI's clients send them, the calls of them in a chat's history, and the calls in an answer."""

import json
import secrets
import string
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic import model_validator as validator
from pydantic_core import PydanticCustomError

_IDENTIFIER = string.ascii_letters + string.digits


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Function(_Form):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON Schema; None: it takes none."""


class Tool(_Form):
    """One of `tools`."""

    type: Literal["function"]
    function: Function
    given: dict[str, Any] = Field(default_factory=dict, repr=False)
    """What the client has sent, for the template."""

    @validator(mode="before")
    @classmethod
    def _as_given(cls, values: Any) -> Any:
        """`strict` is said to us, not to the model."""
        if not isinstance(values, Mapping) or not isinstance(values.get("function"), Mapping):
            return values
        function = {name: value for name, value in values["function"].items() if name != "strict"}
        return {**values, "given": {**values, "function": function}}


class FunctionName(_Form):
    """Which function."""

    name: str


class NamedTool(_Form):
    """A `tool_choice` that names one of the tools."""

    type: Literal["function"]
    function: FunctionName


def _one_message(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError:
        raise PydanticCustomError(
            "tool_choice", 'give none, auto, required, or {"type": "function", "function": {"name": ...}}'
        ) from None


ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedTool, WrapValidator(_one_message)]


class CalledFunction(_Form):
    """What was called."""

    name: str
    arguments: str

    @property
    def parsed(self) -> Any:
        """The arguments as templates want them: an object; as they are where they are no JSON, as of a call cut off."""
        try:
            return json.loads(self.arguments) if self.arguments.strip() else {}
        except (ValueError, RecursionError):
            return self.arguments


class ToolCall(_Form):
    """A call in the history."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"

    @property
    def for_template(self) -> dict[str, Any]:
        """The form that chat templates read."""
        named = {} if self.id is None else {"id": self.id}
        function = {"name": self.function.name, "arguments": self.function.parsed}
        return {**named, "type": self.type, "function": function}


class Tooled(BaseModel):
    """The part of a chat's parameters that is about tools."""

    tools: list[Tool] = Field(default_factory=list, fail_fast=True)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True

    @property
    def offered(self) -> Sequence[Tool]:
        """The tools that the model may call; those that it is not offered are kept from it."""
        return () if self.tool_choice == "none" else self.tools

    @property
    def demanded(self) -> Sequence[Tool]:
        """The tools of which one must be called; none where none must."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        return self.tools if self.tool_choice == "required" else ()

    @validator(mode="after")
    def _a_choice_of_tools(self) -> "Tooled":
        names = [tool.function.name for tool in self.tools]
        if self.tool_choice not in ("none", "auto") and not self.demanded:
            asked = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else "required"
            raise PydanticCustomError(
                "tool_choice", "tool_choice is {asked}, and the tools are {names}; give tools to choose from",
                {"asked": repr(asked), "names": ", ".join(names) or "none"},
            )  # fmt: skip
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise PydanticCustomError("tools", "two tools have the name {name}; rename one", {"name": repr(twice)})
        return self


def call_id(short: bool) -> str:
    """A name for a new call; `short`: of nine letters and digits, as Mistral's templates want it."""
    return "".join(secrets.choice(_IDENTIFIER) for _ in range(9)) if short else f"call_{uuid.uuid4().hex[:24]}"
