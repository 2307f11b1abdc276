"""Verifying a bundle: each stage alone, and all of them together, against torch on fresh random inputs, then texts.

The reference is transformers with eager attention, in float32, loaded from the checkpoint, its weights rounded to the
bundle's dtype; weights that the export quantised are the bundle's own: what quantising costs is for `--perplexity`. A
stage gets torch's values as its inputs, so an error shows in the stage that makes it. An error is a
fraction of how large torch's values are (stageline.exporter.verify.scale). The tolerances leave room for another order
of summation (float32), and for constants of the model's code that are rounded to 11 and 8 bits (the halves).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from stageline.exporter import skeleton, tasks
from stageline.exporter.gguf import config as gguf_config
from stageline.exporter.sentence_head import loaded_head
from stageline.exporter.standard_names import folder_for_transformers
from stageline.exporter.verify.from_image import compare_images
from stageline.exporter.verify.from_text import TextComparison, compare_texts
from stageline.exporter.verify.gguf_reference import load_gguf_reference
from stageline.exporter.verify.random_inputs import long_inputs, random_inputs
from stageline.exporter.verify.rows_alone import rows_alone
from stageline.exporter.verify.scale import token_errors, typical
from stageline.exporter.weights import find, kept_wide
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import ExportError
from stageline.models.packing import dequantised, read
from stageline.models.tensors import PackedEntry
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import Manifest, TensorSpec
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.devices.base import on_host
from stageline.runtime.devices.cpu import CpuDevice, allowed_cores
from stageline.runtime.engines import Array, StageFile, engine_factory
from stageline.runtime.pipeline import Pipeline
from torch.utils import _pytree

TOLERANCE = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}
_OF_TEXTS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}  # sentence-transformers' weights are not rounded


@dataclass(frozen=True)
class TorchComparison:
    """One value of one stage, or of the whole pipeline (`stage` is None), against torch's.

    `max_error` and `mean_error` are absolute; `relative_error` is the largest one as a fraction of torch's values.
    """

    stage: int | None
    value: str
    max_error: float
    mean_error: float
    relative_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the relative error is within the tolerance; NaN is not."""
        return self.relative_error <= self.tolerance


