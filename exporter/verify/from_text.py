"""Comparing a bundle with its checkpoint from text to answer: the tokens that a text becomes, and what a user is given.

The reference is what reads and answers texts where the checkpoint comes from: sentence-transformers for sentence
embeddings (where it is installed; else its rules), else transformers' own tokenizer, pipelines and `generate`.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from stageline.exporter import skeleton
from stageline.exporter.failure import first_line
from stageline.exporter.sentence_head import loaded_head
from stageline.exporter.tokenizer import load_tokenizer
from stageline.exporter.verify.scale import token_errors
from stageline.models.checkpoint import Checkpoint
from stageline.models.cross_encoder import cross_encoder
from stageline.models.errors import ExportError
from stageline.models.sentence import pooling
from stageline.models.tokenizer import TextEncoder
from stageline.runtime.bundle.manifest import EMBEDDING, Activation, Manifest
from stageline.runtime.engines import Array
from stageline.runtime.generation.request import GenerationRequest, Sampling
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.scores import scores

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "HELLO World! The CAFÉ in İstanbul is naïve, Ünïcödé",
    "  two  spaces,\ttabs and\nlines \n",
    "日本語のテキスト 🙂 don't 3.14",
    " ".join(f"It was day {day} and THE Rain went on." for day in range(60)),
)
NEW_TOKENS = 12  # a greedy continuation's
_ZERO = 1e-6  # scores no larger are alike


@dataclass(frozen=True)
class TextComparison:
    """One step of the way from text to answer, and the largest error of all texts: 1 if a text becomes other tokens;
    the difference of an answer's numbers as a fraction of how large they are; of scores, that of their logarithms if
    that is larger; how much less the reference scores the first token of a greedy continuation that is not its own."""

    step: str
    value: str
    relative_error: float
    tolerance: float
    worst: str
    """The text with that error."""

    @property
    def passed(self) -> bool:
        """Whether the relative error is within the tolerance; NaN is not."""
        return self.relative_error <= self.tolerance


@dataclass(frozen=True)
class _Sides:
    """The bundle's and the reference's way to read and answer a text. `tokenizer`: transformers', set to truncate where
    the bundle's must."""

    pipeline: Pipeline
    manifest: Manifest
    encoder: TextEncoder
    checkpoint: Checkpoint
    model: Any
    tokenizer: Any

    def outputs(self, text: str, name: str, pair: str | None = None) -> tuple[Array, Array]:
        """The bundle's tokens [length] and one output [1, ...] for a text, or for a text and its pair."""
        encoded = self.encoder.encode([text], None if pair is None else [pair], truncate=True)
        inputs = {spec.name: encoded[spec.name] for spec in self.pipeline.signature.inputs}
        return encoded["input_ids"][0], self.pipeline.run(inputs, [name])[name]

    def hf(self, task: str, **options: Any) -> Any:
        """transformers' pipeline of a task."""
        return transformers.pipeline(task, model=self.model, tokenizer=self.tokenizer, device="cpu", **options)


def compare_texts(
    pipeline: Pipeline, checkpoint: Checkpoint, model: Any, tolerance: float
) -> tuple[TextComparison, ...]:
    """Compare the open bundle with the checkpoint, whose reference `model` is loaded, on `TEXTS`; nothing is compared
    where the bundle takes no text, or the checkpoint is a .gguf: transformers reads the tokenizers of these files less
    truly than the export does, so it is no reference.

    CheckpointError if the checkpoint's tokenizer cannot be read, ExportError if the reference answers no texts.
    """
    encoder, manifest = pipeline.encoder, pipeline.bundle.manifest
    if encoder is None or checkpoint.kind == "gguf" or (tokenizer := load_tokenizer(checkpoint)) is None:
        return ()
    head = pooling(checkpoint) if manifest.task == "sentence-similarity" else None
    stated = head.max_seq_length if head is not None and head.max_seq_length else tokenizer.model_max_length
    tokenizer.model_max_length = min(stated, manifest.max_positions or stated)
    sides = _Sides(pipeline, manifest, encoder, checkpoint, model, tokenizer)
    with _said_of(checkpoint):
        return _sentences(sides, tolerance) if head is not None else _answers(sides, tolerance)


