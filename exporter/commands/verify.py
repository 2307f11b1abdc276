"""The command `stageline verify`."""

import secrets
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from stageline.exporter.commands import common, hub, show
from stageline.runtime import words
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.engines import ON_GPUS
from stageline.runtime.engines.tensorrt.lower import Precision, default_precision
from stageline.runtime.options import PipelineOptions

if TYPE_CHECKING:
    from stageline.exporter.verify.engines import EngineComparison


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("verify")(verify_command)


def verify_command(
    bundle: hub.BundleArgument,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="The checkpoint that was exported, or its name on the Hub; needed for engines on CPUs.",
        ),
    ] = None,
    engine: Annotated[common.EngineName, typer.Option(help="The engine to verify.")] = "onnxruntime",
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="tensorrt: verify the engines of this precision (default: the last built; emulated: fp16, of a "
            "bfloat16 bundle bf16)."
        ),
    ] = None,
    emulated: Annotated[
        bool,
        typer.Option("--emulated", help="tensorrt: emulate the engines on CPU cores, rounding as they would."),
    ] = False,
    inner_values: Annotated[
        bool, typer.Option("--inner-values", help="--emulated: compare every value inside the stages.")
    ] = False,
    find_precision: Annotated[
        bool,
        typer.Option(
            "--find-precision",
            help="Find the nodes that must stay float32 in engines of fp16 or bf16, and let build keep them so.",
        ),
    ] = False,
    perplexity: Annotated[
        bool,
        typer.Option(
            "--perplexity",
            help="Measure the perplexity of texts, beside the checkpoint's in float32 with --against.",
        ),
    ] = False,
    texts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="--perplexity: a text per line (default: ten built in).")
    ] = None,
    as_json: common.JsonOption = False,
) -> None:
    """Compare a bundle with its checkpoint: its stages with torch on random inputs, and its answers to texts.

    Each stage is compared alone, and all of them together, for rows of several lengths up to the model's positions. The
    reference is transformers with eager attention in float32, its weights rounded to the bundle's dtype. Texts are read
    and answered by transformers' tokenizer, pipelines and generate, or by sentence-transformers where it is installed.
    Exits with 1 if an error is larger than 1e-4 (float32), 2e-3 (float16) or 1e-2 (bfloat16) of torch's largest value
    for the same token (or for the median token, if that is larger), if an answer's is larger than 1e-4, 1e-2 or 6e-2 of
    its largest value, or if a text becomes other tokens.

    With --engine tensorrt or onnxruntime-cuda, each stage on the GPU is compared with ONNX Runtime in float32 on CPU
    cores: 9 of 10 tokens must be within 1e-3 (fp32), 1e-2 (fp16) or 6e-2 (bf16), and all values finite. For int8, fp8
    and int4 the reference has the same quantised weights and the bound is 1e-2, of a bfloat16 bundle 6e-2; the error
    that quantising adds is shown.

    With --find-precision, stages are emulated on CPU cores. For each that fails, the first value beyond the tolerance
    is shown, and a smallest set of nodes that must compute in float32: without any one of them, it fails. The set is
    written into the bundle's manifest, where stageline build finds it.

    stageline verify BUNDLE --perplexity --against CHECKPOINT measures instead what quantised weights cost a model that
    generates: exp of the mean surprise of each token of some texts, and how often the likeliest token is the
    checkpoint's.

    Example: stageline verify minilm.bundle --against models/checkpoints/minilm
    """
    if find_precision:
        _find_precision(hub.bundle_of(bundle), precision, as_json)
    if texts is not None and not perplexity:
        raise common.UsageError("--texts is for --perplexity")
    if perplexity:
        _perplexity(hub.bundle_of(bundle), against, engine, texts, as_json)
    if engine not in ON_GPUS and against is None:
        raise common.UsageError("give --against and the checkpoint that the bundle was exported from")
    bundle = hub.bundle_of(bundle)
    if engine == "tensorrt":
        _verify_tensorrt(bundle, precision, emulated, inner_values, as_json)
    if engine == "onnxruntime-cuda":
        _verify_cuda(bundle, as_json)
    assert against is not None
    with common.needs(*common.EXPORTER):
        from stageline.exporter.verify.against_torch import verify
    checkpoint = hub.checkpoint_of(against)
    with common.progress_steps() as progress:
        done = verify(bundle, checkpoint, seed=secrets.randbits(32), engine=engine, progress=progress)
    rows = [
        ["whole" if c.stage is None else f"stage {c.stage}", c.value, f"{c.max_error:.1e}", f"{c.mean_error:.1e}",
         f"{c.relative_error:.1e}", "ok" if c.passed else "FAILED"]
        for c in done.comparisons
    ] + [
        [t.step, t.value, "", "", f"{t.relative_error:.1e}", "ok" if t.passed else f"FAILED: {_short(t.worst)}"]
        for t in done.texts
    ]  # fmt: skip
    compared = show.table(["what", "value", "max error", "mean error", "relative", ""], rows)
    verdict = "agrees with torch" if done.passed else "DIFFERS from torch"
    comparisons = [{**asdict(c), "passed": c.passed} for c in done.comparisons]
    answers = [{**asdict(t), "passed": t.passed} for t in done.texts]
    common.print_result(
        as_json,
        {**asdict(done), "comparisons": comparisons, "texts": answers, "passed": done.passed},
        f"{compared}\n{bundle} {verdict} ({done.dtype}: relative error up to {done.tolerance:.0e}; seed {done.seed})",
    )
    raise typer.Exit(0 if done.passed else 1)


