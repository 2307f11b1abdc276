"""A continuation of a prompt, and the slot that it runs in.

slot.tokens[:slot.count]  what the slot's row holds once the issued steps are done; kept after its continuation ends
                          where rows have their slots to themselves, for prompts that begin alike
slot.made_for[:slot.count]  the kind of row that the keys of these tokens are made for (RowScaling; 0 without)
continuation.computed     == slot.count while it lives: the tokens issued; the next step begins there
"""

import sys
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from stageline.runtime.generation.lookup import Lookup


@dataclass(eq=False, slots=True)
class Continuation:
    """One choice of a running request: its `tokens` so far, `prompt_length` of which were given.

    `leader` is the choice of the same request whose cache it copies the prompt from; it is admitted after that one.
    """

    tokens: list[int]
    prompt_length: int
    leader: "Continuation | None" = None
    scores: bool = False
    """Whether the logits of all tokens of the prompt are wanted. It shares no beginning with other rows."""
    priority: int = 0
    """Of those that wait the lowest goes first."""
    lookup: Lookup | None = None
    """What drafts its next tokens, if steps may compute drafts for it."""
    most: int = sys.maxsize
    """Tokens that it may have in all."""
    draft: list[int] = field(default_factory=list)
    """What a step under way computes after `tokens`, as if it were known."""
    slot: "Slot | None" = None
    computed: int = 0
    scored: int = 0
    """Tokens of the prompt, from the first on, whose logits are in a step if it `scores`."""
    shared: int = 0
    """Tokens of the prompt that were found in a cache."""
    placed_at: int = 0
    """The step before which it was given its slot."""
    flying: int = 0
    """Steps under way that compute tokens of it."""
    ended: bool = False
    prefill_length: int = field(init=False)
    """Tokens that prefill computes: those of the prompt, or all that there were when it had to begin again."""

    def __post_init__(self) -> None:
        self.prefill_length = self.prompt_length

    def between(self, start: int, end: int) -> list[int]:
        """Its tokens from `start` to `end` - 1, the draft included."""
        count = len(self.tokens)
        return self.tokens[start:end] + self.draft[max(0, start - count) : max(0, end - count)]

    def goes_as_drafted(self, depth: int, token: int | None) -> bool:
        """Whether it goes on with a token that its draft has at the place `depth`, so that what follows is computed."""
        return not self.ended and depth < len(self.draft) and self.draft[depth] == token

    @property
    def prompt_issued(self) -> bool:
        """Whether every token that prefill computes is in a step."""
        return self.computed >= self.prefill_length


@dataclass(eq=False, slots=True)
class Slot:
    """A row of the caches, and what they hold of it once the issued steps are done."""

    number: int
    group: int
    tokens: NDArray[np.int64]
    made_by: NDArray[np.int64]
    """The step that computes each of `tokens`, in whichever slot they were computed first."""
    made_for: NDArray[np.int64]
    count: int = 0
    continuation: Continuation | None = None
    used_at: int = 0
    blocks: list[int] = field(default_factory=list)
    """Where its tokens lie, if the caches are blocks."""
