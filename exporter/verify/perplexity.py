"""What a bundle's numbers cost in quality: the perplexity of texts, beside that of the float checkpoint.

Perplexity is exp of the mean of -ln p(token | the tokens before it). A text longer than a window is read in windows
that begin half a window apart. Each token but a text's first counts once, in the first window that holds it, so that
in a later window at least half of it is before the token. The texts in evaluation.txt were written for this repository.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from stageline.exporter.verify.against_torch import load_reference
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import RequestError
from stageline.runtime.bench.quality import next_tokens
from stageline.runtime.engines import Array
from stageline.runtime.options import PipelineOptions
from stageline.runtime.pipeline import Pipeline

WINDOW = 512
"""Tokens of a window, if the model places as many."""


@dataclass(frozen=True)
class Window:
    """A row of tokens, and the place of the first of them that counts."""

    tokens: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of `tokens` tokens of `texts` texts, read in windows of up to `window`. With a reference: its
    perplexity, and the share of the tokens for which both have the same likeliest one."""

    texts: int
    tokens: int
    window: int
    perplexity: float
    reference_perplexity: float | None = None
    agreement: float | None = None

    @property
    def increase(self) -> float | None:
        """How much more than the reference's it is, as a fraction of that."""
        return None if self.reference_perplexity is None else self.perplexity / self.reference_perplexity - 1


def evaluation_texts() -> list[str]:
    """The texts in evaluation.txt."""
    return Path(__file__).with_name("evaluation.txt").read_text(encoding="utf-8").splitlines()


def perplexity(
    bundle: Path,
    against: Path | None,
    texts: Sequence[str],
    options: PipelineOptions,
    progress: Callable[[str], None] = lambda step: None,
) -> Perplexity:
    """Measure a bundle that generates text, opened with `options`, and the checkpoint `against` as transformers
    computes it in float32.

    RequestError if the bundle generates no text or reads none, or the texts have no two tokens. ExportError if the
    checkpoint is of another model.
    """
    progress("opening the bundle")
    with Pipeline.open(bundle, options) as pipeline:
        manifest, encoder = pipeline.bundle.manifest, pipeline.encoder
        if not manifest.cached or encoder is None:
            raise RequestError(f"{bundle} does not generate text, so there is no perplexity; leave out --perplexity")
        size = min(filter(None, (WINDOW, manifest.max_positions, pipeline.capacity)))
        rows = [row for text in texts if len(row := tuple(encoder.ids(text))) > 1]
        found = [window for row in rows for window in windows(row, size)]
        if not found:
            raise RequestError("the texts have no two tokens, so none can be predicted; give longer ones with --texts")

        def of_bundle(tokens: tuple[int, ...]) -> Array:
            ids = np.array([tokens], np.int64)
            given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            names = {spec.name for spec in pipeline.signature.inputs}
            logits: Array = pipeline.run({name: given[name] for name in names}, ["logits"])["logits"][0]
            return logits

        ours = _measured(found, of_bundle, "the bundle", progress)
    result = Perplexity(len(rows), ours.shape[1], size, _mean(ours))
    if against is None:
        return result
    progress("loading the checkpoint into torch")
    model = load_reference(Checkpoint.open(against), manifest)

    def of_torch(tokens: tuple[int, ...]) -> Array:
        with torch.no_grad():
            return np.asarray(model(torch.tensor([tokens])).logits[0].numpy())

    theirs = _measured(found, of_torch, "the checkpoint", progress)
    agreement = float(np.equal(ours[0], theirs[0]).mean())
    return Perplexity(result.texts, result.tokens, size, result.perplexity, _mean(theirs), agreement)


def windows(tokens: tuple[int, ...], size: int) -> Iterator[Window]:
    """Windows of up to `size` (two or more) tokens of a row, each half a window after the one before."""
    done = 1  # the first token of a row has nothing before it
    for start in range(0, len(tokens), max(1, size // 2)):
        if done >= len(tokens):
            return
        window = tokens[start : start + size]
        yield Window(window, done - start)
        done = start + len(window)


def _measured(
    found: Sequence[Window], logits: Callable[[tuple[int, ...]], Array], whose: str, progress: Callable[[str], None]
) -> NDArray[np.float64]:
    """For each token that counts, the likeliest in its place and its surprise: float64 [2, tokens]."""
    parts = []
    for number, window in enumerate(found):
        progress(f"{whose}, window {number + 1} of {len(found)}")
        parts.append(next_tokens(logits(window.tokens), window.tokens)[:, window.first - 1 :])
    return np.concatenate(parts, axis=1)


def _mean(measured: NDArray[np.float64]) -> float:
    mean = float(measured[1].mean())
    return math.exp(mean) if mean < 700 else math.inf
