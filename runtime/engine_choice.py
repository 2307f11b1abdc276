"""Which engine runs a bundle fastest here, within an error budget: measured once, and remembered for this machine."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Annotated

import numpy as np
from pydantic import Field
from stageline.models.errors import EngineError, StagelineError
from stageline.models.user_cache import user_cache
from stageline.runtime.bundle.folder import MANIFEST, read_manifest
from stageline.runtime.devices.base import Array
from stageline.runtime.devices.cpu import allowed_cores
from stageline.runtime.engines import ENGINES, WeightDtype
from stageline.runtime.generation.request import GenerationRequest, Sampling
from stageline.runtime.options import PipelineOptions
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.planning.profile import Machine
from stageline.runtime.planning.random_inputs import random_inputs
from stageline.runtime.validation import Data
from stageline.runtime.workload import Shape

_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx")
_ROWS, _LENGTH, _NEW, _ROUNDS = 8, 64, 16, 3
_QUANTISED: tuple[WeightDtype, ...] = ("int8", "int4")
Progress = Callable[[str], None]


class Candidate(Data):
    """One way to run a bundle: tokens per second, generated or of texts read, and its error, the largest relative RMS
    of an output beside that of the first candidate. `refused`: why it does not run, if it does not."""

    engine: str
    quantise: WeightDtype | None = None
    tokens_per_s: float = 0.0
    error: float = 0.0
    refused: str = ""

    def __str__(self) -> str:
        weights = f" with {self.quantise} weights" if self.quantise else ""
        return self.engine + weights


class EngineChoice(Data):
    """What was measured, the fastest within the budget first, then those that are not, or do not run."""

    candidates: Annotated[tuple[Candidate, ...], Field(min_length=1)]
    budget: float | None

    def applied(self, options: PipelineOptions) -> PipelineOptions:
        """The options with what was chosen."""
        return replace(options, engine=self.best.engine, quantise=self.best.quantise)

    @property
    def best(self) -> Candidate:
        """The one that was chosen."""
        return self.candidates[0]

    def lines(self) -> Iterator[str]:
        """What was chosen and why, a line for each candidate."""
        for one in self.candidates:
            if one.refused:
                yield f"{one}: {one.refused}"
                continue
            within = self.budget is None or one.error <= self.budget
            beyond = "" if within else f", above the budget of {self.budget:g}"
            mark = "chosen" if one is self.best else f"{one.tokens_per_s / self.best.tokens_per_s:.2f} times that"
            yield f"{one}: {one.tokens_per_s:,.0f} tokens/s ({mark}), error {one.error:.2g}{beyond}"


def chosen(path: Path, options: PipelineOptions, budget: float | None, progress: Progress) -> EngineChoice:
    """Measure the engines that are here on the bundle at `path`, opened with `options`, or recall what was measured.

    With a `budget` engines with quantised weights take part, unless the options quantise already; those whose error is
    larger are not chosen. EngineError if none runs within it.
    """
    file = user_cache() / "engines" / f"{_key(path, options, budget)}.json"
    with suppress(OSError, ValueError):  # not measured yet, or the file is damaged
        return EngineChoice.model_validate_json(file.read_bytes())
    measured = list(_measured(path, options, budget, progress))
    able = [one for one in measured if not one.refused and (budget is None or one.error <= budget)]
    if not able:
        found = "; ".join(f"{one}: {one.refused or f'error {one.error:.2g}'}" for one in measured)
        within = "" if budget is None else f" within an error of {budget:g}"
        raise EngineError(f"no engine here runs {path}{within}: {found}")
    able.sort(key=lambda one: -one.tokens_per_s)
    choice = EngineChoice(candidates=(*able, *(one for one in measured if one not in able)), budget=budget)
    with suppress(OSError):  # then it is measured again next time
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".aside")
        aside.write_text(choice.model_dump_json())
        aside.replace(file)
    return choice


def _key(path: Path, options: PipelineOptions, budget: float | None) -> str:
    """What the measurement depends on: the model, the machine, the engines' versions and the options."""
    versions = {}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    about = (
        sha256((path / MANIFEST).read_bytes()).hexdigest(), Machine.here().cpu, allowed_cores(), versions,
        options.threads, options.devices, options.quantise, options.slots, options.cache_dtype, budget,
    )  # fmt: skip
    return sha256(repr(about).encode()).hexdigest()[:32]


