"""What the requests of a benchmark ask: real texts, or made-up ones of given lengths, ready to be sent.

The texts in texts.txt were written for this repository: sentences, questions and short prose of 6 to 140 words.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from stageline.models.errors import RequestError
from stageline.models.tokenizer import TextEncoder, padded
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import BATCH, LENGTH
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.engines import Array

_ITEMS = 512  # different requests; a load goes round them


@dataclass(frozen=True)
class Item:
    """One request: rows of tokens, or (where the model reads no tokens) whatever `inputs` holds.

    `texts` are empty where the tokens were made up. `output_tokens`: how many to draw; None: it does not generate.
    """

    texts: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]
    inputs: dict[str, Array]
    output_tokens: int | None

    @property
    def tokens_in(self) -> int:
        """Of all rows, padding left out."""
        return sum(map(len, self.rows))


@dataclass(frozen=True)
class Lengths:
    """Made-up rows of `fewest` to `most` tokens, each length as likely as another."""

    fewest: int
    most: int

    def __str__(self) -> str:
        return f"{self.fewest}" if self.fewest == self.most else f"{self.fewest} to {self.most}"


def built_in_texts() -> list[str]:
    """The texts of this package."""
    return Path(__file__).with_name("texts.txt").read_text().splitlines()


def read_texts(file: Path) -> list[str]:
    """The lines of a file, empty ones left out. RequestError where it cannot be read or holds none."""
    try:
        texts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise RequestError(f"texts {file} cannot be read ({reason}); give a text file with a text a line") from error
    if not texts:
        raise RequestError(f"texts {file} holds no text; give a text file with a text a line")
    return texts


def make_items(
    bundle: Bundle,
    texts: Sequence[str] | Lengths,
    rows: int,
    output_tokens: int | None,
    capacity: int | None,
    seed: int,
) -> tuple[list[Item], str]:
    """Requests of `rows` texts each, in random order, and what they are in words.

    `capacity`: tokens that a prompt and its continuation may have together; texts are cut to what fits. RequestError
    where made-up lengths do not fit the model.
    """
    manifest = bundle.manifest
    signature = Signature.of(manifest)
    draw = random.Random(seed)
    most = min(filter(None, (manifest.max_positions, capacity and capacity - (output_tokens or 0))), default=2**31)
    if most < 1:
        raise RequestError(f"{output_tokens} new tokens leave no room for a prompt in {capacity} tokens; ask for fewer")
    names = [spec.name for spec in signature.inputs]
    if "input_ids" not in names:
        noise = np.random.default_rng(seed)
        items = [Item((), (), _noise(signature, rows, noise), None) for _ in range(8)]
        return items, f"{rows} random inputs each"
    if isinstance(texts, Lengths):
        if texts.most > most:
            raise RequestError(f"{texts.most} tokens are asked for, at most {most} fit; give shorter lengths")
        vocabulary = manifest.vocabulary or 2
        made = [
            [tuple(draw.choices(range(vocabulary), k=draw.randint(texts.fewest, texts.most))) for _ in range(rows)]
            for _ in range(_ITEMS)
        ]
        words = f"{rows} x {texts} random tokens" if rows > 1 else f"{texts} random tokens"
        return [_item(names, (), one, bundle, output_tokens) for one in made], words
    if manifest.text is None:
        raise RequestError(f"bundle {bundle.path} has no tokenizer, so it reads no texts; give --lengths")
    most = min(most, manifest.text.max_length)
    encoder = TextEncoder.open(bundle.path / manifest.text.tokenizer, manifest.text.max_length, manifest.text.pad_id)
    tokens = {text: tuple(encoder.ids(text)[:most]) for text in texts}
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
