"""The command `stageline doctor`."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from stageline.exporter.commands.show import table
from stageline.runtime import words
from stageline.runtime.doctor import Diagnosis, diagnose


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("doctor")(doctor_command)


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Show this machine's engines, devices and drivers, and how to install what is absent.

    Example: stageline doctor
    """
    found = diagnose()
    print(json.dumps(asdict(found), indent=2) if as_json else text(found))


def text(found: Diagnosis) -> str:
    """The diagnosis as a person reads it."""
    processor, driver = found.processor, found.driver
    memory = "" if processor.memory_bytes is None else f", {words.size(processor.memory_bytes)} of memory"
    devices = [["cpu", processor.model, f"{len(processor.cores)} cores{memory}"]]
    for gpu in found.gpus:
        told = f"compute capability {gpu.compute_capability}, {words.size(gpu.memory_bytes)}"
        devices.append([f"cuda:{gpu.index}", gpu.name, f"{told}, {words.size(gpu.free_bytes)} free"])
        devices += [["", f"  {part.name}", f"MIG, {words.size(part.memory_bytes)}"] for part in gpu.mig]
    nvidia = driver.problem or f"NVIDIA {driver.version}, CUDA up to {driver.cuda}"
    engines = [
        [e.name, e.version or "absent", e.runs_on, " ".join(e.targets) or "-", "" if e.version else e.install]
        for e in found.engines
    ]
    extras = [
        [e.name, "complete" if e.complete else f"absent: {' '.join(p for p, v in e.packages.items() if v is None)}",
         "" if e.complete else e.install]
        for e in found.extras
    ]  # fmt: skip
    checkpoints = [[c.name, c.folder or "absent", "" if c.folder else c.fetch] for c in found.checkpoints]
    return "\n".join(
        [
            f"stageline {found.stageline}, Python {found.python}, {found.system}",
            f"driver: {nvidia}",
            "",
            table(["device", "name", ""], devices),
            "",
            table(["engine", "version", "runs on", "builds for", "install"], engines),
            "",
            table(["extra", "packages", "install"], extras),
            "",
            table(["checkpoint", "folder", "fetch"], checkpoints),
            *(["", *(f"problem: {problem}" for problem in found.problems)] if found.problems else []),
        ]
    )
