"""Exporting a checkpoint to a bundle: trace the model, write its parts, place the weights, stitch the stages."""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
from stageline.exporter import classifier, skeleton, tasks
from stageline.exporter.calibration import calibrated, first_tokens
from stageline.exporter.cut import PartGraph
from stageline.exporter.generation_defaults import generation_defaults
from stageline.exporter.gguf import config as gguf_config
from stageline.exporter.images import image_settings
from stageline.exporter.quantise.choice import Quantisation
from stageline.exporter.sentence_head import place_head
from stageline.exporter.tasks import reads_images
from stageline.exporter.tokenizer import write_tokenizer
from stageline.exporter.trace import OPSET
from stageline.exporter.trace_model import Dtype, TracedModel, Wanted, trace_model
from stageline.exporter.verify.at_export import check_runs_here, run_at_export
from stageline.exporter.weights import GGUF_FLOATING, Placed, linked_note, majority_dtype, place
from stageline.models.checkpoint import Checkpoint
from stageline.models.cross_encoder import cross_encoder
from stageline.models.errors import ExportError
from stageline.models.new_folder import new_folder
from stageline.models.quantisation import check_plain
from stageline.models.sentence import pooling
from stageline.models.tensors import PackedEntry, TensorEntry
from stageline.runtime.bundle.folder import Bundle, file_entry, tensors_of, write_manifest
from stageline.runtime.bundle.graph import CACHE_ATTENTION, cache_of
from stageline.runtime.bundle.manifest import Manifest, Part, TensorSpec, UncutManifest
from stageline.runtime.bundle.recut import plan_stages, write_stages


