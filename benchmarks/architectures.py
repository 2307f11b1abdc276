"""Every architecture of transformers, tiny and random: exported, verified, and generating what transformers generates?

A checkpoint of a few thousand random weights is made for each model class, exported with the command's defaults, and
the pipeline is compared with torch in float32 on ragged rows, short and long. Models that generate text do so greedily,
40 tokens for each of three prompts, against transformers' `generate`; where torch's two highest logits are close,
either token is right. Each class has a process of its own. Results are kept as they come, and those that are there are
not computed again unless they are named:

    python benchmarks/architectures.py                       # all that are left
    python benchmarks/architectures.py llama 'gemma*'        # these, again
    python benchmarks/architectures.py --missing 'gemma*'    # those of these that have no result yet
    python benchmarks/architectures.py --result WRONG        # those that were wrong
    python benchmarks/architectures.py --docs                # write the page of the documentation from the results
"""

import argparse
import copy
import fnmatch
import itertools
import json
import multiprocessing
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import torch
import transformers
from stageline.exporter.export import export
from stageline.models.errors import StagelineError
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.generation.request import GenerationRequest, Sampling
from stageline.runtime.pipeline import Pipeline
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

RESULTS = Path(__file__).parent / "results" / "architectures.json"
PAGE = Path(__file__).parents[1] / "docs" / "reference" / "architectures.md"
_HEAD = """# Architectures

<!-- Written by benchmarks/architectures.py --docs from its results: do not edit. -->

Model classes of transformers {version}, each as a tiny checkpoint with random weights in bfloat16: exported with the
command's defaults, compared with torch in float32 on rows of up to 7 and up to 100 tokens (or on images), and, with a
KV cache, made to generate 40 tokens for each of three prompts beside transformers' own greedy `generate`.
See [Checkpoints](checkpoints.md#tasks) for the tasks.

{summary}
"""
TOLERANCE = 1e-3
"""Of the largest value. Two computations in float32 of the same weights differ by some 1e-6, except where random
weights make a model that amplifies the least difference: torch in float32 differs as much from torch in float64."""
OWN = 4
"""So many times that difference is allowed there."""
NEW_TOKENS = 40
_PROCESSOR_S = 120
_MEMORY_BYTES = 12 * 1024**3
# what is tried: a class that an earlier mapping has is not tried again
_EXPORTED = (
    "MODEL_FOR_CAUSAL_LM", "MODEL_FOR_MASKED_LM", "MODEL_FOR_IMAGE_CLASSIFICATION", "MODEL_FOR_IMAGE_TEXT_TO_TEXT",
    "MODEL_FOR_TEXT_ENCODING", "MODEL_FOR_SEQUENCE_CLASSIFICATION", "MODEL_FOR_TOKEN_CLASSIFICATION", "MODEL",
)  # fmt: skip
_REFUSED = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL_FOR_QUESTION_ANSWERING", "MODEL_FOR_SPEECH_SEQ_2_SEQ",
    "MODEL_FOR_AUDIO_CLASSIFICATION", "MODEL_FOR_CTC", "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION",
    "MODEL_FOR_OBJECT_DETECTION", "MODEL_FOR_SEMANTIC_SEGMENTATION", "MODEL_FOR_MASK_GENERATION",
    "MODEL_FOR_VIDEO_CLASSIFICATION", "MODEL_FOR_TIME_SERIES_PREDICTION", "MODEL_FOR_TEXT_TO_WAVEFORM",
    "MODEL_FOR_MULTIPLE_CHOICE", "MODEL_FOR_PRETRAINING",
)  # fmt: skip
_SAMPLED = {"MODEL_FOR_SEQUENCE_CLASSIFICATION", "MODEL_FOR_TOKEN_CLASSIFICATION", "MODEL_FOR_QUESTION_ANSWERING",
            "MODEL_FOR_MULTIPLE_CHOICE", "MODEL_FOR_PRETRAINING", "MODEL"}  # fmt: skip
