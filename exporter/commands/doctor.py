"""The command `stageline doctor`."""

from dataclasses import asdict

import typer
from stageline.exporter.commands.common import JsonOption, print_result
from stageline.exporter.commands.show import table
from stageline.runtime import words
from stageline.runtime.doctor import Diagnosis, diagnose


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("doctor")(doctor_command)


def doctor_command(
    as_json: JsonOption = False,
) -> None:
    """Show this machine's engines, devices and drivers, and how to install what is missing.

    Example: stageline doctor
    """
    found = diagnose()
    print_result(as_json, asdict(found), text(found))


def text(found: Diagnosis) -> str:
    """The diagnosis as tables for people."""
    cpu, driver = found.cpu, found.driver
    memory = "" if cpu.memory_bytes is None else f", {words.size(cpu.memory_bytes)} of memory"
    devices = [["cpu", cpu.model, f"{words.counted(len(cpu.cores), 'core')}{memory}"]]
    for gpu in found.gpus:
        memory = f"{words.size(gpu.memory_bytes)}, {words.size(gpu.free_bytes)} free"
        devices.append([f"cuda:{gpu.index}", gpu.name, f"compute capability {gpu.compute_capability}, {memory}"])
        devices += [["", f"  {part.name}", f"MIG, {words.size(part.memory_bytes)}"] for part in gpu.mig]
    nvidia = driver.problem or f"NVIDIA {driver.version}, CUDA up to {driver.cuda}"
    engines = [
        [
            e.name,
            e.package,
            e.version or "absent",
            e.runs_on,
            " ".join(e.targets) or "-",
            "" if e.version else e.install,
        ]
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
            table(["engine", "package", "version", "runs on", "builds for", "install"], engines),
            "",
            table(["extra", "packages", "install"], extras),
            "",
            table(["checkpoint", "folder", "fetch"], checkpoints),
            *(["", *(f"problem: {problem}" for problem in found.problems)] if found.problems else []),
        ]
    )
