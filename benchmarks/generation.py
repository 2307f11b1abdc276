"""Generation on this machine: our pipeline and its peers, each in a process of its own, round by round, one precision
after the other.

Every contender gets the same prompts as token ids and draws the same number of tokens greedily, ignoring end tokens;
tokens/s are those drawn over the whole time, prompts included. Prefill is one prompt of 512 tokens. The last table has
requests that arrive at random, in each precision at 70 % of what its slowest contender does at 8 streams.

    python benchmarks/generation.py bundles/smollm2-float --packed bundles/smollm2 \\
        --peers peers.json --python peers/bin/python \\
        --node-llama-cpp node_modules/node-llama-cpp/dist/index.js --json results.json

The first bundle has weights in float32 (`stageline export --dtype float32`), the packed one the 4 bits of a .gguf file.
`peers.json` names the peers that take part, each with its kind (a key of PEERS in generation_contenders.py, or
llama.cpp), its precision and its model: {"llama.cpp Q4_1": ["llama.cpp", "int4", "SmolLM2-135M-Instruct.Q4_1.gguf"]}.
`--python` is the interpreter of an environment with their packages (openvino-genai, onnxruntime-genai, transformers);
llama.cpp comes from npm. The peers' models are made by
`python -m onnxruntime_genai.models.builder -i HF_FOLDER -o FOLDER -p int4 -e cpu` and
`optimum-cli export openvino -m HF_FOLDER --weight-format int8 FOLDER`.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from generation_contenders import NEW, PROMPT

OURS = (("fp32", "", 1), ("fp32", "", 2), ("int8", "int8", 1), ("int4", "int4", 1))
"""Precision, what `quantise` is then, and stages, which share the threads. The last gives way to a packed bundle."""


@dataclass
class Process:
    """A contender's process and what it was measured to do."""

    precision: str
    ours: bool
    popen: subprocess.Popen[str]
    stderr: Any
    arrivals: bool = False
    peak_mib: float = 0.0
    prefill: list[float] = field(default_factory=list)
    total: dict[int, list[float]] = field(default_factory=dict)
    poisson: dict[str, float] | None = None

    @classmethod
    def start(cls, precision: str, ours: bool, *command: str) -> "Process":
        """Open the contender and wait until it is ready. SystemExit if it does not open."""
        stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert popen.stdout is not None
        made = cls(precision, ours, popen, stderr)
        line = popen.stdout.readline()
        if not line:
            stderr.seek(0)
            raise SystemExit(f"{' '.join(command)} did not open: {stderr.read().decode()[-500:]}")
        made.arrivals = json.loads(line)["arrivals"]
        return made

    def ask(self, **command: Any) -> Any:
        """Send a command and wait for its answer."""
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        print(json.dumps(command), file=self.popen.stdin, flush=True)
        answer, self.peak_mib = json.loads(self.popen.stdout.readline())
        return answer


def prompts(streams: int, length: int, seed: int) -> list[list[int]]:
    """Prompts with different beginnings, so that no prefix is shared."""
    rng = random.Random(f"{streams} {length} {seed}")
    return [[rng.randrange(3, 40_000) for _ in range(length)] for _ in range(streams)]


def measure(contenders: dict[str, Process], streams: list[int], rounds: int) -> None:
    """Every contender of one precision in turn, `rounds` times over."""
    for contender in contenders.values():  # warm up
        contender.ask(prompts=prompts(1, 16, 0), new=4)
    for seed in range(rounds):
        for contender in contenders.values():
            contender.prefill.append(512 / contender.ask(prompts=prompts(1, 512, seed), new=1))
    for count in streams:
        for number in range(rounds):
            for contender in contenders.values():
                seconds = contender.ask(prompts=prompts(count, PROMPT, number), new=NEW)
                contender.total.setdefault(count, []).append(count * NEW / seconds)
        print(f"{count} streams done", file=sys.stderr, flush=True)
    served = [contender for contender in contenders.values() if contender.arrivals]
    if 8 in streams:
        rate = 0.7 * min(statistics.median(contender.total[8]) for contender in served) / NEW
        for contender in served:
            contender.poisson = contender.ask(rate=rate, count=30)


def of_best(contenders: dict[str, Process], one: Process, count: int) -> float | None:
    """The median, over the rounds, of its total over that of the best peer at its precision; None without a peer."""
    peers = [other for other in contenders.values() if not other.ours and other.precision == one.precision]
    if not one.ours or not peers:
        return None
    best = max(peers, key=lambda peer: statistics.median(peer.total[count]))
    return statistics.median(mine / theirs for mine, theirs in zip(one.total[count], best.total[count], strict=True))