@dataclass(frozen=True)
class Verification:
    """All comparisons of a bundle: of stages on random rows, each the worst of short and long rows, and of texts.
    `lengths` are the real tokens in each row of the inputs, if any."""

    dtype: str
    tolerance: float
    seed: int
    lengths: tuple[int, ...]
    comparisons: tuple[TorchComparison, ...]
    texts: tuple[TextComparison, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every comparison passed."""
        return all(each.passed for each in self.comparisons) and all(each.passed for each in self.texts)


def verify(
    path: str | Path,
    against: str | Path,
    *,
    seed: int,
    engine: str = "onnxruntime",
    progress: Callable[[str], None] = lambda step: None,
) -> Verification:
    """Compare the bundle in an engine for CPUs with the checkpoint it was made from, on random inputs drawn from
    `seed`.

    StagelineError if one cannot be opened, or they are of different models. An error that is too large is not an
    exception, but a comparison that did not pass.
    """
    progress("opening the bundle")
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    checkpoint = Checkpoint.open(Path(against))
    progress("loading the checkpoint into torch")
    model = with_quantised(rounded(load_reference(checkpoint, manifest), manifest.dtype), checkpoint, bundle)
    tolerance = TOLERANCE[manifest.dtype]
    with Pipeline.open(path, engine=engine, quantise=manifest.exact) as pipeline:
        drawn = [inputs for inputs in (random_inputs(manifest, seed), long_inputs(manifest, seed)) if inputs]
        progress("torch computes the same")
        references = [torch_values(model, checkpoint, manifest, inputs) for inputs in drawn]
        compared = _compare_all(pipeline, list(zip(drawn, references, strict=True)), engine, progress)
        progress(f"from {'image' if manifest.image else 'text'} to answer")
        most = _OF_TEXTS[manifest.dtype]
        if manifest.image is not None:
            texts = compare_images(pipeline, manifest.image, checkpoint, model, most)
        else:
            texts = compare_texts(pipeline, checkpoint, model, most)
    masks = [inputs["attention_mask"] for inputs in drawn if "attention_mask" in inputs]
    lengths = tuple(int(length) for mask in masks for length in mask.sum(axis=1))
    return Verification(manifest.dtype, tolerance, seed, lengths, compared, texts)


def _compare_all(
    pipeline: Pipeline,
    drawn: Sequence[tuple[Mapping[str, Array], Mapping[str, Array]]],
    engine: str,
    progress: Callable[[str], None],
) -> tuple[TorchComparison, ...]:
    """Each stage alone, and the whole pipeline, on each inputs that were drawn, with torch's values for them: of each
    value the worst of these. How large a token of a value is, the first inputs tell."""
    bundle = pipeline.bundle
    manifest, signature = bundle.manifest, Signature.of(bundle.manifest)

    def compare(stage: int | None, spec: TensorSpec, got: Sequence[Array]) -> TorchComparison:
        pairs = [
            real_tokens(spec, one, reference[spec.name], inputs.get("attention_mask"))
            for one, (inputs, reference) in zip(got, drawn, strict=True)
        ]
        usual, tolerance = typical(pairs[0][1]), TOLERANCE[manifest.dtype]
        return max((_compared(stage, spec.name, *pair, usual, tolerance) for pair in pairs), key=_badness)

    comparisons = []
    values = [dict(signature.check_inputs(inputs)[0]) for inputs, _ in drawn]
    for number, stage in enumerate(manifest.stages):
        progress(f"stage {number + 1} of {len(manifest.stages)}")
        given = [
            {spec.name: reference.get(spec.name, known.get(spec.name)) for spec in stage.inputs}
            for known, (_, reference) in zip(values, drawn, strict=True)
        ]
        outputs = _run_stage(bundle, number, given, engine)
        for known, output in zip(values, outputs, strict=True):
            known.update(output)
        comparisons += [
            compare(number, spec, [output[spec.name] for output in outputs])
            for spec in stage.outputs
            if spec.name in drawn[0][1]
        ]
    progress("the whole pipeline")
    whole = [pipeline.run(inputs) for inputs, _ in drawn]
    comparisons += [compare(None, spec, [output[spec.name] for output in whole]) for spec in signature.outputs]
    return tuple(comparisons)


def torch_values(
    model: Any, checkpoint: Checkpoint, manifest: Manifest, inputs: Mapping[str, Array]
) -> dict[str, Array]:
    """The reference model's values for these inputs at every cut (`hidden.K`) and for every output, by the manifest's
    names. Rows are computed alone where transformers would let them depend on each other."""
    head = loaded_head(checkpoint) if manifest.task == "sentence-similarity" else None
    names = tuple(spec.name for spec in manifest.outputs)
    size = manifest.image.size if manifest.image else None
    # A bundle with a cache takes no token types, which the model might.
    read = tuple(i for i in skeleton.inputs_of(model, torch.float32, size) if i.name in inputs)
    task = skeleton.Task(model, read, names, head).eval()
    crossing = {spec.name for stage in manifest.stages for spec in stage.outputs}
    wanted = {
        (use.module, use.call): f"hidden.{block + 1}"
        for block, use in enumerate(manifest.uses[1:-1])
        if f"hidden.{block + 1}" in crossing
    }
    values: dict[str, Array] = {}
    calls: dict[str, int] = {}

    def hook(path: str) -> Any:
        def after(module: torch.nn.Module, args: Any, output: Any) -> None:
            call = calls[path] = calls.get(path, -1) + 1
            if (path, call) in wanted:
                values[wanted[path, call]] = _pytree.tree_leaves(output)[0].numpy().copy()

        return after

    modules = dict(model.named_modules())
    hooks = []
    for path in dict.fromkeys(path for path, _ in wanted):
        if path not in modules:
            raise ExportError(
                f"{checkpoint.path} has no module {path}, which the bundle was traced from; "
                "give the checkpoint that the bundle was exported from"
            )
        hooks.append(modules[path].register_forward_hook(hook(path)))

    def compute(given: Mapping[str, Array]) -> dict[str, Array]:
        calls.clear()
        with torch.no_grad():
            outputs = task(*(torch.from_numpy(given[name]) for name in task.input_names))
        return {**values, **{name: output.numpy() for name, output in zip(names, outputs, strict=True)}}

    try:
        return rows_alone(model, compute, inputs)
    finally:
        for one in hooks:
            one.remove()


def load_reference(checkpoint: Checkpoint, manifest: Manifest, attention: str = "eager") -> Any:
    """The checkpoint's model in float32, with the weights that transformers loads; `attention` is transformers' name.
    ExportError if it is not the bundle's."""
    kind = _config(checkpoint).model_type
    if kind != manifest.architecture:
        raise ExportError(
            f"{checkpoint.path} is a {kind}, the bundle was made from a {manifest.architecture}; "
            "give the checkpoint that the bundle was exported from"
        )
    return load_model(checkpoint, manifest.task, attention)


def _config(checkpoint: Checkpoint) -> Any:
    return skeleton.config_of(gguf_config.config(checkpoint) if checkpoint.kind == "gguf" else checkpoint.config)


def load_model(checkpoint: Checkpoint, task: str, attention: str) -> Any:
    """The model for a task in float32, with the weights that transformers loads. ExportError if it cannot."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = _config(checkpoint)
    if hasattr(config, "quantization_config"):  # the folder's weights are unpacked
        del config.quantization_config
    factory = tasks.class_of(config, task)
    try:
        if checkpoint.kind == "gguf":
            return load_gguf_reference(checkpoint, factory, attention).eval()
        with folder_for_transformers(checkpoint) as folder:
            model = factory.from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation=attention,
                local_files_only=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ExportError(
            f"transformers cannot load {checkpoint.path}: {' '.join(str(error).split())[:300]}"
        ) from error
    return model.eval()


def rounded(model: Any, dtype: str) -> Any:
    """The same model, its floating tensors rounded to what `dtype` holds, as the export rounds them."""
    tensors = model.state_dict()
    wide = kept_wide(model, dtype, tensors)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and name not in wide:
                tensor.copy_(tensor.to(getattr(torch, dtype)))
    return model


def with_quantised(model: Any, checkpoint: Checkpoint, bundle: Bundle) -> Any:
    """The same model, with the bundle's values of the weights that are quantised there and not in the checkpoint."""
    packed = bundle.manifest.packed or {}
    if checkpoint.kind == "gguf":
        made = {name for name, held in packed.items() if held.method != "gguf"}
    else:
        made = {name for name in packed if not isinstance(checkpoint.tensors.get(name), PackedEntry)}
    if not made:
        return model
    names, tensors = find(checkpoint, model).names, model.state_dict()
    with torch.no_grad():
        for name, source in names.items():
            if source in made and name in tensors:
                entry = bundle.tensors[source]
                assert isinstance(entry, PackedEntry)
                tensors[name].copy_(torch.from_numpy(dequantised(entry.packing, read(entry))))
    return model


def _badness(comparison: TorchComparison) -> float:
    return float("inf") if np.isnan(comparison.relative_error) else comparison.relative_error


def _run_stage(
    bundle: Bundle, number: int, inputs: Sequence[Mapping[str, Array | None]], engine: str
) -> list[dict[str, Array]]:
    """The outputs of a stage, opened once, for each of `inputs`."""
    stage = bundle.manifest.stages[number]
    file = StageFile(number, bundle.path / stage.file, bundle.path, stage.caches)
    names = [spec.name for spec in stage.outputs]
    opened = engine_factory(engine)(file, CpuDevice(allowed_cores()), None, bundle.manifest.exact)
    try:
        return [
            on_host(opened.run({name: value for name, value in given.items() if value is not None}, names), names)
            for given in inputs
        ]
    finally:
        opened.close()


def real_tokens(spec: TensorSpec, got: Array, want: Array, mask: Array | None) -> tuple[Array, Array]:
    """The bundle's and torch's values without those of padding: what a model computes there has no meaning. ExportError
    if they are of different shapes."""
    if got.shape != want.shape:
        raise ExportError(
            f"{spec.name} has shape {list(got.shape)} in the bundle and {list(want.shape)} in torch; "
            "give the checkpoint that the bundle was exported from"
        )
    if mask is not None and got.shape[:2] == mask.shape:
        return got[mask == 1], want[mask == 1]
    return got, want


def _compared(
    stage: int | None, value: str, got: Array, want: Array, usual: float, tolerance: float
) -> TorchComparison:
    error = np.abs(np.subtract(got, want, dtype=np.float32))
    relative = float(token_errors(got, want, usual).max(initial=0))
    return TorchComparison(stage, value, float(error.max()), float(error.mean(dtype=np.float64)), relative, tolerance)
