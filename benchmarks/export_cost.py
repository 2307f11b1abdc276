"""What an export costs: time, peak memory and bytes moved, for real checkpoints and synthetic ones of any size.

Each case runs in a process of its own, to measure its peak memory. The peak includes the import of torch and
transformers; the row `imports` shows that alone. The synthetic Llamas have real headers and no data (sparse files): an
export that read their weights would show in `read`. `read` and `written` count system calls during the export; reads
through a memory map, as of a .gguf, show in the peak instead. `new` is the disk space of the bundle (linked weights
take none; up to 2 GiB are copied where the file system has no reflinks).

    python benchmarks/export_cost.py --json export_cost.json
    python benchmarks/export_cost.py --peers      also transformers' own ONNX exporter on SmolLM2 (minutes)
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

MIB = 2**20
STAGES = 2
REFERENCES = {"minilm": "all-MiniLM-L6-v2", "smollm2": "SmolLM2-135M Q4_1"}
_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "rms_norm_eps": 1e-5}


def llama(
    width: int, layers: int, inner: int, heads: int, kv_heads: int = 8, tied: bool = False, vocabulary: int = 128_256
) -> dict[str, Any]:
    """The config.json of a Llama."""
    return {
        **_LLAMA,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


MODELS = {
    "Llama 1B shapes": llama(2048, 16, 8192, 32, tied=True),
    "Llama 8B shapes": llama(4096, 32, 14_336, 32),
    "Llama 70B shapes": llama(8192, 80, 28_672, 64),
}
LLAMA_7B = llama(4096, 32, 11_008, 32, 32, vocabulary=32_000)
PACKED = {"gptq": "7B shapes, GPTQ", "gguf": "7B shapes, Q4_K"}
SWEEPS = {
    **{f"width {width}, 8 layers": llama(width, 8, 4 * width, width // 64) for width in (512, 2048, 8192)},
    **{f"width 512, {layers} layers": llama(512, layers, 2048, 8) for layers in (4, 16, 64)},
}


@dataclass(frozen=True)
class Cost:
    """The cost of one case. The import figures are from before the export; `peak_bytes` is of the whole process."""

    name: str
    parameters: int
    checkpoint_bytes: int
    import_s: float
    export_s: float
    import_peak_bytes: int
    peak_bytes: int
    read_bytes: int
    written_bytes: int
    new_disk_bytes: int
    trace: str


def peak_bytes() -> int:
    """Peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def moved() -> tuple[int, int]:
    """Bytes this process has read and written by system calls."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"]), int(fields["wchar"])


def disk_bytes(folder: Path) -> int:
    """Disk space of the files in a folder, except those linked from elsewhere."""
    stats = [file.stat() for file in folder.rglob("*") if file.is_file()]
    return sum(stat.st_blocks * 512 for stat in stats if stat.st_nlink == 1)


def size_bytes(checkpoint: Path) -> int:
    """Size of a checkpoint's weights, holes included."""
    files = [checkpoint] if checkpoint.is_file() else checkpoint.iterdir()
    return sum(file.stat().st_size for file in files if file.suffix in (".safetensors", ".gguf"))


# In a child process


def write(config: dict[str, Any], folder: Path, packed: str | None) -> None:
    """Write a synthetic checkpoint without data, quantised by the method `packed` if one is given."""
    import torch
    from packed_shapes import write_gguf, write_gptq
    from stageline.exporter import skeleton
    from stageline.models.synthetic import write_sparse

    if packed is not None:
        return {"gptq": write_gptq, "gguf": write_gguf}[packed](config, folder)
    model = skeleton.build(skeleton.config_of(config), "text-generation", torch.bfloat16, "eager")
    write_sparse(folder, config, skeleton.parameter_shapes(model), shard_bytes=5 * 1000**3)


def measure(name: str, checkpoint: Path, bundle: Path) -> Cost:
    """Export, and return the cost."""
    began = perf_counter()
    from stageline.exporter.export import export

    import_s, import_peak = perf_counter() - began, peak_bytes()
    read, written = moved()
    began = perf_counter()
    made = export(checkpoint, bundle, stages=STAGES)
    export_s = perf_counter() - began
    now_read, now_written = moved()
    return Cost(
        name=name,
        parameters=sum(math.prod(entry.shape) for entry in made.tensors.values()),
        checkpoint_bytes=size_bytes(checkpoint),
        import_s=import_s,
        export_s=export_s,
        import_peak_bytes=import_peak,
        peak_bytes=peak_bytes(),
        read_bytes=now_read - read,
        written_bytes=now_written - written,
        new_disk_bytes=disk_bytes(bundle),
        trace=made.manifest.trace,
    )