@contextmanager
def _said_of(checkpoint: Checkpoint) -> Iterator[None]:
    """Inside, an error that transformers or torch raise for the reference is one line about the checkpoint."""
    try:
        yield
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ExportError(
            f"transformers itself does not answer texts with {checkpoint.path} ({first_line(error)}), so there is "
            "nothing to compare with; its tokenizer and its model may not fit each other"
        ) from error


def _answers(sides: _Sides, tolerance: float) -> tuple[TextComparison, ...]:
    tokens = [(text, float(_ids(sides, text) != _reference_ids(sides, text))) for text in TEXTS]
    compared = [_worst("text to tokens", "input_ids", tokens, 0.0)]
    if sides.manifest.task in _ANSWERS:
        value, errors = _ANSWERS[sides.manifest.task](sides)
        if errors:
            compared.append(_worst("text to answer", value, errors, tolerance))
    return tuple(compared)


def _ids(sides: _Sides, text: str) -> list[int]:
    ids: list[int] = sides.encoder.encode([text], truncate=True)["input_ids"][0].tolist()
    return ids


def _reference_ids(sides: _Sides, text: str) -> list[int]:
    ids: list[int] = sides.tokenizer(text, truncation=True).input_ids
    return ids


def _worst(step: str, value: str, errors: Sequence[tuple[str, float]], tolerance: float) -> TextComparison:
    text, error = max(errors, key=lambda each: np.inf if np.isnan(each[1]) else each[1])
    return TextComparison(step, value, error, tolerance, text)


def _errors(answers: Sequence["_Answer"], usual: float | None = None) -> list[tuple[str, float]]:
    """The largest error of each answer, as a fraction of how large its numbers are, or those of most answers (`usual`:
    numbers of that size); infinite where there are more or fewer of them."""
    pairs = [(text, np.asarray(got, np.float64), np.asarray(want, np.float64)) for text, got, want in answers]
    if usual is None:
        usual = float(np.median([np.abs(want).max(initial=0) for _, _, want in pairs]))
    return [
        (text, float(token_errors(got.ravel(), want.ravel(), usual)) if got.shape == want.shape else float("inf"))
        for text, got, want in pairs
    ]


def _score_errors(answers: Sequence["_Answer"]) -> list[tuple[str, float]]:
    """Like `_errors`, of scores between 0 and 1: of them, or of their logarithms, which tell small ones apart."""
    logs = [(text, np.log(np.clip(got, _ZERO, 1)), np.log(np.clip(want, _ZERO, 1))) for text, got, want in answers]
    both = zip(_errors(answers, 1.0), _errors(logs, 1.0), strict=True)
    return [(text, max(error, other)) for (text, error), (_, other) in both]


def _sentences(sides: _Sides, tolerance: float) -> tuple[TextComparison, ...]:
    if find_spec("sentence_transformers"):
        tokens_of, vector_of, by = _with_sentence_transformers(sides)
    else:
        tokens_of, vector_of, by = _with_its_rules(sides)
    tokens = [(text, float(_ids(sides, text) != tokens_of(text))) for text in TEXTS]
    vectors = []
    for text in TEXTS:
        got, want = sides.outputs(text, EMBEDDING)[1][0], vector_of(text)
        vectors.append((text, got, want))
    return (
        _worst("text to tokens", "input_ids", tokens, 0.0),
        _worst("text to answer", f"{EMBEDDING} ({by})", _errors(vectors), tolerance),
    )


_Reference = tuple[Callable[[str], list[int]], Callable[[str], Array], str]


