"""A served model: an open pipeline under a name."""

import json
import time
from dataclasses import dataclass, field
from functools import cached_property

from stageline.models.errors import BundleError
from stageline.models.tokenizer import TextEncoder
from stageline.runtime.bundle.manifest import EMBEDDING
from stageline.runtime.generation.answer import THOUGHT
from stageline.runtime.generation.tool_formats import ToolFormat, tool_format
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.service.errors import ApiError


@dataclass(frozen=True, eq=False)
class Model:
    """A pipeline and its name. BundleError if it can neither generate, embed nor classify, or has no tokenizer."""

    name: str
    pipeline: Pipeline
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        manifest = self.pipeline.bundle.manifest
        if not (self.generates or self.embeds or self.classifies):
            raise BundleError(
                f"bundle {self.pipeline.bundle.path} can neither generate, embed nor classify texts: "
                f"{manifest.no_generation_reason}; "
                "run it from Python: Pipeline.open(...).run(...)"
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
        """Whether it answers embeddings."""
        return any(spec.name == EMBEDDING for spec in self.pipeline.signature.outputs)

    @property
    def classifies(self) -> bool:
        """Whether it answers classifications, or ranks documents."""
        return self.pipeline.bundle.manifest.task == "text-classification"

    @property
    def scores(self) -> bool:
        """Whether it answers what compares two texts."""
        return self.classifies or self.embeds

    @property
    def pools(self) -> bool:
        """Whether it answers with what it computes of a text."""
        return self.classifies or self.embeds

    @property
    def routes(self) -> str:
        """Where to send requests."""
        if self.generates:
            return "generates; send requests to /v1/chat/completions or /v1/completions"
        if self.classifies:
            return "classifies; send requests to /classify or /rerank"
        return "embeds; send requests to /v1/embeddings, /score or /rerank"

    @property
    def encoder(self) -> TextEncoder:
        """Its tokenizer."""
        encoder = self.pipeline.encoder
        assert encoder is not None
        return encoder

    @property
    def length(self) -> int:
        """Max tokens: of a prompt and its output together, or of a text to embed."""
        return self.pipeline.capacity or self.encoder.max_length

    def fitting(self, tokens: list[int]) -> list[int]:
        """The same tokens. ApiError with the code that OpenAI's clients look for if they do not fit."""
        self._check(len(tokens), f"{len(tokens)} tokens were given")
        return tokens

    def perhaps_fitting(self, text: str) -> str:
        """The same text. ApiError as above if it is plain, before it is made tokens, that it does not fit."""
        least = self.encoder.least(text)
        self._check(least, f"{least} tokens at least were given")
        return text

    def _check(self, tokens: int, said: str) -> None:
        if tokens > self.length:
            included = ", the output included" if self.generates else ""
            message = f"{said}, {self.name} takes at most {self.length}{included}; shorten the text"
            raise ApiError(400, message, code="context_length_exceeded")

    @property
    def temperature(self) -> float:
        """That of requests which give none: the checkpoint's, or OpenAI's."""
        stated = self.pipeline.bundle.manifest.generation_defaults.temperature
        return 1.0 if stated is None else stated

    @cached_property
    def tool_format(self) -> ToolFormat:
        """How it writes calls of tools. RequestError if it cannot, or in a way that is not known."""
        return tool_format(self.pipeline.chat_template.source(tools=True))

    @cached_property
    def reasons(self) -> bool:
        """Whether it may reason before it answers, by its tokens or its chat template."""
        return THOUGHT in self.encoder.added or THOUGHT in self.pipeline.chat_template.source(tools=False)

    def special_name(self, token: int) -> str | None:
        """The name of a special token, which has no text; None for others."""
        return self._special.get(token)

    def token_text(self, token: int) -> str:
        """The text of a token in the middle of a text."""
        # Some decoders drop the space before a text's first token.
        once, twice = self.encoder.decode([token]), self.encoder.decode([token, token])
        return twice[len(once) :]

    @cached_property
    def _special(self) -> dict[int, str]:
        text = self.pipeline.bundle.manifest.text
        assert text is not None
        entries = json.loads((self.pipeline.bundle.path / text.tokenizer).read_bytes()).get("added_tokens") or ()
        return {entry["id"]: entry["content"] for entry in entries if entry.get("special")}
