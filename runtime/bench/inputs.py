"""The requests of a benchmark, ready to send: real texts, random tokens of given lengths, a file's conversations.

The texts in texts.txt were written for this repository: sentences, questions and short prose of 6 to 140 words.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from stageline.models.errors import RequestError
from stageline.models.tokenizer import padded
from stageline.runtime.bench.lengths import Lengths
from stageline.runtime.bench.workload_file import WorkloadFile
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import BATCH, LENGTH
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.engines import Array
from stageline.runtime.generation.text_model import open_encoder

_ITEMS = 512  # different requests, sent round and round


@dataclass(frozen=True)
class Item:
    """One request: rows of tokens, or only `inputs` if the model reads no tokens.

    `texts` is empty if the tokens are random. `output_tokens`: how many to draw; None: the model does not generate.
    `then`: the next turn of the same conversation, which waits for the answer to this one and its own `delay_s`.
    """

    texts: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]
    inputs: dict[str, Array]
    output_tokens: int | None
    then: "Item | None" = None
    delay_s: float = 0.0

    @property
    def tokens_in(self) -> int:
        """Tokens of all rows, without padding."""
        return sum(map(len, self.rows))


def built_in_texts() -> list[str]:
    """The texts in texts.txt."""
    return Path(__file__).with_name("texts.txt").read_text().splitlines()


def read_texts(file: Path) -> list[str]:
    """The non-empty lines of a file. RequestError if it cannot be read or has none."""
    try:
        texts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise RequestError(
            f"texts {file} cannot be read ({reason}); give a text file with one text per line"
        ) from error
    if not texts:
        raise RequestError(f"texts {file} holds no text; give a text file with one text per line")
    return texts


@dataclass(frozen=True)
class Prefixes:
    """`count` different beginnings of `tokens` random tokens each; every conversation begins with one of them."""

    count: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `4x256`: four prefixes of 256 tokens. RequestError otherwise."""
        match = re.fullmatch(r"(\d{1,6})x(\d{1,9})", text.strip())
        if match is None or not (int(match[1]) and int(match[2])):
            raise RequestError(f"{text!r} is not prefixes; give their number and length in tokens, like 4x256")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class Shape:
    """The requests of a run, beyond what they read. `rows`: texts in each, for models that do not generate.

    For models that do: `output_tokens` to draw; `turns` of a conversation, each sent `turn_delay_s` after the answer to
    the one before, whose prompt it repeats; shared `prefixes`.
    """

    rows: int = 1
    output_tokens: Lengths | None = None
    turns: int = 1
    turn_delay_s: float = 0.0
    prefixes: Prefixes | None = None