def _of_sentence_transformers(kind: str, checkpoint: Checkpoint) -> Any:
    """The checkpoint in its class `kind`, in float32."""
    import sentence_transformers

    return getattr(sentence_transformers, kind)(
        str(checkpoint.path), device="cpu", local_files_only=True, trust_remote_code=False,
        model_kwargs={"dtype": torch.float32, "attn_implementation": "eager", "use_safetensors": True},
    ).float()  # fmt: skip


def _with_sentence_transformers(sides: _Sides) -> _Reference:
    made = _of_sentence_transformers("SentenceTransformer", sides.checkpoint)
    prompt = made.prompts.get(made.default_prompt_name or "") or ""

    def tokens(text: str) -> list[int]:
        ids: list[int] = made.tokenizer(prompt + text, truncation=True).input_ids
        return ids

    return tokens, lambda text: np.asarray(made.encode([text], show_progress_bar=False)[0]), "sentence-transformers"


def _with_its_rules(sides: _Sides) -> _Reference:
    head, settings = loaded_head(sides.checkpoint), pooling(sides.checkpoint)
    assert settings is not None
    prompt = settings.prompts[settings.default_prompt] if settings.default_prompt else ""
    task = skeleton.Task(sides.model, skeleton.inputs_of(sides.model, torch.float32), (EMBEDDING,), head).eval()

    def read(text: str) -> Any:
        whole = prompt + text
        return sides.tokenizer(whole.lower() if settings.lower_case else whole, truncation=True, return_tensors="pt")

    def vector(text: str) -> Array:
        encoded = read(text)
        given = [encoded.get(name, torch.zeros_like(encoded["input_ids"])) for name in task.input_names]
        with torch.no_grad():
            return np.asarray(task(*given)[0][0])

    return lambda text: read(text)["input_ids"][0].tolist(), vector, "transformers"


_Answer = tuple[str, Any, Any]
"""A text, and the bundle's and the reference's numbers for it, of the same shape."""
_Errors = tuple[str, list[tuple[str, float]]]


def _pairs(sides: _Sides) -> _Errors:
    """A CrossEncoder's scores of pairs."""
    made = _of_sentence_transformers("CrossEncoder", sides.checkpoint)
    answers: list[_Answer] = []
    for text, pair in itertools.pairwise(TEXTS):
        got = scores(sides.outputs(text, "logits", pair)[1][0], sides.manifest.activation)
        answers.append((text, got, np.atleast_1d(made.predict([(text, pair)], show_progress_bar=False)[0])))
    return "scores (sentence-transformers)", _errors(answers)


def _text_classification(sides: _Sides) -> _Errors:
    """The scores, and the logits that they are of up to a constant: scores of small logits are all alike."""
    if cross_encoder(sides.checkpoint) is not None and find_spec("sentence_transformers"):
        return _pairs(sides)
    reference = sides.hf("text-classification", top_k=None)
    labels, activation = sides.manifest.labels, sides.manifest.activation
    answers: list[_Answer] = []
    for text, pair in [*((text, None) for text in TEXTS), (TEXTS[0], TEXTS[1])]:
        got = scores(sides.outputs(text, "logits", pair)[1][0], activation)
        names = labels or [f"LABEL_{number}" for number in range(len(got))]
        (found,) = reference([{"text": text, "text_pair": pair} if pair else text], truncation=True)
        want = {one["label"]: one["score"] for one in found}
        answers.append((text, got, [want.get(name, np.nan) for name in names]))
    if activation == "none":
        return "scores", _errors(answers)
    logits = [(text, _logits(got, activation), _logits(want, activation)) for text, got, want in answers]
    both = zip(_errors(answers, 1.0), _errors(logits), strict=True)
    return "scores", [(text, max(error, other)) for (text, error), (_, other) in both]


def _logits(given: Any, activation: Activation) -> NDArray[np.float64]:
    """Logits [labels] that make these scores, with a mean of zero for softmax."""
    values = np.clip(np.asarray(given, np.float64), _ZERO, 1 - _ZERO)
    logs: NDArray[np.float64] = np.log(values)
    return logs - np.log1p(-values) if activation == "sigmoid" else logs - logs.mean()