"""Heads on bodies that other mappings have: only these of them."""
_SAMPLE = ("bert", "roberta", "deberta-v2", "modernbert", "llama", "qwen3", "gemma3_text", "xlnet", "distilbert",
           "electra", "t5", "bart", "funnel", "gpt2", "vit", "dinov2", "clip_vision_model",
           "siglip_vision_model")  # fmt: skip


def candidates() -> list[tuple[str, str, str]]:
    """What is tried: mapping, model_type, class. First those of exported tasks, one of each mapping in turn, so that
    the beginning of the list is broad."""
    seen: set[str] = set()
    columns: dict[str, list[tuple[str, str, str]]] = {}
    for mapping in (*_EXPORTED, *_REFUSED):
        column = columns.setdefault(mapping, [])
        for kind, names in getattr(modeling_auto, f"{mapping}_MAPPING_NAMES").items():
            name = names if isinstance(names, str) else names[0]
            if (
                f"{kind} {name}" not in seen
                and not _is_text_part(kind, name)
                and (mapping not in _SAMPLED or kind in _SAMPLE)
            ):
                seen.add(f"{kind} {name}")
                column.append((mapping.removeprefix("MODEL_FOR_").lower(), kind, name))
    return [
        candidate
        for group in (_EXPORTED, _REFUSED)
        for row in itertools.zip_longest(*(columns[mapping] for mapping in group))
        for candidate in row
        if candidate is not None
    ]


def _is_text_part(kind: str, name: str) -> bool:
    """Whether the class takes a part of this type's config, which has a type of its own."""
    text = CONFIG_MAPPING[kind].sub_configs.get("text_config")
    return text is not None and getattr(transformers, name).config_class is text


def tried(kind: str, class_name: str, folder: Path, dtype: str) -> dict[str, Any]:
    """One class through export, comparison and generation, as an entry of the results."""
    try:
        model = tiny_models.make(kind, class_name, folder / "checkpoint", getattr(torch, dtype))
    except Exception as error:
        return {"result": "not made", "line": _line(error)}
    try:
        bundle = export(folder / "checkpoint", folder / "bundle")
    except StagelineError as error:
        return {"result": "refused", "line": _line(error)}
    except Exception as error:
        return {"result": "traceback", "line": _line(error), "traceback": traceback.format_exc()[-3000:]}
    manifest = bundle.manifest
    entry: dict[str, Any] = {"task": manifest.task, "attention": manifest.attention, "notes": list(manifest.notes)}
    entry["no_cache_reason"] = manifest.no_cache_reason
    try:
        with Pipeline.open(folder / "bundle") as pipeline:
            compared = {length: _errors(model, pipeline, bundle, length) for length in (7, 100)}
            errors = {length: error for length, (error, _) in compared.items()}
            entry["error"] = max(errors.values())
            if manifest.cached:
                entry["generated"] = _generated(model, pipeline)
    except Exception as error:
        return entry | {"result": "WRONG", "line": _line(error), "traceback": traceback.format_exc()[-3000:]}
    if not all(error <= max(TOLERANCE, OWN * own) for error, own in compared.values()):
        return entry | {"result": "WRONG", "line": f"errors by length: {errors}"}
    if entry.get("generated", NEW_TOKENS) != NEW_TOKENS:
        return entry | {"result": "WRONG", "line": f"leaves torch's best token after {entry['generated']} tokens"}
    return entry | {"result": "holds", "line": ""}