def _measured(path: Path, options: PipelineOptions, budget: float | None, progress: Progress) -> Iterator[Candidate]:
    weights: list[WeightDtype | None] = [options.quantise]
    if options.quantise is None and budget is not None:
        weights += _QUANTISED
    wanted: dict[str, Array] = {}
    exact = read_manifest(path).exact
    if exact is not None:
        with Pipeline.open(path, replace(options, engine="onnxruntime", quantise=exact, rebalance="off")) as pipeline:
            wanted = pipeline.run(_feed(pipeline))
    for engine in sorted(ENGINES):
        for quantise in weights:
            candidate = Candidate(engine=engine, quantise=quantise)
            progress(f"measuring {candidate}")
            try:
                tried = replace(options, engine=engine, quantise=quantise, rebalance="off")
                with Pipeline.open(path, tried) as pipeline:
                    outputs = pipeline.run(_feed(pipeline))
                    wanted = wanted or outputs
                    found = {"tokens_per_s": _speed(pipeline), "error": _error(outputs, wanted)}
            except StagelineError as error:
                yield candidate.model_copy(update={"refused": str(error)})
                break  # with other weights it would be no better
            yield candidate.model_copy(update=found)


def _feed(pipeline: Pipeline) -> dict[str, Array]:
    """A batch of random values, whose rows are of different lengths: the same one each time."""
    signature = pipeline.signature
    length = min(_LENGTH, signature.max_positions or _LENGTH)
    lengths = np.random.default_rng(0).integers(-(-length // 4), length + 1, _ROWS)
    drawn = random_inputs(pipeline.bundle.manifest, Shape(_ROWS, length))
    drawn["attention_mask"] = (np.arange(length) < lengths[:, None]).astype(np.int64)
    return {spec.name: drawn[spec.name] for spec in signature.inputs}


def _error(outputs: dict[str, Array], wanted: dict[str, Array]) -> float:
    """The largest relative RMS of an output's error. EngineError where a value is not finite."""
    errors = []
    for name, array in wanted.items():
        if not np.isfinite(outputs[name]).all():
            raise EngineError(f"its {name} overflows")
        size = float(np.linalg.norm(array.astype(np.float64)))
        off = float(np.linalg.norm(outputs[name].astype(np.float64) - array))
        errors.append(off / size if size else off)
    return max(errors)


def _speed(pipeline: Pipeline) -> float:
    """Tokens per second: generated by some rows at a time, their prompts' time included, or read in batches."""
    random = np.random.default_rng(1)
    rates: list[float] = []
    for _ in range(_ROUNDS):
        began = perf_counter()
        tokens = _generate(pipeline, random) if pipeline.stats().generation else _read(pipeline)
        rates.append(tokens / (perf_counter() - began))
    return max(rates)  # the others were disturbed, or the first


def _generate(pipeline: Pipeline, random: np.random.Generator) -> int:
    stats, most = pipeline.stats().generation, pipeline.signature.max_positions or 4 * _LENGTH
    assert stats is not None
    length = max(1, min(_LENGTH, most - _NEW))
    prompts = random.integers(0, pipeline.signature.vocabulary or 2, (min(_ROWS, stats.slots), length))
    sampling = Sampling(max_tokens=_NEW, min_tokens=min(_NEW, most - length))
    futures = [pipeline.submit(GenerationRequest(tuple(row), sampling)) for row in prompts.tolist()]
    return sum(len(future.result().choices[0].token_ids) for future in futures)


def _read(pipeline: Pipeline) -> int:
    feed = _feed(pipeline)
    for future in [pipeline.submit(feed) for _ in range(2)]:
        future.result()
    return 2 * int(feed["attention_mask"].sum() if "attention_mask" in feed else _ROWS)
