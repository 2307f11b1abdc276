"""What gpu_proof.py needs on a machine with a GPU and without a package index, in parts that can be carried there.

    python benchmarks/gpu_kit.py OUT

The machine has Python 3.12, torch for CUDA 13 with its libraries, transformers, onnx and pytest. The parts bring what
it lacks: pydantic, a newer onnx-ir, onnxruntime-gpu with machine code for one kind of GPU, and what gpu_materials.py
makes. docs/gpu.md says what to do with them. Needs stageline[export], and pip with its index.
"""

import argparse
import io
import lzma
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import gpu_materials
from gpu_proof import MATERIALS

MIB = 1 << 20
PART_BYTES = 30 * MIB
WITH_NEEDS = ("pydantic>=2.10,<3",)
ALONE = ("onnx-ir>=1.1,<2", "nvidia-ml-py>=12.575")
ONNXRUNTIME = "onnxruntime-gpu>=1.31,<2"
PLATFORMS = tuple(f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17)) + ("manylinux2014_x86_64",)
_NEEDLESS = (
    "/transformers/",
    "/quantization/",
    "/tools/",
    "/backend/",
    "/datasets/",
    "libonnxruntime.so",
    "tensorrt.so",
)
"""Of onnxruntime-gpu: its Python module has ONNX Runtime inside, and needs its CUDA provider alone."""
_PROVIDER = "libonnxruntime_providers_cuda.so"
_FATBIN, _FATBIN_HEADER, _ENTRY_LEAST, _ENTRY_MOST = 0xBA55ED50, 16, 32, 4096

RUN = """#!/bin/bash
# Keeps this part of the kit; once all are kept, runs the proof. To be run in the root of the repository:
#   [KIT=FOLDER] [OUT=FOLDER] [MINUTES=8] [PYTHON=python3] bash FOLDER/run.sh
set -euo pipefail
KIT=${KIT:-/tmp/stageline-kit} OUT=${OUT:-$PWD/proof} PYTHON=${PYTHON:-python3}
mkdir -p "$KIT/parts" "$KIT/view/stageline" "$OUT" .cache
cp "$(dirname "$0")"/part.* "$KIT/parts/"
kept=$(ls "$KIT/parts" | wc -l)
if [ "$kept" -lt {parts} ]; then echo "kept: $kept of {parts} parts are here"; exit 0; fi
if [ ! -d "$KIT/kit" ]; then
  rm -rf "$KIT/unpacking"
  cat "$KIT"/parts/part.* | "$PYTHON" -c 'import sys, tarfile
tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz").extractall(sys.argv[1], filter="data")' "$KIT/unpacking"
  mv "$KIT/unpacking" "$KIT/kit"
fi
for floor in models runtime exporter dashboard; do ln -sfn "$PWD/$floor" "$KIT/view/stageline/$floor"; done
[ -d .cache/gpu_proof ] || cp -r "$KIT/kit/gpu_proof" .cache/gpu_proof
export PYTHONPATH=$KIT/view:$KIT/kit/site PYTHONUNBUFFERED=1
purelib=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
for libraries in "$purelib"/nvidia/*/lib; do LD_LIBRARY_PATH=$libraries:${LD_LIBRARY_PATH:-}; done
export LD_LIBRARY_PATH
# The results come as one file, which is there whatever happens.
keep() { tar --exclude "./.*" -czf "$OUT/.new" -C "$KIT/out" . || true; mv "$OUT/.new" "$OUT/proof.tgz"; }
mkdir -p "$KIT/out"
(while sleep 5; do keep || true; done) & keeper=$!
status=0
"$PYTHON" benchmarks/gpu_proof.py --minutes "${MINUTES:-8}" --out "$KIT/out" || status=$?
kill $keeper
keep
exit $status
"""