def _errors(model: Any, pipeline: Pipeline, bundle: Any, length: int) -> tuple[float, float]:
    """The largest error over the largest value, padding left out, on rows of up to `length` tokens; and the largest
    difference of torch in float32 to torch in float64, if the error is large."""
    rng = np.random.default_rng(length)
    limit = bundle.manifest.max_positions or length
    length = min(length, limit)
    real = np.arange(length) < np.array([length, 1, max(1, length * 2 // 3)])[:, None]
    inputs: dict[str, Any] = {}
    for spec in Signature.of(bundle.manifest).inputs:
        shape = [{"batch": 3, "length": length}[d] if isinstance(d, str) else d for d in spec.shape]
        if spec.name == "attention_mask":
            inputs[spec.name] = real.astype(np.int64)
        elif spec.name == "input_ids":
            inputs[spec.name] = np.where(real, rng.integers(3, 80, shape), 0)
            if getattr(model.config, "eos_token_id", None) == tiny_models.END:  # some read the text's last place
                inputs[spec.name][np.arange(3), real.sum(axis=1) - 1] = tiny_models.END
        elif spec.name == "token_type_ids":
            inputs[spec.name] = np.zeros(shape, np.int64)
        else:
            inputs[spec.name] = rng.standard_normal(shape).astype(np.float32)
    if "input_ids" in inputs and "attention_mask" not in inputs:
        inputs["input_ids"] = rng.integers(3, 80, inputs["input_ids"].shape)
        real = np.ones_like(real)
    name = bundle.manifest.outputs[-1].name
    got = pipeline.run(inputs)[name]

    def of_torch(one: Any) -> np.ndarray[Any, Any]:
        given = {key: torch.from_numpy(value) for key, value in inputs.items()}
        given = {key: value.to(one.dtype) if value.is_floating_point() else value for key, value in given.items()}
        with torch.no_grad():
            result = one(**given)
            if name == "last_hidden_state" and name not in result:  # of a class whose head is left out
                result = one.base_model(**given)
        return (result[name] if name in result else result[0]).numpy()  # type: ignore[no-any-return]

    def difference(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
        if "input_ids" in inputs and one.ndim == 3 and one.shape[1] == length:
            one, other = one[real], other[real]
        return float(np.abs(one - other).max() / np.abs(other).max())

    want = of_torch(model)
    error = difference(got, want)
    if error <= TOLERANCE:
        return error, 0.0
    return error, difference(want, of_torch(copy.deepcopy(model).double()))


def _generated(model: Any, pipeline: Pipeline) -> int:
    """How many greedy tokens agree with transformers' generate, the fewest of three prompts that run together."""
    rng = np.random.default_rng(1)
    prompts = [tuple(rng.integers(3, 80, length).tolist()) for length in (3, 12, 31)]
    none = (0,)  # padding: RoBERTa and its kin give it no position of its own, and no text holds it
    sampling = Sampling(max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, suppress_tokens=none)
    futures = [pipeline.submit(GenerationRequest(prompt, sampling)) for prompt in prompts]
    agreed = NEW_TOKENS
    for prompt, future in zip(prompts, futures, strict=True):
        got = list(future.result().choices[0].token_ids)
        ids = torch.tensor([prompt])
        with torch.no_grad():
            want = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS, suppress_tokens=list(none),
            )[0, len(prompt) :].tolist()  # fmt: skip
            if got != want:
                text = torch.tensor([[*prompt, *got]])
                logits = model(input_ids=text, attention_mask=torch.ones_like(text)).logits[0, len(prompt) - 1 : -1]
                logits[:, list(none)] = float("-inf")
                behind = logits.max(dim=-1).values - logits[torch.arange(len(got)), torch.tensor(got)]
                far = (behind > TOLERANCE * logits[:, 1:].abs().max()).nonzero()
                agreed = min(agreed, int(far[0]) if len(far) else NEW_TOKENS, len(got))
    return agreed


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:400]
    return text if isinstance(error, StagelineError) else f"{type(error).__name__}: {text}"


def _child(kind: str, class_name: str, dtype: str, send: Any) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (_PROCESSOR_S, _PROCESSOR_S))
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        send.send(tried(kind, class_name, Path(folder), dtype))


def in_a_process(kind: str, class_name: str, dtype: str) -> dict[str, Any]:
    """`tried`, in a process of its own, with a time limit."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    began = time.perf_counter()
    process = context.Process(target=_child, args=(kind, class_name, dtype, send))
    process.start()
    send.close()
    try:
        entry = receive.recv()
    except EOFError:
        entry = {}
    process.join()
    if not entry:
        late = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        line = (
            f"took more than {_PROCESSOR_S} s of processor time" if late else f"the process died ({process.exitcode})"
        )
        entry = {"result": "timeout" if late else "traceback", "line": line}
    return {**entry, "seconds": round(time.perf_counter() - began, 1)}


def page(results: dict[str, dict[str, Any]]) -> str:
    """The page of the documentation that shows the results."""
    tried = {key: entry for key, entry in sorted(results.items()) if entry["result"] != "not made"}
    holding = {key: entry for key, entry in tried.items() if entry["result"] == "holds"}
    generating = sum("generated" in entry for entry in holding.values())
    refused = sum(entry["result"] == "refused" for entry in tried.values())
    summary = (
        f"Of {len(tried)} classes that were tried, {len(holding)} hold ({generating} of them generate), {refused} are "
        f"refused when they are exported, and {len(tried) - len(holding) - refused} fail or take more than "
        f"{_PROCESSOR_S} s of processor time."
    )
    lines = [_HEAD.format(version=transformers.__version__, summary=summary), "## Those that hold", ""]
    lines += ["| model_type | class | task | error of the largest value | tokens as transformers' | without KV cache |"]
    lines += ["|---|---|---|---|---|---|"]
    for key, entry in holding.items():
        tokens = f"{entry['generated']} of {NEW_TOKENS}" if "generated" in entry else ""
        reason = _cell(entry["no_cache_reason"] or "")
        lines.append(f"| {key.replace(' ', ' | ')} | {entry['task']} | {entry['error']:.0e} | {tokens} | {reason} |")
    lines += ["", "## Those that do not", "", "| model_type | class | what happens | the line |", "|---|---|---|---|"]
    for key, entry in tried.items():
        if entry["result"] != "holds":
            lines.append(f"| {key.replace(' ', ' | ')} | {entry['result']} | {_cell(entry['line'])} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text without what Markdown would read as marks."""
    return re.sub(r"([\\\[\]|<>*`_])", r"\\\1", text)


def main() -> None:
    """Try what is left or named, print a table, and exit with 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model_types to try again; they may hold wildcards")
    parser.add_argument("--mapping", help="only of this one, such as causal_lm")
    parser.add_argument("--result", help="try again those with this result, such as WRONG")
    parser.add_argument("--missing", action="store_true", help="of those named only what has no result yet")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--docs", action="store_true", help="only write the page of the documentation")
    arguments = parser.parse_args()
    if arguments.docs:
        PAGE.write_text(page(json.loads(arguments.json.read_text())))
        return
    results: dict[str, dict[str, Any]] = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    torch.set_num_threads(1)
    torch.onnx.export(torch.nn.Linear(1, 1), (torch.ones(1, 1),), dynamo=True, verbose=False)  # imports, once for all
    for mapping, kind, name in candidates():
        key = f"{kind} {name}"
        named = any(fnmatch.fnmatch(kind, pattern) for pattern in arguments.names)
        again = (named and not (arguments.missing and key in results)) or (
            arguments.result is not None and results.get(key, {}).get("result") == arguments.result
        )
        left = key not in results and not arguments.names and arguments.result is None
        if not (again or left) or (arguments.mapping and mapping != arguments.mapping):
            continue
        entry = {"mapping": mapping, **in_a_process(kind, name, arguments.dtype)}
        results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        results[key] = entry
        arguments.json.parent.mkdir(exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{key:70} {entry['result']:9} {entry.get('attention', ''):9} {entry['line'][:160]}", flush=True)
    print(
        ", ".join(f"{count} {result}" for result, count in Counter(e["result"] for e in results.values()).most_common())
    )
    sys.exit(any(entry["result"] in ("WRONG", "traceback", "timeout") for entry in results.values()))


if __name__ == "__main__":
    main()
