"""How stages outside of this process are reached, as data."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Elsewhere:
    """`epoch` of this opening of the stages; the file with the `key` of hosts; and if each stage on a device of this
    machine has a process of its own, the bundle that those open."""

    epoch: int
    key_file: str | Path | None = None
    isolated: Path | None = None