def _perplexity(bundle: Path, against: Path | None, engine: str, file: Path | None, as_json: bool) -> NoReturn:
    with common.needs(*common.EXPORTER):
        from stageline.exporter.verify.perplexity import evaluation_texts, perplexity
    from stageline.runtime.bench.inputs import read_texts

    texts = evaluation_texts() if file is None else read_texts(file)
    checkpoint = None if against is None else hub.checkpoint_of(against)
    with common.progress_steps() as progress:
        done = perplexity(bundle, checkpoint, texts, PipelineOptions(engine=engine), progress)
    lines = [
        f"{bundle}: perplexity {done.perplexity:.3f} of {done.tokens:,} tokens of {words.counted(done.texts, 'text')} "
        f"(windows of {done.window}, {engine})"
    ]
    if done.reference_perplexity is not None:
        lines.append(
            f"{against} in float32: {done.reference_perplexity:.3f}; the bundle's is {done.increase:+.2%}, and its "
            f"likeliest token the same for {done.agreement:.1%}"
        )
    document = {"bundle": str(bundle), "engine": engine, **asdict(done), "increase": done.increase}
    common.print_result(as_json, document, "\n".join(lines))
    raise typer.Exit(0)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _verify_cuda(bundle: Path, as_json: bool) -> NoReturn:
    from stageline.exporter.verify.engines import verify_cuda

    seed = secrets.randbits(32)
    with common.progress_steps() as progress:
        done = verify_cuda(bundle, seed=seed, progress=progress)
    _print_verdict(bundle, done, seed, as_json)


def _verify_tensorrt(
    bundle: Path, precision: Precision | None, emulated: bool, inner_values: bool, as_json: bool
) -> NoReturn:
    from stageline.exporter.verify.engines import verify_emulated, verify_engines

    if inner_values and not emulated:
        raise common.UsageError("--inner-values needs --emulated")
    seed = secrets.randbits(32)
    with common.progress_steps() as progress:
        if emulated:
            done = verify_emulated(bundle, precision, layers=inner_values, seed=seed, progress=progress)
        else:
            done = verify_engines(bundle, precision, seed=seed, progress=progress)
    _print_verdict(bundle, done, seed, as_json)


def _print_verdict(bundle: Path, done: "Sequence[EngineComparison]", seed: int, as_json: bool) -> NoReturn:
    passed = all(c.passed for c in done)
    tolerances = ", ".join(dict.fromkeys(f"{c.precision} {c.tolerance:.0e}" for c in done))
    common.print_result(
        as_json,
        {"comparisons": [{**asdict(c), "passed": c.passed} for c in done], "passed": passed, "seed": seed},
        f"{_compared(done)}\n{bundle} {'agrees with' if passed else 'DIFFERS from'} ONNX Runtime "
        f"({tolerances}; seed {seed})",
    )
    raise typer.Exit(0 if passed else 1)


def _compared(done: "Sequence[EngineComparison]") -> str:
    """A table of comparisons of engines with ONNX Runtime."""
    rows = [
        [f"stage {c.stage}", c.value, c.precision, f"{c.median_error:.1e}", f"{c.p90_error:.1e}", f"{c.max_error:.1e}",
         c.shown or ("ok" if c.passed else "FAILED")]
        for c in done
    ]  # fmt: skip
    return show.table(["what", "value", "precision", "median", "9 of 10", "max", ""], rows)


def _find_precision(path: Path, precision: Precision | None, as_json: bool) -> NoReturn:
    """Search, write what was found, and verify it on inputs that the search has not seen."""
    from stageline.exporter.verify.engines import verify_emulated
    from stageline.exporter.verify.precision_search import find_precision

    opened = Bundle.open(path)
    half = precision or default_precision(opened.manifest.dtype)
    if half not in ("fp16", "bf16"):
        raise typer.BadParameter(f"{half} keeps no nodes in float32; choose fp16 or bf16", param_hint="--precision")
    seed = secrets.randbits(32)
    with common.progress_steps() as progress:
        found = find_precision(opened, half, seed=seed, progress=progress)
        progress("verifying on other inputs")
        done = verify_emulated(path, half, layers=False, seed=seed + 1, progress=lambda step: None)
    passed = all(c.passed for c in done)
    lines = []
    for stage in found:
        if stage.first is None:
            lines.append(f"stage {stage.stage}: passes in {half} as it is")
            continue
        first = stage.first
        lines += [
            f"stage {stage.stage}: {first.value} is the first value beyond {first.tolerance:.0e}: it errs by "
            f"{first.p90_error:.1e} at 9 of 10 tokens, by {first.max_error:.1e} at the worst",
            f"  in float32 ({stage.trials} trials): {', '.join(stage.nodes)}",
        ]
    count = sum(len(stage.nodes) for stage in found)
    kept = f"{words.counted(count, 'node')} in float32" if count else "no nodes in float32"
    lines += ["", _compared(done), f"{path}: engines of {half} keep {kept}; seed {seed}"]
    document = {
        "precision": half,
        "stages": [asdict(stage) for stage in found],
        "comparisons": [{**asdict(c), "passed": c.passed} for c in done],
        "passed": passed,
        "seed": seed,
    }
    common.print_result(as_json, document, "\n".join(lines))
    raise typer.Exit(0 if passed else 1)
