"""What generation needs to know of a model, and prompts as its token ids."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np
from stageline.models.errors import RequestError
from stageline.models.tokenizer import TextEncoder
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import GenerationDefaults, RowScaling
from stageline.runtime.generation.grammars import Grammars
from stageline.runtime.generation.reasoned import ReasonedMatcher, RowMatcher
from stageline.runtime.generation.request import Sampling
from stageline.runtime.generation.settings import Settings, decide
from stageline.runtime.generation.structure import Structure


@dataclass(frozen=True)
class TextModel:
    """A model that generates: its tokens are below `vocabulary`, those of `defaults.end_ids` end a text."""

    vocabulary: int
    defaults: GenerationDefaults
    encoder: TextEncoder | None
    """None: prompts are token ids, and the text of what comes is empty."""
    row_scaling: RowScaling | None = None
    max_positions: int | None = None

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        """The model of a bundle that generates. CheckpointError if its tokenizer is broken."""
        manifest = bundle.manifest
        logits = next(spec for spec in manifest.outputs if spec.name == "logits")
        defaults = manifest.generation_defaults
        return cls(int(logits.shape[-1]), defaults, open_encoder(bundle), manifest.row_scaling, manifest.max_positions)

    def prompt_ids(self, prompt: str | Sequence[int], capacity: int, special: bool = True) -> list[int]:
        """A prompt as token ids; `special`: with the tokens that the tokenizer adds to a text. RequestError where it is
        empty, of more than `capacity` tokens, or of tokens that the model does not have."""
        if isinstance(prompt, str):
            if self.encoder is None:
                raise RequestError("this bundle has no tokenizer; give the prompt as token ids")
            ids = self.encoder.ids(prompt, special)
        else:
            ids = list(prompt)
            for place, token in enumerate(ids):
                if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
                    raise RequestError(f"token {place} of the prompt is {token!r}; give whole numbers")
            ids = [int(token) for token in ids]
        for place, token in enumerate(ids):  # of a text as well: a tokenizer may have tokens that the model has not
            if not 0 <= token < self.vocabulary:
                raise RequestError(
                    f"token {place} of the prompt is {token}, outside the vocabulary "
                    f"(0 to {self.vocabulary - 1}); tokenize with the tokenizer of this bundle"
                )
        if not ids:
            raise RequestError("the prompt has no tokens; give a text with some")
        if len(ids) > capacity:
            more = self.max_positions is None or capacity < self.max_positions
            raise RequestError(
                f"the prompt has {len(ids)} tokens, a cache slot holds {capacity}"
                + ("; shorten it, or open with a larger capacity" if more else ", as many as the model; shorten it")
            )
        return ids

    def settings(self, asked: Sampling, prompt_tokens: int) -> Settings:
        """What is asked, completed from the checkpoint's defaults. RequestError for a bias on a token outside the
        vocabulary, or a prompt that leaves no room below the checkpoint's limit."""
        for sequence, _ in asked.sequence_bias or ():
            if max(sequence) >= self.vocabulary:
                raise RequestError(
                    f"a bias is given for token {max(sequence)}, outside the vocabulary (0 to {self.vocabulary - 1})"
                )
        return decide(asked, self.defaults, prompt_tokens)

    def matcher(self, structure: Structure | None) -> RowMatcher | None:
        """What the choices of a request of this structure start from; see `Grammars.matcher`."""
        if structure is None:
            return None
        if self._grammars is None:
            raise RequestError("this bundle has no tokenizer, so its texts can have no structure")
        matcher = self._grammars.matcher(replace(structure, after=None))
        if structure.after is None:
            return matcher
        return ReasonedMatcher(matcher, structure.after, np.array(self.defaults.end_ids, np.int64))

    @cached_property
    def _grammars(self) -> Grammars | None:
        return None if self.encoder is None else Grammars(self.encoder, self.vocabulary, self.defaults.end_ids)


def open_encoder(bundle: Bundle) -> TextEncoder | None:
    """The bundle's tokenizer, if it has one. CheckpointError if it is broken."""
    text = bundle.manifest.text
    if text is None:
        return None
    return TextEncoder.open(
        bundle.path / text.tokenizer,
        text.max_length,
        text.pad_id,
        truncation_side=text.truncation_side,
        token_types=text.token_types,
        prompts=text.prompts,
        default_prompt=text.default_prompt,
    )
