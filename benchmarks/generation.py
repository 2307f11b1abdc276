"""Generation on this machine: our pipeline and its peers, each in a process of its own, round by round.

Every contender gets the same token ids and draws the same number of tokens greedily, ignoring end tokens. Decode
tokens/s exclude the first token of each stream; `total` includes the time of the prompts. Prefill is one prompt of 512
tokens. Peers take part if they are installed (pip install "stageline[bench]") and their model is given:

    python benchmarks/generation.py bundles/smollm2 --hf smollm2-hf --gguf models/checkpoints/smollm2/*.gguf \\
        --genai-int4 genai-int4 --genai-fp32 genai-fp32 --json benchmarks/results/generation.json

`--hf` is the checkpoint as a Hugging Face folder for transformers; onnxruntime-genai's models come from its own
`python -m onnxruntime_genai.models.builder -i smollm2-hf -o genai-int4 -p int4 -e cpu`.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[list[list[int]], int], None]
"""Continue all prompts at once, each by this number of tokens."""
PROMPT, NEW = 64, 48


def stageline(bundle: str, engine: str, threads: int, quantise: Any, slots: int) -> tuple[Run, Any]:
    """Our pipeline, opened as for a service."""
    from stageline.runtime.generation.request import GenerationRequest, Sampling
    from stageline.runtime.pipeline import Pipeline

    pipeline = Pipeline.open(bundle, engine=engine, threads=threads, quantise=quantise, slots=slots, capacity=1024)

    def run(prompts: list[list[int]], new: int) -> None:
        sampling = Sampling(max_tokens=new, min_tokens=new)
        futures = [pipeline.submit(GenerationRequest(tuple(ids), sampling)) for ids in prompts]
        for future in futures:
            assert len(future.result().choices[0].token_ids) == new

    return run, pipeline


def genai(folder: str) -> Run:
    """onnxruntime-genai: one static batch."""
    import onnxruntime_genai as og

    model = og.Model(folder)

    def run(prompts: list[list[int]], new: int) -> None:
        params = og.GeneratorParams(model)
        length = len(prompts[0])
        params.set_search_options(
            batch_size=len(prompts), max_length=length + new, min_length=length + new, do_sample=False
        )
        generator = og.Generator(model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(new):
            generator.generate_next_token()

    return run


def openvino(gguf: str) -> Run:
    """OpenVINO GenAI's continuous batching on the .gguf file."""
    import openvino as ov
    import openvino_genai as og

    scheduler = og.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_batched_tokens = 2, 512
    pipeline = og.ContinuousBatchingPipeline(gguf, scheduler, "CPU")

    def run(prompts: list[list[int]], new: int) -> None:
        config = og.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        tensors = [ov.Tensor(np.array([ids], np.int64)) for ids in prompts]
        for result in pipeline.generate(tensors, [config] * len(prompts)):
            assert len(result.m_generation_ids[0]) == new

    return run


def hugging_face(folder: str) -> Run:
    """transformers' generate on one batch, float32."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(prompts: list[list[int]], new: int) -> None:
        ids = torch.tensor(prompts)
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new,
                max_new_tokens=new,
                pad_token_id=0,
            )

    return run


def poisson(pipeline: Any, rate: float, count: int) -> dict[str, float]:
    """TTFT and TPOT, from the intended arrival, of `count` requests that arrive at random, `rate` per second."""
    from stageline.runtime.generation.request import GenerationRequest, Sampling

    rng = random.Random(0)
    began = time.perf_counter()
    at, futures, late = 0.0, [], []
    for number in range(count):
        at += rng.expovariate(rate)
        time.sleep(max(0.0, began + at - time.perf_counter()))
        late.append(time.perf_counter() - began - at)
        ids = tuple(random.Random(number).randrange(3, 40_000) for _ in range(rng.randrange(8, 2 * PROMPT)))
        futures.append(pipeline.submit(GenerationRequest(ids, Sampling(max_tokens=NEW, min_tokens=NEW))))
    done = [future.result() for future in futures]
    ttft = [c.ttft_s + wait for c, wait in zip(done, late, strict=True)]
    tpot = [(c.token_times_s[-1] - c.token_times_s[0]) / (NEW - 1) for c in done]
    return {
        "rate": rate,
        **{f"ttft_p{p}_s": float(np.percentile(ttft, p)) for p in (50, 90, 99)},
        **{f"tpot_p{p}_s": float(np.percentile(tpot, p)) for p in (50, 90, 99)},
    }


def worker(kind: str, model: str, engine: str, threads: int, quantise: str | None, slots: int) -> None:
    """One contender: reads commands as JSON lines and answers with seconds."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # peers print; stdout is for answers
    pipeline = None
    if kind == "stageline":
        run, pipeline = stageline(model, engine, threads, quantise, slots)
    else:
        run = {"genai": genai, "openvino": openvino, "transformers": hugging_face}[kind](model)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if "rate" in command:
            answer: Any = poisson(pipeline, command["rate"], command["count"])
        else:
            began = time.perf_counter()
            run(command["prompts"], command["new"])
            answer = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps([answer, peak]), file=out, flush=True)


