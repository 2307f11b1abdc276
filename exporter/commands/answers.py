"""A pipeline's answers to texts, as plain data: one function per task."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from stageline.models.errors import BundleError, EngineError, RequestError
from stageline.models.json_file import read_json_object
from stageline.models.tokenizer import TextEncoder, padded
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import EMBEDDING, Manifest
from stageline.runtime.engines.base import Array
from stageline.runtime.generation.detokenize import TextStream
from stageline.runtime.generation.request import GenerationRequest, Sampling
from stageline.runtime.generation.sampling import Row, sample
from stageline.runtime.generation.settings import decide
from stageline.runtime.generation.text_model import open_encoder
from stageline.runtime.images import pixel_values
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.scores import scores

TOP = 5
Answer = dict[str, Any]


@dataclass(frozen=True)
class Session:
    """An open pipeline and the tokenizer that makes its inputs. `folder`: the bundle's; `prompt`: the name of what is
    put before a text that is embedded."""

    folder: Path
    manifest: Manifest
    pipeline: Pipeline
    encoder: TextEncoder
    prompt: str | None = None

    def run(self, encoded: Mapping[str, Array], output: str) -> Array:
        """One output of the model for encoded texts. EngineError if it holds NaN."""
        names = [spec.name for spec in self.pipeline.signature.inputs]
        given = {name: value for name, value in encoded.items() if name in names}
        values = self.pipeline.run(given, [output])[output]
        mask = encoded["attention_mask"]
        real = values[mask > 0] if values.ndim == 3 else values  # values at padding mean nothing
        if np.isnan(real).any():
            raise EngineError(
                f"the model's {output} is not a number (NaN); its weights, or those of its checkpoint, are broken"
            )
        return values


def encoder_of(bundle: Bundle) -> TextEncoder:
    """The bundle's tokenizer. BundleError if it has none."""
    encoder = open_encoder(bundle)
    if encoder is None:
        reads = ", ".join(spec.name for spec in bundle.manifest.inputs)
        raise BundleError(
            f"bundle {bundle.path} has no tokenizer, so it cannot read texts; "
            f"give it {reads} from Python: Pipeline.open(...).run(...)"
        )
    return encoder


def sentence_similarity(session: Session, texts: Sequence[str]) -> Answer:
    """The embedding of each text, and the similarity of each pair as the model's makers compare them."""
    vectors = session.run(session.encoder.encode(texts, prompt=session.prompt), EMBEDDING)
    kind = session.manifest.text.similarity if session.manifest.text else "cosine"
    return {"embeddings": vectors.tolist(), "similarity": _SIMILARITY[kind](vectors).tolist(), "compared_by": kind}


def _cosine(vectors: Array) -> Array:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
    result: Array = unit @ unit.T
    return result


# vectors [texts, width] -> [texts, texts]; distances are negative, so that more alike is higher
_SIMILARITY: dict[str, Callable[[Array], Array]] = {
    "cosine": _cosine,
    "dot": lambda vectors: vectors @ vectors.T,
    "euclidean": lambda vectors: -np.linalg.norm(vectors[:, None] - vectors[None], axis=2),
    "manhattan": lambda vectors: -np.abs(vectors[:, None] - vectors[None]).sum(axis=2),
}


def feature_extraction(session: Session, texts: Sequence[str]) -> Answer:
    """For each text the shape [length, width] of its features and the first values of its first token."""
    encoded = session.encoder.encode(texts)
    hidden = session.run(encoded, "last_hidden_state")
    lengths = encoded["attention_mask"].sum(axis=1)
    return {
        "features": [
            {"shape": [int(length), hidden.shape[2]], "first": row[0, :TOP].tolist()}
            for row, length in zip(hidden, lengths, strict=True)
        ]
    }