class Maker:
    """Makes the requests of a bundle's model, from a seed. `capacity`: max tokens of a prompt with its continuation."""

    def __init__(self, bundle: Bundle, shape: Shape, capacity: int | None, seed: int) -> None:
        self._bundle, self._shape, self._seed = bundle, shape, seed
        self._signature = Signature.of(bundle.manifest)
        self._names = [spec.name for spec in self._signature.inputs]
        self._draw = random.Random(seed)
        self._most = min(filter(None, (bundle.manifest.max_positions, capacity)), default=2**31)
        self._encoder = open_encoder(bundle)
        if shape.output_tokens is not None and shape.output_tokens.max >= self._most:
            raise RequestError(
                f"{shape.output_tokens.max} new tokens leave no room for a prompt in {self._most} tokens; ask for fewer"
            )

    def items(self, source: Sequence[str] | Lengths | WorkloadFile) -> tuple[list[Item], str]:
        """Requests with texts, random tokens of these lengths, or a file's prompts, and a description of them.

        Texts are cut to fit the model. RequestError if what is asked for does not fit it.
        """
        if "input_ids" not in self._names:
            noise = np.random.default_rng(self._seed)
            items = [Item((), (), _noise(self._signature, self._shape.rows, noise), None) for _ in range(8)]
            return items, f"{self._shape.rows} random inputs each"
        if isinstance(source, WorkloadFile):
            return self._of_file(source)
        if self._shape.turns > 1 or self._shape.prefixes is not None:
            return self._conversations(source)
        return self._of_texts(source) if not isinstance(source, Lengths) else self._of_lengths(source)

    def of_trace(self, lengths: Sequence[tuple[int, int]]) -> list[Item]:
        """Requests of random tokens with these lengths of prompt and continuation. RequestError if one does not fit."""
        generates = self._shape.output_tokens is not None
        for number, (read, drawn) in enumerate(lengths, 1):
            if read + (drawn if generates else 0) > self._most:
                raise RequestError(
                    f"request {number} of the trace has {read} and {drawn} tokens, at most {self._most} fit; shorten it"
                )
        return [self._item((), [self._random(read)], drawn if generates else None) for read, drawn in lengths]

    def _of_lengths(self, lengths: Lengths) -> tuple[list[Item], str]:
        self._check_fits(lengths.max)
        rows = self._shape.rows
        made = [[self._random(lengths.draw(self._draw)) for _ in range(rows)] for _ in range(_ITEMS)]
        words = f"{rows} x {lengths} random tokens" if rows > 1 else f"{lengths} random tokens"
        return [self._item((), one, self._new_tokens()) for one in made], words + self._new_words()

    def _of_texts(self, texts: Sequence[str]) -> tuple[list[Item], str]:
        tokens, rows = self._tokens(texts), self._shape.rows
        known = [text for text in texts if tokens[text]]
        chosen = [self._draw.choices(known, k=rows) for _ in range(_ITEMS)]
        items = [self._item(one, [tokens[text] for text in one], self._new_tokens()) for one in chosen]
        return items, (f"{rows} of {len(texts)} texts each" if rows > 1 else f"{len(texts)} texts") + self._new_words()

    def _conversations(self, source: Sequence[str] | Lengths) -> tuple[list[Item], str]:
        """Conversations of random tokens, or texts, after shared prefixes. What a model answers is not known
        beforehand: random tokens stand for it in later turns."""
        turns, shared, new = self._shape.turns, self._shape.prefixes, self._shape.output_tokens
        assert new is not None
        before = (shared.tokens if shared else 0) + (turns - 1) * new.max
        if isinstance(source, Lengths):
            self._check_fits(before + turns * source.max)
            made = [[self._random(source.draw(self._draw)) for _ in range(turns)] for _ in range(_ITEMS)]
            words = f"{source} random tokens"
        else:
            tokens = self._tokens(source)
            self._check_fits(before + turns * max(map(len, tokens.values())))
            known = [row for row in tokens.values() if row]
            made, words = [self._draw.choices(known, k=turns) for _ in range(_ITEMS)], f"{len(source)} texts"
        beginnings = [self._random(shared.tokens) for _ in range(shared.count)] if shared else [()]
        items = []
        for said in made:
            row, rows = self._draw.choice(beginnings), []
            for one in said:
                tokens_out = new.draw(self._draw)
                rows.append((row + one, (), tokens_out))
                row = row + one + self._random(tokens_out)
            items.append(self._chain(rows))
        words += f" after one of {shared.count} prefixes of {shared.tokens} tokens" if shared else ""
        words += f", {turns} turns with {self._shape.turn_delay_s:g} s between" if turns > 1 else ""
        return items, words + self._new_words()

    def _of_file(self, file: WorkloadFile) -> tuple[list[Item], str]:
        if self._encoder is None:
            raise RequestError(f"bundle {self._bundle.path} has no tokenizer and cannot read texts; give --lengths")
        chosen = self._draw.sample(file.conversations, min(_ITEMS, len(file.conversations)))
        items, too_long = [], 0
        for conversation in chosen:
            rows: list[tuple[tuple[int, ...], tuple[str, ...], int | None]] = []
            said: list[str] = []
            for turn in conversation:
                text = "\n".join([*said, turn.prompt])
                said += [turn.prompt, turn.answer or ""]
                row, new = tuple(self._encoder.ids(text)), self._new_tokens()
                if new is not None:
                    answer = len(self._encoder.ids(turn.answer, special=False)) if turn.answer else None
                    new = turn.output_tokens or answer or new
                if not row or len(row) + (new or 0) > min(self._most, self._encoder.max_length):
                    too_long += 1
                    break
                rows.append((row, (text,), new))
            items += [self._chain(rows)] if rows else []
        if not items:
            raise RequestError(f"no prompt of {file.name} fits the model's {self._most} tokens; give shorter ones")
        left = [f"{file.left_out} entries have no answered question" if file.left_out else "",
                f"{too_long} conversations end early, being too long for the model" if too_long else ""]  # fmt: skip
        words = f"{len(items)} of {len(file.conversations)} conversations of {file.name}"
        return items, f"{words}{''.join(f'; {one}' for one in left if one)}"

    def _chain(self, turns: Sequence[tuple[tuple[int, ...], tuple[str, ...], int | None]]) -> Item:
        """Requests as the turns of one conversation."""
        then: Item | None = None
        for number, (row, texts, new) in reversed(list(enumerate(turns))):
            item = self._item(texts, [row], new)
            then = replace(item, then=then, delay_s=self._shape.turn_delay_s if number else 0.0)
        assert then is not None
        return then

    def _tokens(self, texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
        if self._encoder is None:
            raise RequestError(f"bundle {self._bundle.path} has no tokenizer and cannot read texts; give --lengths")
        limit = min(self._limit(), self._encoder.max_length)
        return {text: tuple(self._encoder.ids(text)[:limit]) for text in texts}

    def _limit(self) -> int:
        """Max tokens of a prompt."""
        new = self._shape.output_tokens
        return self._most - (new.max if new else 0)

    def _check_fits(self, tokens: int) -> None:
        if tokens > self._limit():
            raise RequestError(f"{tokens} tokens are asked for, at most {self._limit()} fit; give shorter lengths")

    def _new_tokens(self) -> int | None:
        new = self._shape.output_tokens
        return None if new is None else new.draw(self._draw)

    def _new_words(self) -> str:
        new = self._shape.output_tokens
        return f", {new} tokens drawn" if new is not None and new.min != new.max else ""

    def _random(self, count: int) -> tuple[int, ...]:
        return tuple(self._draw.choices(range(self._bundle.manifest.vocabulary or 2), k=count))

    def _item(self, texts: Sequence[str], rows: Sequence[tuple[int, ...]], new: int | None) -> Item:
        text = self._bundle.manifest.text
        ids, mask = padded(rows, text.pad_id if text else 0)
        made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        return Item(tuple(texts), tuple(rows), {name: made[name] for name in self._names if name in made}, new)


def _noise(signature: Signature, rows: int, draw: np.random.Generator) -> dict[str, Array]:
    sizes = {BATCH: rows, LENGTH: 64}
    return {
        spec.name: draw.standard_normal([sizes.get(d, 64) if isinstance(d, str) else d for d in spec.shape], np.float32)
        for spec in signature.inputs
    }
