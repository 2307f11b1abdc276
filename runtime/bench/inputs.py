"""The requests of a benchmark, ready to send: real texts, or random tokens of given lengths.

The texts in texts.txt were written for this repository: sentences, questions and short prose of 6 to 140 words.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from stageline.models.errors import RequestError
from stageline.models.tokenizer import padded
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
    """

    texts: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]
    inputs: dict[str, Array]
    output_tokens: int | None

    @property
    def tokens_in(self) -> int:
        """Tokens of all rows, without padding."""
        return sum(map(len, self.rows))


@dataclass(frozen=True)
class Lengths:
    """Random rows of `min` to `max` tokens, all lengths equally likely."""

    min: int
    max: int

    def __str__(self) -> str:
        return f"{self.min}" if self.min == self.max else f"{self.min} to {self.max}"


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


def make_items(
    bundle: Bundle,
    texts: Sequence[str] | Lengths,
    rows: int,
    output_tokens: int | None,
    capacity: int | None,
    seed: int,
) -> tuple[list[Item], str]:
    """Requests of `rows` texts each, in random order, and a description of them.

    `capacity`: max tokens of a prompt with its continuation; texts are cut to fit. RequestError if `Lengths` do not
    fit the model.
    """
    manifest = bundle.manifest
    signature = Signature.of(manifest)
    draw = random.Random(seed)
    limit = min(filter(None, (manifest.max_positions, capacity and capacity - (output_tokens or 0))), default=2**31)
    if limit < 1:
        raise RequestError(f"{output_tokens} new tokens leave no room for a prompt in {capacity} tokens; ask for fewer")
    names = [spec.name for spec in signature.inputs]
    if "input_ids" not in names:
        noise = np.random.default_rng(seed)
        items = [Item((), (), _noise(signature, rows, noise), None) for _ in range(8)]
        return items, f"{rows} random inputs each"
    if isinstance(texts, Lengths):
        if texts.max > limit:
            raise RequestError(f"{texts.max} tokens are asked for, at most {limit} fit; give shorter lengths")
        vocabulary = manifest.vocabulary or 2
        made = [
            [tuple(draw.choices(range(vocabulary), k=draw.randint(texts.min, texts.max))) for _ in range(rows)]
            for _ in range(_ITEMS)
        ]
        words = f"{rows} x {texts} random tokens" if rows > 1 else f"{texts} random tokens"
        return [_item(names, (), one, bundle, output_tokens) for one in made], words
    encoder = open_encoder(bundle)
    if encoder is None:
        raise RequestError(f"bundle {bundle.path} has no tokenizer and cannot read texts; give --lengths")
    limit = min(limit, encoder.max_length)
    tokens = {text: tuple(encoder.ids(text)[:limit]) for text in texts}
    chosen = [draw.choices([text for text in texts if tokens[text]], k=rows) for _ in range(_ITEMS)]
    items = [_item(names, one, [tokens[text] for text in one], bundle, output_tokens) for one in chosen]
    return items, f"{rows} of {len(texts)} texts each" if rows > 1 else f"{len(texts)} texts"


def _item(
    names: Sequence[str], texts: Sequence[str], rows: Sequence[tuple[int, ...]], bundle: Bundle, new: int | None
) -> Item:
    ids, mask = padded(rows, bundle.manifest.text.pad_id if bundle.manifest.text else 0)
    made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return Item(tuple(texts), tuple(rows), {name: made[name] for name in names if name in made}, new)


def _noise(signature: Signature, rows: int, draw: np.random.Generator) -> dict[str, Array]:
    sizes = {BATCH: rows, LENGTH: 64}
    return {
        spec.name: draw.standard_normal([sizes.get(d, 64) if isinstance(d, str) else d for d in spec.shape], np.float32)
        for spec in signature.inputs
    }
