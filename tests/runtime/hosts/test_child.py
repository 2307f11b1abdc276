"""Stages in processes of their own: the same numbers, and a crash of one loses nothing."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from stageline.models.errors import RequestError
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.service.app import create_app

PROMPTS = ["a cat sat on mats", "a cat sat on a dog", "a cat", "dog ran on mats", "mats", "a cat sat on mats"]


def processes(pipeline: Pipeline) -> list[int]:
    return [int(stage.device.split()[-1].rstrip(")")) for stage in pipeline.stats().stages]


def health(pipeline: Pipeline) -> tuple[int, object]:
    """What the service says of itself."""

    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(create_app({"llama": pipeline}))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/health")

    answer = asyncio.run(asked())
    return answer.status_code, answer.json()


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_crashed_stages_are_started_again_and_no_token_changes(word_llama: Path) -> None:
    options = {"slots": 4, "prefill_chunk": 8}

    def generated(pipeline: Pipeline, crashes: tuple[tuple[int, int], ...] = ()) -> list[object]:
        requests = [
            pipeline.request(
                prompt, max_tokens=150, min_tokens=150, temperature=place % 2 * 0.9, seed=place, n=1 + place % 2,
                logprobs=0, **({"prompt_logprobs": 0} if place == 3 else {}),
            )
            for place, prompt in enumerate(PROMPTS)
        ]  # fmt: skip
        futures = [pipeline.submit(request) for request in requests]
        for stage, how in crashes:
            time.sleep(0.15)
            assert not all(future.done() for future in futures)
            os.kill(processes(pipeline)[stage], how)
            until = time.monotonic() + 10
            while pipeline.recovering is None:
                assert time.monotonic() < until
                time.sleep(0.005)
            assert health(pipeline) == (503, {"status": "recovering", "models": ["llama"]})
            while pipeline.recovering is not None:
                time.sleep(0.01)
        return [[choice.token_ids for choice in future.result(60).choices] for future in futures]

    with Pipeline.open(word_llama, **options) as pipeline:  # type: ignore[arg-type]
        wanted = generated(pipeline)
    with Pipeline.open(word_llama, isolate=True, **options) as pipeline:  # type: ignore[arg-type]
        first = processes(pipeline)
        assert generated(pipeline, ((1, signal.SIGSEGV),)) == wanted
        assert not set(first) & set(processes(pipeline))
        assert health(pipeline) == (200, {"status": "ready"})
        assert generated(pipeline) == wanted
        assert pipeline.stats().recoveries == pipeline.stats().changeovers == 1
        with pytest.raises(RequestError, match="cannot be switched while they serve"):
            pipeline.recut(1)
        last = processes(pipeline)
    assert not any(map(is_alive, [*first, *last])), "processes are left"
    with pytest.raises(RequestError, match="rebalance is for stages in this process"):
        Pipeline.open(word_llama, isolate=True, rebalance="advise")


@pytest.mark.slow
def test_batches_begin_again(tiny_bundle: Path) -> None:
    random = np.random.default_rng(2)
    feeds = [
        {
            "input_ids": random.integers(0, 12, (40, 16)),
            "attention_mask": (np.arange(16) < random.integers(1, 17, 40)[:, None]).astype(np.int64),
            "token_type_ids": np.zeros((40, 16), np.int64),
        }
        for _ in range(60)
    ]
    with Pipeline.open(tiny_bundle) as pipeline:
        feeds = [{spec.name: feed[spec.name] for spec in pipeline.signature.inputs} for feed in feeds]
        wanted = [pipeline.run(feed) for feed in feeds]
    with Pipeline.open(tiny_bundle, isolate=True) as pipeline:
        futures = [pipeline.submit(feed) for feed in feeds]
        os.kill(processes(pipeline)[1], signal.SIGKILL)
        found = [future.result(60) for future in futures]
        assert pipeline.stats().changeovers == 1
        assert pipeline.stats().done == len(feeds)
    for outputs, others in zip(wanted, found, strict=True):
        assert all(np.array_equal(array, others[name]) for name, array in outputs.items())


@pytest.mark.slow
def test_children_end_with_their_parent(tiny_bundle: Path) -> None:
    code = (
        "import os, sys; from stageline.runtime.pipeline import Pipeline\n"
        "p = Pipeline.open(sys.argv[1], isolate=True)\n"
        "print(*(s.device.split()[-1].rstrip(')') for s in p.stats().stages), flush=True); os.abort()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_bundle)], stdout=subprocess.PIPE, text=True, check=False
    )
    children = list(map(int, done.stdout.split()))
    assert len(children) == 2
    until = time.monotonic() + 5
    while any(map(is_alive, children)):
        assert time.monotonic() < until, "a child outlives its parent"
        time.sleep(0.05)
