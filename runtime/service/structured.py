"""How clients ask for a text of a certain structure: OpenAI's `response_format`, vLLM's `structured_outputs`."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field
from pydantic import model_validator as validator
from pydantic_core import PydanticCustomError
from stageline.models.errors import RequestError
from stageline.runtime.generation.structure import Structure


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class NamedSchema(_Form):
    """A schema as OpenAI's clients send it. It is always followed, `strict` or not."""

    schema_: dict[str, Any] | None = Field(None, alias="schema")
    """None: any JSON object."""
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Form):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @validator(mode="after")
    def _schema_where_one_is_meant(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("json_schema", "give json_schema with the type json_schema, and only with it")
        return self

    @property
    def structure(self) -> Structure | None:
        """None for any text."""
        if self.json_schema is not None and self.json_schema.schema_ is not None:
            return Structure.json_schema(self.json_schema.schema_)
        return None if self.type == "text" else Structure.json_object()


class StructuredOutputs(_Form):
    """vLLM's `structured_outputs`: one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    @validator(mode="after")
    def _one_of_them(self) -> Self:
        if len([value for _, value in self if value not in (None, False)]) != 1:
            raise PydanticCustomError("structured_outputs", "give one of json, regex, choice, grammar and json_object")
        return self

    @property
    def structure(self) -> Structure:
        """What is asked."""
        if self.json_ is not None:
            return Structure.json_schema(self.json_)
        if self.regex is not None:
            return Structure.regex(self.regex)
        if self.choice is not None:
            return Structure.choice(self.choice)
        if self.grammar is not None:
            return Structure.grammar(self.grammar)
        return Structure.json_object()


def structure(format_: ResponseFormat | None, outputs: StructuredOutputs | None) -> Structure | None:
    """What a request asks for. RequestError if it asks twice, or for what is no structure."""
    formatted = None if format_ is None else format_.structure
    if outputs is None:
        return formatted
    if formatted is not None:
        raise RequestError("response_format and structured_outputs both ask for a structure; give one of them")
    return outputs.structure
