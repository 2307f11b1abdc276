"""CPU cores as devices: one worker thread for each stage, pinned to the stage's own cores."""

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CpuDevice:
    """Some cores, numbered as in os.sched_getaffinity. Keeps the promises of `Device`."""

    cores: tuple[int, ...]
    name: str = "cpu"
    lost: None = None
    step_tokens: int = 128  # measured on MiniLM: more only make a prompt hold up the others for longer

    def start_worker(self, name: str, work: Callable[[], None]) -> threading.Thread:
        """See `Device.start_worker`."""
        return start_worker(name, self.cores, work)

    def busy_s(self) -> None:
        """See `Device.busy_s`: the worker's time is the device's."""

    def close(self) -> None:
        """There is nothing to release."""


def allowed_cores() -> tuple[int, ...]:
    """The cores that this process may use, in order."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def share_cores(stages: int, cores: Sequence[int]) -> list[tuple[int, ...]]:
    """The cores of each stage: contiguous parts of `cores` whose sizes differ by at most one, larger ones first.

    With more stages than cores each stage gets one, shared round robin.
    """
    if stages > len(cores):
        return [(cores[stage % len(cores)],) for stage in range(stages)]
    each, longer = divmod(len(cores), stages)
    starts = [stage * each + min(stage, longer) for stage in range(stages + 1)]
    return [tuple(cores[start:end]) for start, end in itertools.pairwise(starts)]


def pin(cores: Sequence[int]) -> None:
    """Let the calling thread, and threads that it starts from now on, run on `cores` only. Does nothing if the system
    has no pinning (not Linux)."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # 0 is the calling thread


def others_cpu_s() -> float:
    """CPU seconds that all other processes, and other guests of the host, have taken so far; 0 if the system does not
    report them (not Linux)."""
    try:
        total = Path("/proc/stat").read_text().split("\n", 1)[0]
        user, nice, system, _, _, irq, soft_irq, steal = map(int, total.split()[1:9])
    except (OSError, ValueError):
        return 0.0
    own = os.times()
    busy_s = (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")
    return busy_s - own.user - own.system


def start_worker(name: str, cores: tuple[int, ...], work: Callable[[], None]) -> threading.Thread:
    """Start a thread called `name` that pins itself to `cores` and then runs `work`. The caller owns the thread.

    Threads that `work` starts inherit the pinning.
    """

    def pinned() -> None:
        pin(cores)
        work()

    thread = threading.Thread(target=pinned, name=name, daemon=True)
    thread.start()
    return thread
