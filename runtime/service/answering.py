"""How a chat's answer is to be read and bound, by what is asked and what the model's template has begun."""

from dataclasses import dataclass, replace
from typing import Any, Self

from stageline.models.errors import RequestError
from stageline.runtime.generation.answer import THINK, THOUGHT, AnswerReader
from stageline.runtime.generation.structure import Reasoning, Structure
from stageline.runtime.generation.tool_formats import ToolFormat, calls
from stageline.runtime.service.model import Model
from stageline.runtime.service.schema import ChatRequest
from stageline.runtime.service.tools import NamedTool

_TAIL_TOKENS = 16  # of a prompt, in which its template may begin the reasoning


@dataclass(frozen=True)
class Answering:
    """What one chat's choices are, beside plain text."""

    form: ToolFormat | None
    """How calls are written; None: there are none."""
    names: tuple[str, ...]
    several: bool
    reasons: bool | None
    """Whether the prompt has begun the reasoning; None: the model has none."""
    structure: Structure | None
    shown: tuple[int, ...]
    """The special tokens that tell the parts of an answer apart."""

    @classmethod
    def of(
        cls, model: Model, body: ChatRequest, form: ToolFormat | None, prompt: list[int], asked: Structure | None
    ) -> Self:
        """`form`: how calls are written, where tools are offered. `asked`: the structure of the content. RequestError
        for schemas that cannot be followed, or what cannot be had together."""
        several = body.parallel_tool_calls and not isinstance(body.tool_choice, NamedTool)
        reasons = _begun(model, body, prompt) if model.reasons else None
        structure = asked if form is None else _of_calls(model, body, form, several, asked)
        if structure is not None and reasons is not None:
            structure = _after_reasoning(model, structure, reasons)
        tags = "" if reasons is None else f"{THINK} {THOUGHT}"
        added = model.encoder.added
        texts = [text for text in added if text in f"{tags} {form.tags if form else ''}"]
        shown = tuple(added[text] for text in texts if model.encoder.leaves_out(added[text]))
        names = tuple(tool.function.name for tool in body.offered)
        return cls(form, names, several, reasons, structure, shown)

    @property
    def plain(self) -> bool:
        """Whether the text is the content."""
        return self.form is None and self.reasons is None

    @property
    def sampling(self) -> dict[str, Any]:
        """Keywords for the runtime's `Sampling`."""
        return {"structure": self.structure, "shown_token_ids": self.shown}

    def reader(self) -> AnswerReader:
        """What takes one choice apart."""
        return AnswerReader(self.form, self.names, self.several, self.reasons)


def _of_calls(
    model: Model, body: ChatRequest, form: ToolFormat, several: bool, asked: Structure | None
) -> Structure | None:
    """What the text must be so that calls come where they must and the content is of its structure."""
    if body.demanded and asked is not None:
        raise RequestError("tool_choice and a structure of the answer exclude each other; give one of them")
    if not body.demanded and asked is None:
        return None
    tools = [tool.function.model_dump() for tool in body.demanded or body.offered]
    return calls(form, tools, model.encoder, several, asked)


def _begun(model: Model, body: ChatRequest, prompt: list[int]) -> bool:
    """Whether the prompt ends in reasoning."""
    if body.continue_final_message:
        content = str(body.messages[-1].for_template.get("content", ""))
        return content.rfind(THINK) > content.rfind(THOUGHT)
    return model.encoder.decode(prompt[-_TAIL_TOKENS:], special=True).rstrip().endswith(THINK)


def _after_reasoning(model: Model, structure: Structure, begun: bool) -> Structure:
    begin, end = model.encoder.token(THINK), model.encoder.token(THOUGHT)
    if begin is not None and end is not None:
        return replace(structure, after=Reasoning(begin, end, begun))
    if begun:
        raise RequestError(
            f"this model reasons before it answers, and its tokenizer has no token {THOUGHT!r}, so no structure can "
            "begin there; ask for none and for no certain tool"
        )
    return structure
