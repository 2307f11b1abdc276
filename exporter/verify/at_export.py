"""Running a bundle before it takes its name, so that no export leaves one that fails, or that is silently wrong.

Small models run whole, in the runtime's own pipeline, and are compared with transformers; of large ones a stage of one
block runs. The rows are of lengths at which a condition that the trace did not see would show: one token, a few, and
an odd number of many, in a batch and alone. `stageline verify` compares more, and more closely.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from stageline.exporter.failure import first_line
from stageline.exporter.narrowing import not_finite
from stageline.exporter.trace_model import Wanted
from stageline.exporter.verify.against_torch import load_reference, real_tokens, rounded, torch_values, with_quantised
from stageline.exporter.verify.one_block import run_one_block
from stageline.exporter.verify.random_inputs import drawn_inputs
from stageline.exporter.verify.scale import token_errors, typical
from stageline.models.errors import ExportError, StagelineError
from stageline.runtime import words
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import LENGTH, Manifest
from stageline.runtime.engines import Array, engine_factory
from stageline.runtime.generation.request import GenerationRequest, Sampling
from stageline.runtime.options import PipelineOptions
from stageline.runtime.pipeline import Pipeline

WHOLE_BYTES = 2**30
"""Models of up to this many bytes in float32 run whole."""
COMPARED_BYTES = 2**28
"""And those of up to this many are compared with transformers, which holds them a second time."""
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 3e-2}
"""Wider than those of `stageline verify`: what is found here cannot be exported at all."""
_FEW, _LONG = 5, 521  # primes; the second is more than the 512 positions that many models have
_WORK = 10**10  # parameters times tokens of the long row
_ONE_CORE = 10**9  # so many run on one core as fast
_OUTPUT_BYTES = 2**26  # of the long row
_PROMPT, _CHUNK, _STEPS = 17, 7, 4  # tokens of a prompt, of a step that reads it, and tokens generated after it
_SURE = 0.9  # the share of tokens that must agree where a model picks among experts: at a tie another may be as good
_AS_THE_MODEL_SAYS: dict[str, Any] = {
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "sequence_bias": (), "bad_words_ids": (),
    "suppress_tokens": (), "begin_suppress_tokens": (), "stop": (),
}  # fmt: skip

_Values = Callable[[Mapping[str, Array]], dict[str, Array]]


def check_runs_here() -> None:
    """EngineError if ONNX Runtime is not installed: an export runs what it made."""
    engine_factory("onnxruntime")


def run_at_export(bundle: Bundle, wanted: Wanted) -> str:
    """Run the bundle that was just written, and return what was run and compared, as a sentence without its full stop.

    ExportError if it fails, or gives values that are not finite or not transformers'.
    """
    size = 4 * bundle.parameters
    try:
        if size > WHOLE_BYTES:
            return run_one_block(bundle, _long(bundle, bundle.parameters // bundle.manifest.blocks), WHOLE_BYTES)
        wanted.progress("running it")
        threads = 1 if bundle.parameters * _LONG < _ONE_CORE else None
        options = PipelineOptions(
            threads=threads,
            slots=1,
            capacity=_capacity(bundle.manifest),
            prefill_chunk=_CHUNK,
            quantise=bundle.manifest.exact,
        )
        with Pipeline.open(bundle.path, options) as pipeline, _torch_threads(threads):
            return _Trial.of(pipeline, bundle, wanted).run()
    except StagelineError as error:
        reason = str(error).replace(str(bundle.path), "the bundle")
        raise ExportError(
            f"{wanted.checkpoint.path} was exported, but the bundle is not right, and was removed: {reason}; "
            f"{_what_to_do(wanted)}"
        ) from error


def _what_to_do(wanted: Wanted) -> str:
    for damage in not_finite(wanted.checkpoint):
        return f"{damage}; download it again, or ask who trained it"
    report = "report this line with the checkpoint's config.json"
    return report if wanted.dtype == "float32" else f"try --dtype float32, and {report}"


def _capacity(manifest: Manifest) -> int | None:
    most = _PROMPT + _STEPS
    return min(manifest.max_positions or most, most) if manifest.cached else None


@contextmanager
def _torch_threads(count: int | None) -> Iterator[None]:
    """Inside, torch computes with so many threads (None: as before)."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _long(bundle: Bundle, parameters: int) -> int:
    """Tokens of the long row, for a model or a stage of so many parameters."""
    manifest = bundle.manifest
    width = max((n for spec in manifest.outputs for n in spec.shape if isinstance(n, int)), default=1)
    affordable = min(_WORK // max(parameters, 1), _OUTPUT_BYTES // (4 * width))
    return min(_LONG, manifest.max_positions or _LONG, max(affordable, 2 * _PROMPT))


@dataclass
class _Trial:
    """One bundle, open, and the reference's values for inputs; without a reference (`why_not` says why), values are
    only looked at. `share`: of the tokens that must agree."""

    pipeline: Pipeline
    manifest: Manifest
    long: int
    share: float
    reference: _Values | None
    why_not: str
    worst: float = 0.0
    beyond: tuple[str, ...] = ()
    """What the reference itself does not run."""

    @classmethod
    def of(cls, pipeline: Pipeline, bundle: Bundle, wanted: Wanted) -> "_Trial":
        """Loads the reference if it is small enough."""
        manifest = bundle.manifest
        picks = any(node.op_type == "TopK" for part in bundle.parts() for node in part.graph)
        share = _SURE if picks else 1.0
        reference, why_not = _reference(bundle, wanted)
        return cls(pipeline, manifest, _long(bundle, bundle.parameters), share, reference, why_not)

    def run(self) -> str:
        """What was run, in words; ExportError as in `run_at_export`."""
        rng = np.random.default_rng(0)
        if all(LENGTH not in spec.shape for spec in self.pipeline.signature.inputs):
            self._compare(drawn_inputs(self.manifest, rng, np.array([1, 1])), "2 inputs", {})
            return self._said("ran 2 inputs")
        usual: dict[str, float] = {}
        few = min(_FEW, self.manifest.max_positions or _FEW)
        for lengths in ((few, 1), (1,), (self.long,)):
            self._compare(drawn_inputs(self.manifest, rng, np.array(lengths)), _rows(lengths), usual)
        steps = self._generate(rng) if self.manifest.cached else ""
        return self._said(f"ran rows of 1, {few} and {self.long} tokens{steps}")

    def _said(self, ran: str) -> str:
        ran += "".join(f", but transformers does not run {what}" for what in self.beyond)
        if self.reference is None:
            return f"{ran}; not compared with transformers: {self.why_not}"
        return f"{ran}; largest difference to transformers {self.worst:.0e} of its values"

    def _compare(self, inputs: Mapping[str, Array], what: str, usual: dict[str, float]) -> None:
        try:
            want = None if self.reference is None else self.reference(inputs)
        except (RuntimeError, ValueError, IndexError) as error:  # what torch and transformers raise
            if usual:
                self.beyond += (what,)
                return
            want, self.reference = None, None  # it runs nothing that this could be compared with
            self.why_not = f"it does not run {what} ({first_line(error)})"
        try:
            got = self.pipeline.run(inputs)
        except StagelineError as error:
            raise ExportError(f"it does not run {what}: {error}") from error
        for spec in self.pipeline.signature.outputs:
            values = got if want is None else want
            ours, theirs = real_tokens(spec, got[spec.name], values[spec.name], inputs.get("attention_mask"))
            if want is None and not np.isfinite(ours).all():
                raise ExportError(f"{spec.name} is not finite for {what}")
            errors = token_errors(ours, theirs, usual.setdefault(spec.name, typical(theirs)))
            self._judge(errors, f"{spec.name} differs from transformers'", what)

    def _judge(self, errors: Array, how: str, what: str) -> None:
        error = float(np.quantile(errors, self.share, method="lower"))
        self.worst = max(self.worst, error)
        if not error <= TOLERANCE[self.manifest.dtype]:
            raise ExportError(f"for {what}, {how} by {error:.1e} of its values")

    def _generate(self, rng: np.random.Generator) -> str:
        """Read a prompt in chunks, then generate, and compare with the same row as a whole; returns it in words."""
        scaling = self.manifest.row_scaling
        room = min(self.pipeline.capacity or 0, scaling.shortest if scaling else _PROMPT + _STEPS)
        prompt, steps = min(_PROMPT, room - _STEPS), _STEPS
        if prompt < 1:
            return ""
        ids = drawn_inputs(self.manifest, rng, np.array([prompt]))["input_ids"][0].tolist()
        sampling = Sampling(max_tokens=steps, min_tokens=steps, logprobs=20, **_AS_THE_MODEL_SAYS)
        what = f"{words.counted(steps, 'token')} generated after {prompt}"
        try:
            choice = self.pipeline.submit(GenerationRequest(tuple(ids), sampling)).result().choices[0]
        except StagelineError as error:
            raise ExportError(f"it does not run {what}: {error}") from error
        row = np.array([[*ids, *choice.token_ids[:-1]]])
        whole = self.reference or self.pipeline.run
        logits = whole({"input_ids": row, "attention_mask": np.ones_like(row)})["logits"][0, prompt - 1 :]
        sure = torch.from_numpy(logits).double().log_softmax(-1).numpy()
        whose = "transformers'" if self.reference else "those of the whole row"
        largest = np.abs(logits).max(axis=-1).clip(min=typical(logits))
        errors = [max(abs(value - sure[step, token]) for token, value in one.top) / largest[step]
                  for step, one in enumerate(choice.logprobs)]  # fmt: skip
        self._judge(np.array(errors), f"logits differ from {whose}", what)
        return f", and {what}"


def _rows(lengths: Sequence[int]) -> str:
    if len(lengths) == 1:
        return f"a row of {words.counted(lengths[0], 'token')}"
    return f"rows of {' and '.join(map(str, lengths))} tokens"


def _reference(bundle: Bundle, wanted: Wanted) -> tuple[_Values | None, str]:
    """transformers' model in float32 with weights of the bundle's dtype, or as the export quantised them; None and why
    if there is none."""
    checkpoint, manifest = wanted.checkpoint, bundle.manifest
    size = 4 * sum(int(np.prod(entry.shape)) for entry in checkpoint.tensors.values())
    if size > COMPARED_BYTES:
        return None, f"the checkpoint has {words.size(size)} in float32"
    wanted.progress("comparing it with transformers")
    try:
        model = rounded(load_reference(checkpoint, manifest), manifest.dtype)
        model = with_quantised(model, checkpoint, bundle)
    except ExportError as error:
        return None, str(error)
    return lambda inputs: torch_values(model, checkpoint, manifest, inputs), ""