def export(
    path: str | Path,
    bundle: str | Path,
    *,
    stages: int | Sequence[int] = 1,
    dtype: Dtype | None = None,
    task: str | None = None,
    quantise: Quantisation | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Bundle:
    """Export the checkpoint at `path` to a new bundle folder.

    `stages` is how many, or how many blocks each has. Default for `dtype`: the checkpoint's own, and weights that it
    has quantised stay as they are; with a `dtype` they are written with that. Default for `task`: the one that the
    checkpoint was saved for. With `quantise`, matrices are rounded to whole numbers. `progress` is called with the name
    of each step when it begins. The bundle appears complete or not at all. StagelineError if it cannot be made.
    """
    check_runs_here()
    progress("reading the checkpoint")
    wanted = _wanted(Path(path), stages, dtype, task, quantise, progress)
    first = first_tokens(wanted) if quantise is not None and quantise.method == "gptq" else None
    target = Path(bundle)
    with new_folder(target) as folder:
        progress("tracing")
        traced = trace_model(wanted)
        parts = tuple(_write_part(folder, number, part) for number, part in enumerate(traced.parts))
        schemes = traced.schemes if first is None else calibrated(wanted, traced, first)
        progress("placing weights")
        weights = place(
            traced.weights, traced.task.model, wanted.dtype, folder, wanted.notes, wanted.keep_packed, schemes
        )
        if wanted.pooling is not None:
            weights.files.extend(place_head(wanted.pooling, wanted.checkpoint, wanted.dtype, folder, wanted.notes))
        wanted.notes.extend(linked_note(folder, weights.files))
        progress("stitching stages")
        uncut = _manifest(wanted, traced, folder, parts, weights)
        manifest = _stitch(folder, uncut, stages)
        write_manifest(folder, manifest)
        checked = run_at_export(Bundle(folder, manifest, tensors_of(folder, manifest)), wanted)
        manifest = manifest.model_copy(update={"checked": checked})
        write_manifest(folder, manifest)
    return Bundle(target, manifest, tensors_of(target, manifest))


def _wanted(
    path: Path,
    stages: int | Sequence[int],
    dtype: Dtype | None,
    task: str | None,
    quantise: Quantisation | None,
    progress: Callable[[str], None],
) -> Wanted:
    """What to trace, with the choices that the checkpoint makes if the caller does not."""
    checkpoint = Checkpoint.open(path)
    check_plain(checkpoint)
    if quantise is not None and dtype is None:
        _check_floats(checkpoint)
    head = pooling(checkpoint) if checkpoint.kind == "safetensors" else None
    scored = None
    if checkpoint.kind == "safetensors" and task in (None, "text-classification"):
        scored = cross_encoder(checkpoint)
    config = skeleton.config_of(gguf_config.config(checkpoint) if checkpoint.kind == "gguf" else checkpoint.config)
    task = task or tasks.task_of(config, head)
    if scored is not None and task != "text-classification":
        raise ExportError(
            f"{path} is a CrossEncoder made of a model for {task}, which is not supported; --task {task} exports it "
            "without its scores"
        )
    if task == "sentence-similarity" and head is None:
        raise ExportError(
            f"{path} does not state how to pool a sentence (it has no modules.json); use --task feature-extraction"
        )
    chosen: Dtype = dtype or majority_dtype(checkpoint)  # type: ignore[assignment]
    notes = [
        *(gguf_config.notes(checkpoint) if checkpoint.kind == "gguf" else ()),
        *tasks.notes_of(config, task),
    ]
    sentence = head if task == "sentence-similarity" else None
    image = image_settings(checkpoint, notes) if reads_images(config, task) else None
    return Wanted(
        checkpoint, config, task, chosen, sentence, stages, progress, scored, image, notes, dtype is None, quantise
    )


def _check_floats(checkpoint: Checkpoint) -> None:
    """ExportError if weights are quantised already."""
    for name, entry in checkpoint.tensors.items():
        gguf = checkpoint.kind == "gguf" and entry.dtype not in GGUF_FLOATING
        if gguf or isinstance(entry, PackedEntry):
            how = entry.dtype if isinstance(entry, TensorEntry) else entry.packing.method
            raise ExportError(
                f"{checkpoint.path} is quantised already ({name}: {how}), and stays as it is without --quantise; give "
                "the checkpoint that it was made of, or --dtype float32 to unpack it first"
            )


def _write_part(folder: Path, number: int, part: PartGraph) -> Part:
    """Write the graph of part `number`, and return its entry in the manifest."""
    file = f"parts/{number}-{part.model.graph.name}.onnx"
    (folder / "parts").mkdir(exist_ok=True)
    ir.save(part.model, folder / file)
    nodes = [node for node in part.model.graph if node.op_type == CACHE_ATTENTION]
    caches = tuple(cache_of(node, str(count)) for count, node in enumerate(nodes))
    return Part(file=file, inputs=part.inputs, outputs=part.outputs, weights=part.weights, caches=caches)


def _stitch(folder: Path, uncut: UncutManifest, stages: int | Sequence[int]) -> Manifest:
    """Write the stages, from the parts as any later re-cut will read them."""
    parts = [ir.load(folder / part.file) for part in uncut.parts]
    written, entries = write_stages(folder, uncut, tensors_of(folder, uncut), parts, plan_stages(uncut, parts, stages))
    return Manifest(**{**dict(uncut), "stages": tuple(written), "files": (*uncut.files, *entries)})


def _manifest(
    wanted: Wanted, traced: TracedModel, folder: Path, parts: tuple[Part, ...], weights: Placed
) -> UncutManifest:
    config, last = wanted.config, traced.uses[-1]
    final = {last.writes[spec.name]: spec for spec in parts[last.part].outputs}
    places = [skeleton.max_positions(traced.task.model), traced.longest]
    max_positions = min((limit for limit in places if limit is not None), default=None)
    text, extra = write_tokenizer(wanted, folder, max_positions)
    return UncutManifest(
        version=5 if weights.packed else 4,
        task=wanted.task,
        architecture=config.model_type,
        dtype=wanted.dtype,
        opset=OPSET,
        inputs=tuple(
            TensorSpec(name=i.name, dtype=str(i.dtype).removeprefix("torch."), shape=i.shape)
            for i in traced.task.inputs
        ),
        outputs=tuple(final[name].model_copy(update={"name": name}) for name in traced.task.output_names),
        vocabulary=getattr(config.get_text_config(), "vocab_size", None),
        max_positions=max_positions,
        row_scaling=traced.task.row_scaling,
        text=text,
        image=wanted.image,
        parts=parts,
        uses=traced.uses,
        labels=classifier.labels(wanted),
        activation=classifier.activation(wanted),
        generation=generation_defaults(wanted) if wanted.task == "text-generation" else None,
        packed=weights.packed or None,
        weight_files=tuple(entry.path for entry in weights.files),
        files=(*(file_entry(folder, part.file) for part in parts), *weights.files, *extra),
        trace=traced.how,
        attention=traced.attention,
        refused=traced.refused,
        no_cache_reason=traced.no_cache_reason,
        notes=tuple(wanted.notes),
        made_by={name: version(name) for name in ("stageline", "torch", "transformers", "onnxscript", "onnx-ir")},
    )
