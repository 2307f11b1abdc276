"""Parts of gpu_proof.py: others beside it, with the same models. torch and transformers, and TensorRT's engines."""

import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from gpu_parity import check_steps, check_tokens
from gpu_results import MissingError, Results, need_gpu, need_materials, need_torch
from gpu_speed import BATCHES, CAPACITY, DECODED, ENCODED, NEW, PROMPT, ROWS, decode_shape
from stageline.models.errors import EngineError, StagelineError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.engines.lowering.onnxruntime import first_line

CONFIG = "config.json"
"""The model's config, which a shape has beside its bundle."""
DEVICE = "cuda"


def torch_beside(materials: Path, results: Results) -> None:
    """transformers' `generate` with a growing cache (eager) and with a static one (compiled), and torch's encoders."""
    torch = need_torch()
    folders = {folder.name: folder for folder in need_materials(materials / "shapes")}
    try:
        import transformers
    except ImportError as error:
        raise MissingError("transformers is not installed") from error
    results.add(torch=torch.__version__, transformers=transformers.__version__)
    for name in (*DECODED, *ENCODED):
        if name not in folders:
            continue
        config = transformers.AutoConfig.for_model(**json.loads((folders[name] / CONFIG).read_text()))
        kind = transformers.AutoModelForCausalLM if name in DECODED else transformers.AutoModel
        with torch.device(DEVICE):
            model = kind.from_config(config, dtype=torch.bfloat16).eval()
        measure = _generates if name in DECODED else _encodes
        try:
            with torch.no_grad():
                measure(torch, model, name, results)
        except Exception as error:  # of any library below; the other shapes are still of use
            results.add(shape=name, error=f"{type(error).__name__}: {first_line(error)}", ok=False)
        del model
        torch.cuda.empty_cache()


def _generates(torch: Any, model: Any, name: str, results: Results) -> None:
    for cache in (None, "static"):  # transformers compiles decoding with a static cache on a GPU
        for rows in ROWS:
            ids = torch.randint(3, model.config.vocab_size, (rows, PROMPT), device=DEVICE)

            def seconds(new: int, ids: Any = ids, cache: str | None = cache) -> float:
                options = {} if cache is None else {"cache_implementation": cache}
                torch.cuda.synchronize()
                began = perf_counter()
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new,
                    pad_token_id=0, **options,
                )  # fmt: skip
                torch.cuda.synchronize()
                return perf_counter() - began

            for new in (NEW, NEW // 2, NEW):  # compiles for each size of the cache
                seconds(new)
            step_s = (seconds(NEW) - seconds(NEW // 2)) / (NEW - NEW // 2)
            results.add(shape=name, by="transformers, " + ("compiled" if cache else "eager"), rows=rows,
                        tokens_per_s=rows / step_s, step_ms=step_s * 1e3)  # fmt: skip


def _encodes(torch: Any, model: Any, name: str, results: Results) -> None:
    compiled = torch.compile(model)
    for by, run, batches in (("torch, eager", model, BATCHES), ("torch, compiled", compiled, BATCHES[:1])):
        for rows, length in batches:
            ids = torch.randint(3, model.config.vocab_size, (rows, length), device=DEVICE)

            def call(run: Callable[..., Any] = run, ids: Any = ids) -> float:
                began = perf_counter()
                run(input_ids=ids)
                torch.cuda.synchronize()
                return perf_counter() - began

            for _ in range(3):
                call()
            seconds = statistics.median(call() for _ in range(20))
            results.add(shape=name, by=by, rows=rows, length=length, tokens_per_s=rows * length / seconds,
                        latency_ms=seconds * 1e3)  # fmt: skip


def tensorrt(materials: Path, results: Results) -> None:
    """Build engines of small decoders and of one real shape on this GPU, and check and measure them."""
    from stageline.runtime.builder.build import WantedEngine, build
    from stageline.runtime.engines.tensorrt.flavour import FLAVOURS, choose
    from stageline.runtime.engines.tensorrt.lower import default_precision
    from stageline.runtime.engines.tensorrt.records import Options
    from stageline.runtime.engines.tensorrt.targets import HERE, gpu_here
    from stageline.runtime.workload import Workload

    if not any(flavour.installed for flavour in FLAVOURS.values()):
        raise MissingError("TensorRT is not installed")
    need_gpu()
    gpu = gpu_here()
    if gpu is None:
        raise MissingError("NVML shows no GPU to build for")
    try:
        flavour = choose(HERE, gpu)
        flavour.load()
    except EngineError as error:
        raise MissingError(str(error)) from error

    def built(bundle: Bundle, load: Workload) -> None:
        kind = WantedEngine(flavour, gpu.target, default_precision(bundle.manifest.dtype))
        for outcome in build(bundle, [kind], load, Options()):
            built_s = outcome.record.build_s if outcome.record else None
            results.add(case=bundle.path.name, engine="tensorrt", version=flavour.version, stage=outcome.stage,
                        built_s=built_s, error=outcome.error, ok=outcome.record is not None)  # fmt: skip

    with tempfile.TemporaryDirectory() as scratch:
        cases = [(folder, Workload(slots=4, capacity=300)) for folder in need_materials(materials / "decoders")]
        shapes = materials / "shapes"
        cases += [(shapes / name, Workload(slots=64, capacity=CAPACITY)) for name in DECODED[1:]]
        for source, load in cases:
            try:
                bundle = Bundle.open(shutil.copytree(source, Path(scratch) / source.name))
                built(bundle, load)
                if source.parent == shapes:
                    decode_shape(bundle.path, "tensorrt", (1,), results)
                else:
                    check_steps(bundle, "tensorrt", results)
                    check_tokens(bundle, "tensorrt", results)
            except StagelineError as error:
                results.add(case=source.name, engine="tensorrt", error=str(error), ok=False)