def report(contenders: dict[str, Process], streams: list[int]) -> None:
    """Print the tables; the spread is the largest distance of a round from the median."""
    print(f"\n{'tokens/s, streams:':42}" + "".join(f"{n:>12}" for n in streams))
    for name, one in contenders.items():
        cells = []
        for n in streams:
            middle = statistics.median(one.total[n])
            spread = max(abs(value - middle) for value in one.total[n]) / middle
            cells.append(f"{middle:6.0f} ±{100 * spread:2.0f} %")
        print(f"{name:42}" + "".join(f"{cell:>12}" for cell in cells))
    print(f"\n{'times the best peer of its precision':42}" + "".join(f"{n:>8}" for n in streams))
    for name, one in contenders.items():
        ratios = [of_best(contenders, one, n) for n in streams]
        if ratios[0] is not None:
            print(f"{name:42}" + "".join(f"{ratio:8.2f}" for ratio in ratios))
    print(f"\n{'':42}{'prefill/s':>10}{'peak MiB':>10}")
    for name, one in contenders.items():
        print(f"{name:42}{statistics.median(one.prefill):10.0f}{one.peak_mib:10.0f}")
    print(f"\n{'Poisson arrivals':42}{'req/s':>7}" + "".join(
        f"{kind + ' p' + p:>10}" for kind in ("TTFT", "TPOT") for p in ("50", "90")
    ))  # fmt: skip
    for name, one in contenders.items():
        if one.poisson is not None:
            values = [1e3 * one.poisson[f"{kind}_p{at}_s"] for kind in ("ttft", "tpot") for at in (50, 90)]
            print(f"{name:42}{one.poisson['rate']:7.2f}" + "".join(f"{value:7.0f} ms" for value in values))


def main() -> None:
    """Measure, print tables, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--packed", type=Path, help="a bundle whose own weights have 4 bits, for int4")
    parser.add_argument("--peers", type=Path, help="JSON: a name -> [kind, precision, model]")
    parser.add_argument("--python", default=sys.executable, help="the peers' interpreter")
    parser.add_argument("--node-llama-cpp", default="node-llama-cpp", help="node-llama-cpp's dist/index.js")
    parser.add_argument("--engines", default="onnxruntime,openvino", help="ours")
    parser.add_argument("--streams", default="1,4,8,16,32,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    streams = [int(n) for n in arguments.streams.split(",")]
    slots = str(max(streams))
    here = Path(__file__).resolve().parent
    script = str(here / "generation_contenders.py")
    with tempfile.TemporaryDirectory(dir=arguments.bundle.parent) as folder:
        from stageline.runtime.bundle.recut import recut_copy

        bundles = {n: str(recut_copy(arguments.bundle, Path(folder) / str(n), n).path) for n in (1, 2)}
        packed = str(recut_copy(arguments.packed, Path(folder) / "packed", 1).path) if arguments.packed else ""
        peers = json.loads(arguments.peers.read_text()) if arguments.peers else {}
        contenders: dict[str, Process] = {}
        for wanted in dict.fromkeys(precision for precision, _, _ in OURS):
            opened = {}
            for engine in arguments.engines.split(","):
                for precision, quantise, stages in OURS:
                    if precision == wanted:
                        name = f"stageline {engine} {precision}, {stages} x {2 // stages} thread{'s' * (stages == 1)}"
                        bundle = bundles[stages]
                        if precision == "int4" and arguments.packed:
                            name, bundle, quantise = f"stageline {engine} packed, 1 x 2 threads", packed, ""
                        command = [sys.executable, script, "stageline", bundle, engine, quantise, slots]
                        opened[name] = Process.start(precision, True, *command)
            for name, (kind, precision, model) in peers.items():
                if precision == wanted:
                    command = [arguments.python, script, kind, model]
                    if kind == "llama.cpp":
                        driver = str(here / "llama_cpp.mjs")
                        command = ["node", driver, model, slots, "2", arguments.node_llama_cpp]
                    opened[name] = Process.start(precision, False, *command)
            measure(opened, streams, arguments.rounds)
            for one in opened.values():
                one.popen.terminate()
                one.popen.wait()
            contenders |= opened
    report(contenders, streams)
    if arguments.json:
        results = {
            name: {key: getattr(one, key) for key in ("precision", "prefill", "total", "poisson", "peak_mib")}
            for name, one in contenders.items()
        }
        arguments.json.write_text(json.dumps({"cores": os.cpu_count(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
