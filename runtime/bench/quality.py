"""How good a pipeline's answers are, beside those of a reference: perplexity, agreement, and cosine."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from stageline.models.errors import RequestError
from stageline.models.tokenizer import padded
from stageline.runtime.bench.records import Quality
from stageline.runtime.bundle.folder import Bundle, read_manifest
from stageline.runtime.bundle.manifest import EMBEDDING
from stageline.runtime.engines import Array
from stageline.runtime.options import PipelineOptions
from stageline.runtime.pipeline import Pipeline


@dataclass(frozen=True)
class Subject:
    """A bundle and how it is opened; `name` is what a run calls it."""

    name: str
    path: Path
    options: PipelineOptions


def reference_of(bundle: Bundle, options: PipelineOptions, against: Path | None) -> Subject | None:
    """What the answers are compared with: the bundle `against`, else the bundle itself where the options change its
    numbers, as its checkpoint has them, on the CPU. None if they do not."""
    plain = PipelineOptions(threads=options.threads, queue=options.queue)
    if against is not None:
        return Subject(str(against), against, replace(plain, quantise=read_manifest(against).exact))
    plain = replace(plain, quantise=bundle.manifest.exact)
    if options.quantise == plain.quantise and options.engine == plain.engine:
        return None
    return Subject("the same bundle in onnxruntime, not quantised", bundle.path, plain)


def check(
    subject: Subject, reference: Subject | None, texts: Sequence[str], say: Callable[[str], None] = lambda step: None
) -> Quality:
    """Measure the quality of `subject` on `texts`, each cut to what the model takes.

    A model that generates: the perplexity of the texts, and how often its likeliest next token is the reference's. Any
    other: the cosine of its output for a text, and the reference's; it needs a reference. RequestError if the two do
    not read the texts as the same tokens or the bundle reads no texts.
    """
    manifest = Bundle.open(subject.path).manifest
    if reference is None and not manifest.cached:
        raise RequestError(
            "--check of a model that does not generate needs a reference; give --quantise, or --check-against BUNDLE"
        )
    if reference is not None and _kind(Bundle.open(reference.path)) != _kind(Bundle.open(subject.path)):
        raise RequestError(f"{reference.name} is of another kind of model; give a bundle of the same model")
    measure = _next_tokens if manifest.cached else _outputs
    say(f"checking {subject.name}")
    rows, ours = _answers(subject, texts, measure)
    tokens = sum(map(len, rows))
    theirs = None
    if reference is not None:
        say(f"checking {reference.name}")
        read, theirs = _answers(reference, texts, measure)
        if read != rows:
            raise RequestError(f"{reference.name} reads the texts as other tokens; give a bundle of the same model")
    name = None if reference is None else reference.name
    if not manifest.cached:
        assert theirs is not None
        return Quality(name, len(rows), tokens, cosines=_cosines(ours, theirs))
    perplexity = _perplexity(ours)
    if theirs is None:
        return Quality(name, len(rows), tokens, perplexity)
    same = [np.equal(a[0], b[0]) for a, b in zip(ours, theirs, strict=True)]
    return Quality(name, len(rows), tokens, perplexity, _perplexity(theirs), float(np.concatenate(same).mean()))


def _kind(bundle: Bundle) -> tuple[str, str, int | None]:
    return bundle.manifest.architecture, bundle.manifest.task, bundle.manifest.vocabulary


_Rows = list[tuple[int, ...]]
_Measure = Callable[[Pipeline, tuple[int, ...]], NDArray[np.float64]]


def _answers(subject: Subject, texts: Sequence[str], measure: _Measure) -> tuple[_Rows, list[NDArray[np.float64]]]:
    with Pipeline.open(subject.path, subject.options) as pipeline:
        rows = list(_rows(pipeline, texts))
        if not rows:
            raise RequestError("--check has no text of two tokens; give longer ones")
        return rows, [measure(pipeline, row) for row in rows]


def _rows(pipeline: Pipeline, texts: Sequence[str]) -> Iterator[tuple[int, ...]]:
    encoder = pipeline.encoder
    if encoder is None:
        raise RequestError("--check reads texts, and this bundle has no tokenizer; leave it out")
    limit = min(filter(None, (pipeline.bundle.manifest.max_positions, encoder.max_length, pipeline.capacity)))
    for text in texts:
        row = tuple(encoder.ids(text)[:limit])
        if len(row) > 1:
            yield row


def _inputs(pipeline: Pipeline, row: tuple[int, ...]) -> dict[str, Array]:
    ids, mask = padded([row], 0)
    made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return {spec.name: made[spec.name] for spec in pipeline.signature.inputs}


def _next_tokens(pipeline: Pipeline, row: tuple[int, ...]) -> NDArray[np.float64]:
    return next_tokens(pipeline.run(_inputs(pipeline, row), ["logits"])["logits"][0], row)


def next_tokens(logits: Array, row: tuple[int, ...]) -> NDArray[np.float64]:
    """The likeliest next token after each of the row but the last, and the surprise of the one that comes, of logits
    [length, vocabulary]. float64 [2, length-1]: ids, and -ln of a probability."""
    logits = logits[:-1].astype(np.float64)
    largest = logits.max(axis=1)
    total = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
    return np.stack([logits.argmax(axis=1), total - logits[np.arange(len(row) - 1), list(row[1:])]])


def _outputs(pipeline: Pipeline, row: tuple[int, ...]) -> NDArray[np.float64]:
    """The embedding, or else the first output, of a text as one vector."""
    names = [spec.name for spec in pipeline.signature.outputs]
    wanted = EMBEDDING if EMBEDDING in names else names[0]
    return pipeline.run(_inputs(pipeline, row), [wanted])[wanted].astype(np.float64).ravel()


def _perplexity(answers: Sequence[NDArray[np.float64]]) -> float:
    """exp of the mean surprise of all tokens; infinite rather than an overflow."""
    mean = float(np.concatenate([one[1] for one in answers]).mean())
    return math.exp(mean) if mean < 700 else math.inf


def _cosines(ours: Sequence[NDArray[np.float64]], theirs: Sequence[NDArray[np.float64]]) -> tuple[float, ...]:
    return tuple(
        float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) or math.nan)) for a, b in zip(ours, theirs, strict=True)
    )