def slim(library: bytearray, capability: int) -> int:
    """Zero the machine code for other compute capabilities in a CUDA library, and return how many bytes that were.

    Nothing moves, and the driver reads the entry of its own GPU only. A fat binary is a header (magic, version, size of
    the header, size of the rest) and entries (kind, version, size of the header, size of the code, ..., at byte 28 the
    compute capability). ValueError if there is no code for `capability`.
    """
    magic, place, zeroed, kept = struct.pack("<I", _FATBIN), 0, 0, 0
    others: set[int] = set()
    while (found := library.find(magic, place)) >= 0:
        version, header, size = struct.unpack_from("<HHQ", library, found + 4)
        end = found + _FATBIN_HEADER + size
        if version != 1 or header != _FATBIN_HEADER or end > len(library):
            place = found + len(magic)  # these bytes mean something else
            continue
        for begin, length, of in _entries(library, found + _FATBIN_HEADER, end):
            if of == capability:
                kept += length
            else:
                library[begin : begin + length] = bytes(length)
                zeroed += length
                others.add(of)
        place = end
    if not kept:
        there = ", ".join(map(str, sorted(others))) or "none"
        raise ValueError(f"the library has no code for compute capability {capability}; it has: {there}")
    return zeroed


def _entries(library: bytearray, place: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Place, size and compute capability of each code."""
    while place < end:
        _, _, header, size = struct.unpack_from("<HHIQ", library, place)
        if not _ENTRY_LEAST <= header <= _ENTRY_MOST or size > end - place:
            return
        yield place + header, size, struct.unpack_from("<I", library, place + 28)[0]
        place += header + size


def download(folder: Path, *requirements: str) -> None:
    """Download wheels for the machine."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--python-version", "3.12", "--implementation", "cp"]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    done = subprocess.run([*command, *requirements], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        sys.exit(f"pip cannot download {' '.join(requirements)}: {said}")


def contents(capability: int) -> Iterator[tuple[str, bytes]]:
    """The files of the kit: packages under site/, materials under gpu_proof/."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        download(folder, *WITH_NEEDS)
        download(folder, "--no-deps", *ALONE, ONNXRUNTIME)
        for wheel in sorted(folder.glob("*.whl")):
            print(f"  {wheel.stat().st_size / MIB:8.2f} MiB  {wheel.name}", flush=True)
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.endswith("/") or any(part in name for part in _NEEDLESS if name.startswith("onnxruntime/")):
                        continue
                    data = bytearray(archive.read(name))
                    if name.endswith(_PROVIDER):
                        print(f"  {slim(data, capability) / MIB:8.2f} MiB  of it are code for other GPUs: zeroed")
                    yield f"site/{name}", bytes(data)
    for file in sorted(path for path in MATERIALS.rglob("*") if path.is_file()):
        if file.suffix != ".safetensors" or "shapes" not in file.parts:  # those of shapes are drawn there
            yield f"gpu_proof/{file.relative_to(MATERIALS)}", file.read_bytes()


def packed(capability: int) -> bytes:
    """The kit as one archive."""
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    stream = io.BytesIO()
    with (
        lzma.LZMAFile(stream, "w", format=lzma.FORMAT_XZ, filters=filters) as compressed,
        tarfile.open(fileobj=compressed, mode="w|") as archive,
    ):
        for name, data in contents(capability):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def main() -> None:
    """Make the materials that are lacking, pack, and print the sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder for the parts")
    parser.add_argument("--capability", type=int, default=90, help="of the machine's GPU (default 90: H100, H200)")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists; give a new folder")
    gpu_materials.make(MATERIALS, lambda what: print(f"making {what}", flush=True))
    try:
        kit = packed(arguments.capability)
    except ValueError as error:
        parser.error(f"--capability {arguments.capability}: {error}")
    pieces = [kit[begin : begin + PART_BYTES] for begin in range(0, len(kit), PART_BYTES)]
    for number, piece in enumerate(pieces, 1):
        folder = arguments.out / str(number)
        folder.mkdir(parents=True)
        (folder / f"part.{number:02}").write_bytes(piece)
        (folder / "run.sh").write_text(RUN.replace("{parts}", str(len(pieces))))
        print(f"{folder}: {len(piece) / MIB:.2f} MiB")
    print(f"{len(kit) / MIB:.2f} MiB in {len(pieces)} parts; docs/gpu.md says how to run them")


if __name__ == "__main__":
    main()
