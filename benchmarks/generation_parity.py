"""Greedy tokens of the pipeline against transformers' `generate`, float32: the same, token for token?

40 prompts of 3 to 900 tokens, in several languages and code, are submitted at once to 8 slots, with several numbers of
stages and each engine; then at random times, a third of them cancelled, with other prefill chunks; and with a cache
that does not hold 8 rows, where the engine's caches are blocks. If torch's two highest logits are
within 1e-4 of each other, either token is right. Such a place counts as a tie, and torch scores the rest of that text:
each of our tokens must be within 1e-4 of torch's highest logit.

    python benchmarks/generation_parity.py models/checkpoints/smollm2 bundles/smollm2
"""

import argparse
import json
import random
import tempfile
import time
from concurrent.futures import CancelledError
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from stageline.exporter.verify.against_torch import load_reference
from stageline.models.checkpoint import Checkpoint
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.recut import recut, recut_copy
from stageline.runtime.engines import WITH_BLOCKS
from stageline.runtime.generation.request import GenerationRequest, Sampling
from stageline.runtime.pipeline import Pipeline

TIE = 1e-4
TEXTS = (
    "The capital of France is",
    "Der schnelle braune Fuchs springt über den faulen Hund, während die Sonne langsam hinter den Bergen versinkt.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n\n\n",
    "El perro corre por el parque y los niños juegan con una pelota roja mientras cae la tarde.",
    "今日はとても良い天気なので、公園を散歩しながら友達と話しました。",
    "В начале было слово, и люди долго спорили о том, что оно означало.",
    "SELECT name, COUNT(*) FROM users JOIN orders ON users.id = orders.user_id GROUP BY name HAVING COUNT(*) > 3;",
    "Water boils at one hundred degrees because the pressure of its vapour then equals that of the air around it. ",
    "Le vent se lève, il faut tenter de vivre; la mer, la mer, toujours recommencée. ",
    '{"id": 7, "tags": ["a", "b"], "nested": {"x": 1.5, "ok": true}}\n',
)


@dataclass(frozen=True)
class Result:
    """One way to run all prompts. `ties`: texts that leave torch's at a tie; `wrong`: other differing texts."""

    name: str
    requests: int
    cancelled: int
    tokens: int
    equal: int
    ties: int
    wrong: int
    seconds: float


def prompts(encode: Any, count: int, max_tokens: int) -> list[list[int]]:
    """Prompts of 3 to `max_tokens` tokens, lengths evenly spaced on a logarithmic scale."""
    lengths = np.geomspace(3, max_tokens, count).round().astype(int)
    rng = random.Random(0)
    found = []
    for length in lengths:
        ids: list[int] = []
        while len(ids) < length:
            ids += encode(rng.choice(TEXTS))
        found.append(ids[:length])
    rng.shuffle(found)
    return found


def reference(model: Any, ids: list[int], new_tokens: int) -> list[int]:
    """The greedy continuation of transformers' generate."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )
    return list(out[0, len(ids) :].tolist())


def judged(model: Any, prompt: list[int], got: list[int], want: list[int]) -> str:
    """'equal', 'tie' or 'wrong'."""
    if got == want:
        return "equal"
    with torch.no_grad():
        logits = model(torch.tensor([prompt + got])).logits[0, len(prompt) - 1 : -1]
    behind = logits.max(dim=-1).values - logits[torch.arange(len(got)), torch.tensor(got)]
    short = len(got) < len(want) and got == want[: len(got)]
    return "tie" if float(behind.max()) <= TIE and not short else "wrong"


def main() -> None:
    """Run, print a table, write JSON if asked; exit with 1 if a text is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--longest", type=int, default=900)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--stages", default="1,2,3,5")
    parser.add_argument("--engines", default="onnxruntime,openvino")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    manifest = Bundle.open(arguments.bundle).manifest
    exact = manifest.exact
    model = load_reference(Checkpoint.open(arguments.checkpoint), manifest)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(dir=arguments.bundle.parent) as folder:
        bundle = recut_copy(arguments.bundle, Path(folder) / "bundle", 1).path
        with Pipeline.open(bundle, quantise=exact) as pipeline:
            assert pipeline.encoder is not None
            given = prompts(pipeline.encoder.ids, arguments.prompts, arguments.longest)
        began = time.perf_counter()
        want = [reference(model, ids, arguments.new_tokens) for ids in given]
        print(f"transformers: {sum(map(len, want))} tokens in {time.perf_counter() - began:.0f} s", flush=True)

        def measure(name: str, pipeline: Pipeline, arrive_s: float, cancel: bool) -> None:
            rng = random.Random(1)
            began = time.perf_counter()
            futures = []
            for ids in given:
                request = GenerationRequest(tuple(ids), Sampling(max_tokens=arguments.new_tokens))
                futures.append(pipeline.submit(request))
                time.sleep(rng.uniform(0, arrive_s))
                if cancel and rng.random() < 1 / 3:
                    futures[rng.randrange(len(futures))].cancel()
            kinds = {"equal": 0, "tie": 0, "wrong": 0, "cancelled": 0}
            tokens = 0
            for ids, expected, future in zip(given, want, futures, strict=True):
                try:
                    got = list(future.result().choices[0].token_ids)
                except CancelledError:
                    kinds["cancelled"] += 1
                    continue
                tokens += len(got)
                kinds[judged(model, ids, got, expected)] += 1
            seconds = time.perf_counter() - began
            results.append(Result(name, len(given), kinds["cancelled"], tokens, kinds["equal"], kinds["tie"],
                                  kinds["wrong"], seconds))  # fmt: skip
            print(results[-1], flush=True)

        caches = [spec for stage in Bundle.open(bundle).manifest.stages for spec in stage.caches]
        token_bytes = sum(4 * spec.heads * (spec.key_size + spec.value_size) for spec in caches)
        for engine in arguments.engines.split(","):
            for stages in map(int, arguments.stages.split(",")):
                recut(bundle, stages)
                with Pipeline.open(bundle, engine=engine, quantise=exact) as pipeline:
                    measure(f"{engine}, {stages} stages", pipeline, 0, False)
            recut(bundle, 2)
            for chunk in (7, 64, 512):
                with Pipeline.open(bundle, engine=engine, quantise=exact, prefill_chunk=chunk) as pipeline:
                    measure(f"{engine}, 2 stages, random arrivals and cancels, chunks of {chunk}", pipeline, 0.4, True)
            if engine in WITH_BLOCKS:
                memory = 1200 * token_bytes
                with Pipeline.open(
                    bundle, engine=engine, quantise=exact, capacity=1024, cache_memory=memory
                ) as pipeline:
                    measure(f"{engine}, 2 stages, a cache of 1,200 tokens", pipeline, 0, False)
                    stats = pipeline.stats().generation
                    assert stats is not None
                    print(f"rows were set back {stats.set_back} times", flush=True)
    print(f"\n{'':70} {'requests':>8} {'cancelled':>9} {'tokens':>6} {'equal':>6} {'ties':>5} {'wrong':>5} {'s':>5}")
    for r in results:
        print(
            f"{r.name:70} {r.requests:8} {r.cancelled:9} {r.tokens:6} {r.equal:6} {r.ties:5} {r.wrong:5} "
            f"{r.seconds:5.0f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    raise SystemExit(any(r.wrong for r in results))


if __name__ == "__main__":
    main()
