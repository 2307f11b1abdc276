"""What a request turned out to be, noted where it is known for whoever observes the request from outside."""

from contextvars import ContextVar
from dataclasses import dataclass, field

from stageline.runtime.generation.request import GenerationRequest
from stageline.runtime.generation.stream import Generation


@dataclass
class Noted:
    """The model that was asked, and what it was asked to generate."""

    model: str | None = None
    generations: list[tuple[GenerationRequest, Generation]] = field(default_factory=list)


NOTED: ContextVar[Noted | None] = ContextVar("noted", default=None)
"""None where nobody observes."""


def note_model(name: str) -> None:
    """The request asks this model."""
    noted = NOTED.get()
    if noted is not None:
        noted.model = name


def note_generation(request: GenerationRequest, generation: Generation) -> None:
    """The request has started this."""
    noted = NOTED.get()
    if noted is not None:
        noted.generations.append((request, generation))