class Contender:
    """The process of a worker."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, __file__, "--worker", *arguments]
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, text=True
        )
        self.peak_mib = 0.0
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            self.stderr.seek(0)
            raise SystemExit(f"{' '.join(arguments)} did not open: {self.stderr.read().decode()[-500:]}")

    def ask(self, **command: Any) -> Any:
        """Send a command and wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        answer, self.peak_mib = json.loads(self.process.stdout.readline())
        return answer


def prompts(streams: int, length: int, seed: int) -> list[list[int]]:
    """Prompts with different beginnings, so that no prefix is shared."""
    rng = random.Random(f"{streams} {length} {seed}")
    return [[rng.randrange(3, 40_000) for _ in range(length)] for _ in range(streams)]


def main() -> None:
    """Measure, print tables, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--hf")
    parser.add_argument("--gguf")
    parser.add_argument("--genai-int4")
    parser.add_argument("--genai-fp32")
    parser.add_argument("--streams", default="1,4,8,16,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    streams = [int(n) for n in arguments.streams.split(",")]
    slots = str(max(streams))
    with tempfile.TemporaryDirectory(dir=arguments.bundle.parent) as folder:
        from stageline.runtime.bundle.recut import recut_copy

        bundles = {n: str(recut_copy(arguments.bundle, Path(folder) / str(n), n).path) for n in (1, 2)}
        wanted: dict[str, tuple[Any, ...]] = {
            f"stageline {engine} {weights}, {shape}": ("stageline", bundles[stages], engine, "2", quantise, slots)
            for engine in ("onnxruntime", "openvino")
            for weights, quantise, stages, shape in (
                ("fp32", "", 1, "1 x 2 threads"),
                ("fp32", "", 2, "2 x 1 thread"),
                ("int8", "int8", 1, "1 x 2 threads"),
                ("int4", "int4", 1, "1 x 2 threads"),
            )
        }
        wanted |= {
            "onnxruntime-genai fp32": ("genai", arguments.genai_fp32),
            "onnxruntime-genai int4": ("genai", arguments.genai_int4),
            "openvino-genai, Q4_1 gguf": ("openvino", arguments.gguf),
            "transformers fp32": ("transformers", arguments.hf),
        }
        contenders = {name: Contender(*args) for name, args in wanted.items() if args[1]}
        results: dict[str, Any] = {name: {"decode": {}, "total": {}} for name in contenders}
        for contender in contenders.values():  # warm up
            contender.ask(prompts=prompts(2, 16, 0), new=4)
        for name in contenders:
            seconds = [contenders[name].ask(prompts=prompts(1, 512, seed), new=1) for seed in range(arguments.rounds)]
            results[name]["prefill"] = 512 / statistics.median(seconds)
        for count in streams:
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
            for number in range(arguments.rounds):
                for name, contender in contenders.items():
                    first = contender.ask(prompts=prompts(count, PROMPT, 2 * number), new=1)
                    whole = contender.ask(prompts=prompts(count, PROMPT, 2 * number + 1), new=NEW)
                    times[name].append((first, whole))
            for name, found in times.items():
                results[name]["decode"][count] = statistics.median(count * (NEW - 1) / (w - f) for f, w in found)
                results[name]["total"][count] = statistics.median(count * NEW / w for _, w in found)
            print(f"{count} streams done", file=sys.stderr, flush=True)
        for name, contender in contenders.items():
            if name.startswith("stageline"):
                rate = 0.7 * results[name]["total"][8] / NEW
                results[name]["poisson"] = contender.ask(rate=rate, count=40)
            results[name]["peak_mib"] = contender.peak_mib
            contender.process.terminate()
    for kind in ("decode", "total"):
        print(f"\n{kind + ' tokens/s, streams:':42}" + "".join(f"{n:>8}" for n in streams))
        for name, found in results.items():
            print(f"{name:42}" + "".join(f"{found[kind][n]:8.0f}" for n in streams))
    print(f"\n{'':42}{'prefill/s':>10}{'peak MiB':>10}")
    for name, found in results.items():
        print(f"{name:42}{found['prefill']:10.0f}{found['peak_mib']:10.0f}")
    print(f"\n{'Poisson arrivals at 70 % of 8 streams':42}{'req/s':>7}" + "".join(
        f"{kind + ' p' + p:>10}" for kind in ("TTFT", "TPOT") for p in ("50", "90", "99")
    ))  # fmt: skip
    for name, found in results.items():
        if "poisson" in found:
            p = found["poisson"]
            values = [1e3 * p[f"{kind}_p{at}_s"] for kind in ("ttft", "tpot") for at in (50, 90, 99)]
            print(f"{name:42}{p['rate']:7.2f}" + "".join(f"{value:7.0f} ms" for value in values))
    if arguments.json:
        arguments.json.write_text(json.dumps({"cores": os.cpu_count(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    if "--worker" in sys.argv:
        given = sys.argv[sys.argv.index("--worker") + 1 :] + [""] * 5
        worker(given[0], given[1], given[2] or "onnxruntime", int(given[3] or 2), given[4] or None, int(given[5] or 8))
    else:
        main()
