"""A large store, 2,000 runs, one of them with 1,000,000 requests: the time to write, list and open.

Each kind of read has a process of its own, to measure its peak memory.

    python benchmarks/store_scale.py --json store_scale.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from stageline.runtime.bench.records import Load
from stageline.runtime.bench.store import Store

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
import synthetic_runs  # as the tests of the store do

RUNS, REQUESTS, SPANS = 2_000, 1_000_000, 10_000
LARGE = RUNS  # its number


def seconds(do: Callable[[], object]) -> float:
    """The time that `do` takes."""
    began = perf_counter()
    do()
    return perf_counter() - began


def peak_bytes() -> int:
    """Peak memory of this process since `exec` (getrusage would begin with the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def fill(store: Store) -> dict[str, float]:
    """Fill the store; returns the times of its writes."""
    asked = synthetic_runs.requests(200)
    loads = [Load("SingleStream"), Load("Offline"), Load("Server", rate_per_s=20.0)]
    small = [synthetic_runs.run(number, loads) for number in range(RUNS - 1)]
    each = [seconds(lambda run=run: store.put(run, [asked] * 6)) for run in small]  # type: ignore[misc]
    many = synthetic_runs.requests(REQUESTS)
    large = synthetic_runs.run(LARGE, loads[2:], count=REQUESTS)
    timeline = synthetic_runs.timeline(SPANS)
    return {
        "write a run, median": statistics.median(each),
        "write a run, p99": sorted(each)[len(each) * 99 // 100],
        f"write {REQUESTS:,} requests": seconds(lambda: store.put(large, [many], [timeline])),
    }


READS: dict[str, Callable[[Store], object]] = {
    "nothing": lambda store: None,
    f"list {RUNS:,} runs": lambda store: store.runs(),
    "list the newest 50": lambda store: store.runs(50),
    "open a run": lambda store: store.run(synthetic_runs.run(LARGE).id),
    f"load {REQUESTS:,} requests": lambda store: store.requests(synthetic_runs.run(LARGE).id, 0),
    f"load a timeline of {2 * SPANS:,} spans": lambda store: store.timeline(synthetic_runs.run(LARGE).id, 0),
}


def main() -> None:
    """Fill, read, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--read", nargs=2, metavar=("STORE", "WHAT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        store, read = Store(options.read[0]), READS[options.read[1]]
        taken = [seconds(lambda: read(store)) for _ in range(3)]
        print(json.dumps([taken[0], statistics.median(taken), peak_bytes()]))
        return
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "bench.sqlite")
        writes = fill(store)
        reads = {}
        for name in READS:
            command = [sys.executable, __file__, "--read", str(store.path), name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            first, again, peak = json.loads(done.stdout)
            reads[name] = {"first_s": first, "again_s": again, "peak_bytes": peak}
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    print(f"{RUNS:,} runs, one with {REQUESTS:,} requests: {size / 1e6:.1f} MB")
    for name, write_s in writes.items():
        print(f"{name:<40}{write_s * 1e3:>10.1f} ms")
    print(f"{'':<40}{'first':>13}{'again':>13}{'peak memory':>16}")
    for name, figures in reads.items():
        first_ms, again_ms, peak_mib = figures["first_s"] * 1e3, figures["again_s"] * 1e3, figures["peak_bytes"] / 2**20
        print(f"{name:<40}{first_ms:>10.1f} ms{again_ms:>10.1f} ms{peak_mib:>12.0f} MiB")
    if options.json is not None:
        results = {"runs": RUNS, "requests": REQUESTS, "bytes": size, "writes_s": writes, "reads": reads}
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
