"""A model that is served: an open pipeline under a name, and what the service wants to know of it."""

import json
import time
from dataclasses import dataclass, field
from functools import cached_property

from stageline.models.errors import BundleError
from stageline.models.tokenizer import TextEncoder
from stageline.runtime.bundle.manifest import EMBEDDING
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.service.errors import ApiError


@dataclass(frozen=True, eq=False)
class Model:
    """BundleError where the pipeline neither generates nor embeds, or has no tokenizer."""

    name: str
    pipeline: Pipeline
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        manifest = self.pipeline.bundle.manifest
        if not self.generates and not self.embeds:
            why = manifest.trace.partition("no KV cache, since ")[2] or f"its task is {manifest.task}"
            raise BundleError(
                f"bundle {self.pipeline.bundle.path} can be served neither as a generating model nor as an embedding "
                f"one: {why}; run it from Python: Pipeline.open(...).run(...)"
            )
        if manifest.text is None:
            raise BundleError(
                f"bundle {self.pipeline.bundle.path} has no tokenizer, so it cannot be served; "
                "export it from a checkpoint that has one"
            )

    @property
    def generates(self) -> bool:
        """Whether it answers chats and completions."""
        return self.pipeline.capacity is not None

    @property
    def embeds(self) -> bool:
        """Whether it gives embeddings."""
        return any(spec.name == EMBEDDING for spec in self.pipeline.signature.outputs)

    @property
    def encoder(self) -> TextEncoder:
        """Its tokenizer."""
        encoder = self.pipeline.encoder
        assert encoder is not None
        return encoder

    @property
    def length(self) -> int:
        """Tokens that fit: a prompt with its continuation, or a text to be embedded."""
        return self.pipeline.capacity or self.encoder.max_length

    def fitting(self, tokens: list[int]) -> list[int]:
        """These tokens, if they fit. ApiError with the code that OpenAI's clients look for otherwise."""
        if len(tokens) > self.length:
            told = f"{len(tokens)} tokens were given, {self.name} takes at most {self.length}"
            with_what = ", the continuation included" if self.generates else ""
            raise ApiError(400, f"{told}{with_what}; shorten the text", code="context_length_exceeded")
        return tokens

    def token_text(self, token: int) -> str:
        """The text of a token as it is in the middle of a text; a special one's name."""
        if token in self._special:
            return self._special[token]
        # Some decoders drop the space before the first token of all.
        once, twice = self.encoder.decode([token]), self.encoder.decode([token, token])
        return twice[len(once) :]

    @cached_property
    def _special(self) -> dict[int, str]:
        text = self.pipeline.bundle.manifest.text
        assert text is not None
        entries = json.loads((self.pipeline.bundle.path / text.tokenizer).read_bytes()).get("added_tokens") or ()
        return {entry["id"]: entry["content"] for entry in entries if entry.get("special")}