def text_classification(session: Session, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Answer:
    """The score of each label for each text, or each text with its pair, highest first."""
    logits = session.run(session.encoder.encode(texts, pairs), "logits")
    found = scores(logits, session.manifest.activation)
    return {
        "activation": session.manifest.activation,
        "labels": [_best(row, _labels(session.manifest, len(row)), len(row)) for row in found],
    }


def token_classification(session: Session, texts: Sequence[str]) -> Answer:
    """The most probable label of each token of each text."""
    encoded = session.encoder.encode(texts)
    logits = session.run(encoded, "logits")
    names = _labels(session.manifest, logits.shape[2])
    return {
        "tokens": [
            [
                {"token": session.encoder.decode([token]), "label": names[int(row.argmax())]}
                for token, row, real in zip(ids, rows, mask, strict=True)
                if real
            ]
            for ids, rows, mask in zip(encoded["input_ids"], logits, encoded["attention_mask"], strict=True)
        ]
    }


def fill_mask(session: Session, texts: Sequence[str]) -> Answer:
    """The most probable tokens at each mask of each text."""
    mask_name, mask_id = _mask(session.folder / "tokenizer")
    encoded = session.encoder.encode(texts)
    for number, ids in enumerate(encoded["input_ids"]):
        if mask_id not in ids:
            raise RequestError(f"text {number} ({texts[number]!r}) has no {mask_name}; write it in place of a word")
    logits = session.run(encoded, "logits")
    return {
        "masks": [
            [_best(row, session.encoder) for row in scores(rows[ids == mask_id], "softmax")]
            for ids, rows in zip(encoded["input_ids"], logits, strict=True)
        ]
    }


def text_generation(session: Session, texts: Sequence[str], new_tokens: int) -> Answer:
    """The most probable next tokens of each text, and its greedy continuation by at most `new_tokens`, with the
    checkpoint's own penalties and bans."""
    if session.manifest.cached:
        return _generated(session, texts, new_tokens)
    encoded = session.encoder.encode(texts)
    lengths = encoded["attention_mask"].sum(axis=1)
    prompts = [ids[:length].tolist() for ids, length in zip(encoded["input_ids"], lengths, strict=True)]
    chances = scores(_next_logits(session, prompts), "softmax")
    return {
        "next": [_best(row, session.encoder) for row in chances],
        "continuations": [_continue(session, prompt, new_tokens) for prompt in prompts],
    }


def images(pipeline: Pipeline, files: Sequence[Path]) -> Answer:
    """Of a classifier the highest scores for each image, else the shape of its features and its first values."""
    manifest = pipeline.bundle.manifest
    if manifest.image is None:
        raise BundleError(
            f"bundle {pipeline.bundle.path} does not say how images become pixel_values; give it those from Python: "
            "Pipeline.open(...).run(...)"
        )
    if manifest.task == "image-classification":
        found = pipeline.classify_images(files)
        names = _labels(manifest, found.shape[1])
        return {"activation": manifest.activation, "labels": [_best(row, names) for row in found]}
    (spec,) = (spec for spec in manifest.outputs if spec.name == "last_hidden_state")
    features = pipeline.run({"pixel_values": pixel_values(files, manifest.image)}, [spec.name])[spec.name]
    return {"features": [{"shape": list(one.shape), "first": one.ravel()[:TOP].tolist()} for one in features]}


ANSWERS: dict[str, Callable[[Session, Sequence[str]], Answer]] = {
    "sentence-similarity": sentence_similarity,
    "feature-extraction": feature_extraction,
    "text-classification": text_classification,
    "token-classification": token_classification,
    "fill-mask": fill_mask,
}
"""Task -> its function. text-generation is not here: it also takes a number of tokens."""


def _generated(session: Session, texts: Sequence[str], new_tokens: int) -> Answer:
    """`text_generation` with KV caches, all texts at once."""
    sampling = Sampling(max_tokens=max(1, new_tokens), logprobs=TOP)
    futures = [session.pipeline.submit(GenerationRequest(text, sampling)) for text in texts]
    choices = [future.result().choices[0] for future in futures]
    return {
        "next": [
            [
                {"token": session.encoder.decode([token]), "id": token, "probability": math.exp(logprob)}
                for token, logprob in choice.logprobs[0].top
            ]
            for choice in choices
        ],
        "continuations": [choice.text if new_tokens else "" for choice in choices],
    }


def _continue(session: Session, prompt: list[int], new_tokens: int) -> str:
    """The greedy continuation without a KV cache: each step runs the whole text again."""
    defaults = session.manifest.generation_defaults
    settings = decide(Sampling(max_tokens=max(1, new_tokens)), defaults, len(prompt))
    text = TextStream(session.encoder, settings.stop, settings.min_tokens, prompt)
    row: Row | None = None
    ids, pieces = list(prompt), []
    while len(ids) < min(len(prompt) + new_tokens, session.encoder.max_length) and not text.stopped:
        logits = _next_logits(session, [ids]).astype(np.float32)
        row = row or Row(settings, logits.shape[1], prompt, defaults.end_ids)
        (drawn,) = sample(logits, [row])
        if isinstance(drawn, EngineError):
            raise drawn
        if drawn.token_id in defaults.end_ids:
            break
        ids.append(drawn.token_id)
        pieces.append(text.push([drawn.token_id]))
    return "".join(pieces) + ("" if text.stopped else text.finish())


def _next_logits(session: Session, rows: list[list[int]]) -> Array:
    """The logits [batch, vocabulary] after the last token of each row."""
    ids, mask = padded(rows, session.encoder.pad_id)
    logits = session.run({"input_ids": ids, "attention_mask": mask}, "logits")
    last: Array = logits[np.arange(len(rows)), mask.sum(axis=1) - 1]
    return last


def _best(found: Array, names: Sequence[str] | TextEncoder, count: int = TOP) -> list[dict[str, Any]]:
    """The `count` highest of the scores `found` [classes], each with its label or token, as `probability`."""
    best = np.argsort(-found)[:count]
    if isinstance(names, TextEncoder):
        return [{"token": names.decode([i]), "id": int(i), "probability": float(found[i])} for i in best]
    return [{"label": names[i], "probability": float(found[i])} for i in best]


def _labels(manifest: Manifest, count: int) -> Sequence[str]:
    return manifest.labels or [f"LABEL_{i}" for i in range(count)]


def _mask(folder: Path) -> tuple[str, int]:
    """The mask token of the tokenizer in `folder` and its id."""
    stated = folder / "tokenizer_config.json"
    mask = read_json_object(stated).get("mask_token") if stated.is_file() else None
    name = mask.get("content") if isinstance(mask, dict) else mask
    added = json.loads((folder / "tokenizer.json").read_bytes()).get("added_tokens", [])
    for token in added:
        if token["content"] == name:
            return str(name), int(token["id"])
    raise BundleError(
        f"{stated} has no mask_token that tokenizer.json knows; add one to the checkpoint and export again"
    )