def _token_classification(sides: _Sides) -> _Errors:
    """How far the bundle's score of the reference's label is from the reference's: two labels may be as likely."""
    reference = sides.hf("token-classification", ignore_labels=[])
    number_of = {name: number for number, name in enumerate(sides.manifest.labels or ())}
    answers: list[_Answer] = []
    for text in TEXTS:
        got = scores(sides.outputs(text, "logits")[1][0], "softmax")
        found = reference(text)
        at = [one["index"] for one in found]
        if max(at, default=0) >= len(got):
            answers.append((text, np.zeros(0), np.zeros(1)))
            continue
        given = [got[one["index"], number_of.get(one["entity"], 0)] for one in found]
        answers.append((text, given, [one["score"] for one in found]))
    return "scores of labels", _score_errors(answers)


def _fill_mask(sides: _Sides) -> _Errors:
    """How far the bundle's scores of the reference's likeliest tokens are from the reference's."""
    if sides.tokenizer.mask_token is None:
        return "scores of tokens", []
    reference = sides.hf("fill-mask", top_k=5)
    answers: list[_Answer] = []
    for text in TEXTS[:-1]:
        masked = f"{text} {sides.tokenizer.mask_token}."
        ids, logits = sides.outputs(masked, "logits")
        at = np.flatnonzero(ids == sides.tokenizer.mask_token_id)
        found = reference(masked)
        got = scores(logits[0][at[0]], "softmax") if len(at) else np.full(sides.manifest.vocabulary or 1, np.nan)
        answers.append((masked, [got[one["token"]] for one in found], [one["score"] for one in found]))
    return "scores of tokens", _score_errors(answers)


def _feature_extraction(sides: _Sides) -> _Errors:
    answers: list[_Answer] = []
    for text in TEXTS:
        got = sides.outputs(text, "last_hidden_state")[1][0]
        with torch.no_grad():
            encoded = sides.tokenizer(text, truncation=True, return_tensors="pt")
            answers.append((text, got, sides.model(**encoded).last_hidden_state[0].numpy()))
    return "last_hidden_state", _errors(answers)


def _text_generation(sides: _Sides) -> _Errors:
    """Greedy continuations. Where tokens part, how much less the reference scores the bundle's: two may be alike."""
    capacity = sides.pipeline.capacity
    errors = []
    for text in TEXTS:
        ids = _reference_ids(sides, text)
        if not ids or capacity is None or len(ids) + NEW_TOKENS > capacity:
            continue
        request = GenerationRequest(text, Sampling(max_tokens=NEW_TOKENS))
        got = sides.pipeline.submit(request).result().choices[0].token_ids
        with torch.no_grad():
            made = sides.model.generate(
                torch.tensor([ids]), attention_mask=torch.ones((1, len(ids)), dtype=torch.long), do_sample=False,
                num_beams=1, max_new_tokens=NEW_TOKENS, output_scores=True, return_dict_in_generate=True,
            )  # fmt: skip
        errors.append((text, _parting(got, made.sequences[0, len(ids) :].tolist(), made.scores)))
    return "greedy tokens", errors


def _parting(got: Sequence[int], want: Sequence[int], step_scores: Sequence[torch.Tensor]) -> float:
    place = next((n for n, (one, other) in enumerate(zip(got, want, strict=False)) if one != other), None)
    if place is None:
        return 0.0 if len(got) == len(want) else float("inf")
    values = step_scores[place][0]
    scale = float(values[values.isfinite()].abs().max().clamp(min=_ZERO))
    return float(values.max() - values[got[place]]) / scale


_ANSWERS: dict[str, Callable[[_Sides], _Errors]] = {
    "text-classification": _text_classification,
    "token-classification": _token_classification,
    "fill-mask": _fill_mask,
    "feature-extraction": _feature_extraction,
    "text-generation": _text_generation,
}
