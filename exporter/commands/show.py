"""What the `stageline` command prints: tables in plain text, bundles, and answers to texts."""

from collections.abc import Mapping, Sequence
from typing import Any

from stageline.runtime import words
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.graph import NOMINAL, size_bytes
from stageline.runtime.bundle.manifest import Manifest, TensorSpec
from stageline.runtime.engines.lowering.kept import kept


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart, numbers to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    right = [all(row[i][:1].isdigit() or row[i] in ("", "-") for row in rows) for i in range(len(head))]
    lines = []
    for row in (head, *rows):
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def bundle(opened: Bundle) -> str:
    """A bundle: what it is, its stages, and what crosses each cut."""
    manifest = opened.manifest
    head = [
        f"{manifest.architecture}, {manifest.task}, {manifest.dtype}: {manifest.blocks} blocks, "
        f"{opened.parameters:,} parameters, {words.size(opened.weight_bytes)} of weights",
        f"trace: {manifest.trace}",
        attention(manifest),
        *generation(manifest),
        *notes(manifest),
        *quantised(opened),
        "",
        table(
            ["stage", "blocks", "parameters", "weights"],
            [
                [str(n), f"{s.first_block}-{s.last_block}", f"{s.parameters:,}", words.size(s.weight_bytes)]
                for n, s in enumerate(manifest.stages)
            ],
        ),
    ]
    crossing = [
        [f"{n - 1} -> {n}", spec.name, spec.dtype, _shape(spec), words.size(size_bytes(spec.shape, spec.dtype))]
        for n, specs in enumerate(cuts(manifest), start=1)
        for spec in specs
    ]
    if crossing:
        sizes = " x ".join(f"{name} {size}" for name, size in NOMINAL.items())
        head += ["", table(["cut", "value", "dtype", "shape", f"at {sizes}"], crossing)]
    return "\n".join(head)


def quantised(opened: Bundle) -> list[str]:
    """How weights are quantised, and what each engine makes of them, a line for each way."""
    lines = []
    for way in kept(opened.weights.values()):
        settings = " ".join(str(value) if name == "type" else f"{name} {value}" for name, value in way.settings.items())
        engines = ((name, getattr(way, name)) for name in ("onnxruntime", "openvino"))
        said = ", ".join(f"{name} {'unpacks them' if bits is None else f'keeps {bits} bits'}" for name, bits in engines)
        lines.append(
            f"quantised: {words.counted(way.count, 'weight')}, {way.method} {settings}, "
            f"{8 * way.size_bytes / way.parameters:.2f} bits each; {said}, engines for GPUs unpack them"
        )
    return lines


def notes(manifest: Manifest) -> list[str]:
    """What the export ran of the bundle, and what a user should know of it, a line each."""
    checked = [f"checked: {manifest.checked}"] if manifest.checked else []
    kept = manifest.float32_nodes.model_dump() if manifest.float32_nodes else {}
    wide = [f"in float32 in engines of {half}: {', '.join(names)}" for half, names in kept.items() if names]
    return [*checked, *(f"note: {note}" for note in manifest.notes), *wide]


def generation(manifest: Manifest) -> list[str]:
    """What the checkpoint says of generation, in one line; none if it says nothing."""
    stated = manifest.generation.model_dump(exclude_none=True) if manifest.generation else {}
    ends = stated.pop("end_ids", ())
    said = [f"end tokens {', '.join(map(str, ends))}"] if ends else []
    said += [f"{name} {_shortened(value)}" for name, value in stated.items()]
    return [f"generation defaults of the checkpoint: {'; '.join(said)}"] if said else []


def _shortened(value: Any) -> str:
    return f"of {len(value)}" if isinstance(value, tuple) and len(value) > 8 else str(value)


def attention(manifest: Manifest) -> str:
    """How attention was traced, in one line."""
    how = {
        None: "not recorded",
        "cache": "with a KV cache",
        "cache-torch": "with a KV cache, in place of torch's function",
        "fused": "as one operator",
        "primitive": "as the model computes it",
    }.get(manifest.attention, manifest.attention)
    without = f"; no KV cache: {manifest.no_cache_reason}" if manifest.no_cache_reason else ""
    return f"attention: {how}{without}"


def cuts(manifest: Manifest) -> list[list[TensorSpec]]:
    """The values that cross each cut: made before it and read after it. The model's inputs are left out, because every
    stage can have them."""
    given = {spec.name for spec in manifest.inputs}
    result = []
    for number in range(1, len(manifest.stages)):
        later = {spec.name: spec for stage in manifest.stages[number:] for spec in stage.inputs}
        made = {spec.name for stage in manifest.stages[:number] for spec in stage.outputs}
        result.append([spec for name, spec in later.items() if name in made - given])
    return result


def answer(task: str, texts: Sequence[str], result: Mapping[str, Any]) -> str:
    """A pipeline's answers to texts, one or more lines per text."""
    if task == "sentence-similarity":
        return _similarity(texts, result)
    lines: list[str] = []
    for number, text in enumerate(texts):
        lines.append(text)
        if task == "feature-extraction":
            found = result["features"][number]
            lines.append(f"  {found['shape']}  {_numbers(found['first'])}")
        elif task in ("text-classification", "image-classification"):
            written = _number if result["activation"] == "none" else _percent
            lines += [f"  {written(one)}  {one['label']}" for one in result["labels"][number]]
        elif task == "token-classification":
            lines += [f"  {one['token']}  {one['label']}" for one in result["tokens"][number]]
        elif task == "fill-mask":
            for place, tokens in enumerate(result["masks"][number]):
                lines += [f"  mask {place}"] + [f"  {_percent(one)}  {one['token']!r}" for one in tokens]
        else:
            lines += [f"  {_percent(one)}  {one['token']!r}" for one in result["next"][number]]
            lines.append(f"  continues: {result['continuations'][number]!r}")
    return "\n".join(lines)


def _similarity(texts: Sequence[str], result: Mapping[str, Any]) -> str:
    if len(texts) == 1:
        vector = result["embeddings"][0]
        return f"{texts[0]}\n  [{len(vector)}]  {_numbers(vector[:5])}"
    rows = [
        [str(n), *(f"{cosine:.3f}" for cosine in row), text]
        for n, (row, text) in enumerate(zip(result["similarity"], texts, strict=True))
    ]
    return table(["", *(str(n) for n in range(len(texts))), "text"], rows)


def _percent(one: Mapping[str, Any]) -> str:
    return f"{100 * one['probability']:5.1f} %"


def _number(one: Mapping[str, Any]) -> str:
    return f"{one['probability']:8.4f}"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values) + " ..."


def _shape(spec: TensorSpec) -> str:
    return f"[{', '.join(map(str, spec.shape))}]"