def measure_peer(name: str, checkpoint: Path, folder: Path) -> Cost:
    """Export prefill and decode with transformers' own exporter, as documented."""
    began = perf_counter()
    import torch
    import transformers
    from transformers.exporters import OnnxConfig, OnnxExporter

    import_s, import_peak = perf_counter() - began, peak_bytes()
    read, written = moved()
    began = perf_counter()
    (file,) = checkpoint.glob("*.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, gguf_file=file.name, dtype=torch.float32)
    ids = torch.arange(1, 8).repeat(2, 1)
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    made = OnnxExporter().export_for_generation(model.eval(), sample, OnnxConfig(dynamic=True))
    made.save_pretrained(folder)
    export_s = perf_counter() - began
    now_read, now_written = moved()
    return Cost(
        name=name,
        parameters=model.num_parameters(),
        checkpoint_bytes=size_bytes(checkpoint),
        import_s=import_s,
        export_s=export_s,
        import_peak_bytes=import_peak,
        peak_bytes=peak_bytes(),
        read_bytes=now_read - read,
        written_bytes=now_written - written,
        new_disk_bytes=disk_bytes(folder),
        trace=f"transformers {transformers.__version__}, prefill and decode",
    )


def child(order: dict[str, Any]) -> None:
    """Do one job and print its cost as JSON."""
    if order["job"] == "write":
        write(order["config"], Path(order["to"]), order["packed"])
        return
    job = measure_peer if order["job"] == "peer" else measure
    print(json.dumps(asdict(job(order["name"], Path(order["checkpoint"]), Path(order["to"])))))


# In the parent, which stays small: on Linux a child's peak begins at its parent's


def in_child(**order: Any) -> str:
    """Run one job in a new process and return the last line it printed."""
    command = [sys.executable, __file__, "--child", json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{order.get('name', 'a checkpoint')} failed: {done.stderr[-2000:]}")
    return (done.stdout.splitlines() or [""])[-1]


@contextmanager
def synthetic(config: dict[str, Any], folder: Path, packed: str | None = None) -> Iterator[Path]:
    """A temporary checkpoint of these shapes."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        file = Path(made, "checkpoint.gguf" if packed == "gguf" else "checkpoint")
        in_child(job="write", config=config, to=str(file), packed=packed)
        yield file


def run(job: str, name: str, checkpoint: Path, folder: Path) -> Cost:
    """Run one case, into a temporary bundle."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        cost = Cost(**json.loads(in_child(job=job, name=name, checkpoint=str(checkpoint), to=f"{made}/bundle")))
    print(row(cost), flush=True)
    return cost


HEADER = "                          parameters  checkpoint   imports    export      peak      read   written       new"


def row(cost: Cost) -> str:
    """A line of the table."""
    mib = [n / MIB for n in (cost.peak_bytes, cost.read_bytes, cost.written_bytes, cost.new_disk_bytes)]
    return (
        f"{cost.name:24}  {cost.parameters / 1e6:8.0f} M  {cost.checkpoint_bytes / 1e6:7.0f} MB  "
        f"{cost.import_s:6.1f} s  {cost.export_s:6.1f} s  " + "  ".join(f"{n:4.0f} MiB" for n in mib)
    )


def main() -> None:
    """Measure, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, default=Path("models/checkpoints"), help="the fetched ones")
    parser.add_argument("--no-sweeps", action="store_true", help="leave out the sweeps over width and depth")
    parser.add_argument("--peers", action="store_true", help="also transformers' own ONNX exporter (minutes)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(json.loads(arguments.child))
        return

    print(HEADER, flush=True)
    costs: list[Cost] = []
    # beside the checkpoints: weights can be linked only within one file system
    with tempfile.TemporaryDirectory(dir=arguments.checkpoints, prefix=".export-cost-") as work:
        folder = Path(work)
        for name, title in REFERENCES.items():
            costs.append(run("export", title, arguments.checkpoints / name, folder))
        for title, config in {**MODELS, **({} if arguments.no_sweeps else SWEEPS)}.items():
            with synthetic(config, folder) as checkpoint:
                costs.append(run("export", title, checkpoint, folder))
        for packed, title in PACKED.items():
            with synthetic(LLAMA_7B, folder, packed) as checkpoint:
                costs.append(run("export", title, checkpoint, folder))
        if arguments.peers:
            costs.append(run("peer", "transformers, SmolLM2", arguments.checkpoints / "smollm2", folder))
    if costs:
        base = costs[0]
        print(f"imports alone: {base.import_s:.1f} s, peak {base.import_peak_bytes / MIB:.0f} MiB")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {
            "cores": len(os.sched_getaffinity(0)),
            "stages": STAGES,
            "costs": [asdict(cost) for cost in costs],
        }
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
