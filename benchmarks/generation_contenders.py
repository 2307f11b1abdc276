"""One contender of benchmarks/generation.py, in a process of its own: opened once, then asked for work line by line.

It runs on any interpreter that has NumPy and the contender's library, so that peers live in an environment of their
own. Every peer is set up as its documentation recommends for a service; each computes all of a batch at once.
"""

import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

PROMPT, NEW = 64, 48
THREADS = 2


@dataclass(frozen=True)
class Contender:
    """What it can do: `run` continues all prompts at once, each by a number of tokens, and ignores end tokens;
    `arrivals` serves requests that come at given times and returns, of each, the times of its tokens."""

    run: Callable[[list[list[int]], int], None]
    arrivals: Callable[[list[tuple[float, list[int]]]], list[list[float]]] | None = None


def stageline(bundle: str, engine: str, quantise: Any, slots: int) -> Contender:
    """Our pipeline, opened as for a service."""
    from stageline.runtime.generation.request import GenerationRequest, Sampling
    from stageline.runtime.pipeline import Pipeline

    pipeline = Pipeline.open(bundle, engine=engine, threads=THREADS, quantise=quantise, slots=slots, capacity=640)

    def run(prompts: list[list[int]], new: int) -> None:
        sampling = Sampling(max_tokens=new, min_tokens=new)
        futures = [pipeline.submit(GenerationRequest(tuple(ids), sampling)) for ids in prompts]
        for future in futures:
            assert len(future.result().choices[0].token_ids) == new

    def arrivals(planned: list[tuple[float, list[int]]]) -> list[list[float]]:
        futures, begun = [], time.perf_counter()
        at = []
        for due, ids in planned:
            time.sleep(max(0.0, begun + due - time.perf_counter()))
            at.append(time.perf_counter() - begun)
            futures.append(pipeline.submit(GenerationRequest(tuple(ids), Sampling(max_tokens=NEW, min_tokens=NEW))))
        done = [future.result() for future in futures]
        return [
            [came + c.ttft_s + moment - c.token_times_s[0] for moment in c.token_times_s]
            for came, c in zip(at, done, strict=True)
        ]

    return Contender(run, arrivals)


def onnxruntime_genai(folder: str) -> Contender:
    """onnxruntime-genai: one static batch."""
    import onnxruntime_genai as og

    model = og.Model(folder)

    def run(prompts: list[list[int]], new: int) -> None:
        params = og.GeneratorParams(model)
        length = len(prompts[0]) + new
        params.set_search_options(batch_size=len(prompts), max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(new):
            generator.generate_next_token()

    return Contender(run)


def openvino_batching(model: str) -> Contender:
    """OpenVINO GenAI's continuous batching, on a folder of its own or a .gguf file."""
    import openvino as ov
    import openvino_genai as og

    scheduler = og.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_batched_tokens = 2, 512
    pipeline = og.ContinuousBatchingPipeline(model, scheduler, "CPU")

    def config(new: int) -> Any:
        made = og.GenerationConfig()
        made.max_new_tokens, made.ignore_eos, made.do_sample = new, True, False
        return made

    def run(prompts: list[list[int]], new: int) -> None:
        tensors = [ov.Tensor(np.array([ids], np.int64)) for ids in prompts]
        for result in pipeline.generate(tensors, [config(new)] * len(prompts)):
            assert len(result.m_generation_ids[0]) == new

    def arrivals(planned: list[tuple[float, list[int]]]) -> list[list[float]]:
        todo, handles = list(enumerate(planned)), {}
        times: list[list[float]] = [[] for _ in planned]
        begun = time.perf_counter()
        while todo or pipeline.has_non_finished_requests():
            while todo and todo[0][1][0] <= time.perf_counter() - begun:
                number, (_, ids) = todo.pop(0)
                handles[number] = pipeline.add_request(number, ov.Tensor(np.array([ids], np.int64)), config(NEW))
            if not pipeline.has_non_finished_requests():
                time.sleep(max(0.0, begun + todo[0][1][0] - time.perf_counter()))
                continue
            pipeline.step()
            now = time.perf_counter() - begun
            for number, handle in list(handles.items()):
                while handle.can_read():
                    times[number] += [now] * sum(len(output.generated_ids) for output in handle.read().values())
                if len(times[number]) >= NEW:
                    del handles[number]
        return times

    return Contender(run, arrivals)


def openvino_plain(model: str) -> Contender:
    """OpenVINO GenAI's plain pipeline: one static batch, with stateful attention."""
    import openvino as ov
    import openvino_genai as og

    pipeline = og.LLMPipeline(model, "CPU", ATTENTION_BACKEND="SDPA")

    def run(prompts: list[list[int]], new: int) -> None:
        ids = np.array(prompts, np.int64)
        config = og.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        result = pipeline.generate(og.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids))), config)
        assert [len(tokens) for tokens in result.tokens] == [new] * len(prompts)

    return Contender(run)


def hugging_face(folder: str) -> Contender:
    """transformers' generate on one batch, float32."""
    import torch
    import transformers

    torch.set_num_threads(THREADS)
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

    return Contender(run)


PEERS = {
    "onnxruntime-genai": onnxruntime_genai,
    "openvino-genai batching": openvino_batching,
    "openvino-genai plain": openvino_plain,
    "transformers": hugging_face,
}


def poisson(contender: Contender, rate: float, count: int) -> dict[str, float]:
    """TTFT and TPOT in seconds, from the intended arrival, of `count` requests that arrive at random, `rate` per
    second."""
    rng, at, planned = random.Random(0), 0.0, []
    for number in range(count):
        at += rng.expovariate(rate)
        ids = [random.Random(number).randrange(3, 40_000) for _ in range(rng.randrange(8, 2 * PROMPT))]
        planned.append((at, ids))
    assert contender.arrivals is not None
    times = contender.arrivals(planned)
    ttft = [found[0] - due for found, (due, _) in zip(times, planned, strict=True)]
    tpot = [(found[-1] - found[0]) / (len(found) - 1) for found in times]
    return {
        "rate": rate,
        **{f"ttft_p{p}_s": float(np.percentile(ttft, p)) for p in (50, 90)},
        **{f"tpot_p{p}_s": float(np.percentile(tpot, p)) for p in (50, 90)},
    }


def main(kind: str, model: str, engine: str = "", quantise: str = "", slots: str = "") -> None:
    """Open the contender, then answer commands, which come as JSON lines, with seconds."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # peers print; stdout is for answers
    contender = stageline(model, engine, quantise or None, int(slots)) if kind == "stageline" else PEERS[kind](model)
    print(json.dumps({"arrivals": contender.arrivals is not None}), file=out, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if "rate" in command:
            answer: Any = poisson(contender, command["rate"], command["count"])
        else:
            began = time.perf_counter()
            contender.run(command["prompts"], command["new"])
            answer = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps([answer, peak]), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
