"""CUDA's libraries without a GPU, made for the CUDA provider of ONNX Runtime: they accept every call and count it.

They show what opens, where each node is placed, and what a step launches, copies and waits for. They compute nothing.
"""

import ctypes
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
LIBRARIES = (
    "libcuda.so.1",
    "libcudart.so.13",
    "libcublas.so.13",
    "libcublasLt.so.13",
    "libcurand.so.10",
    "libcudnn.so.9",
)
_BY_HAND = {"libcuda.so.1": "stub_cuda.c", "libcudart.so.13": "stub_cudart.c"}


def compiler() -> str | None:
    """The C compiler."""
    return shutil.which("cc") or shutil.which("gcc")


def make(folder: Path, provider: Path, headers: Sequence[Path]) -> None:
    """Compile the libraries into `folder`. `provider`: ONNX Runtime's CUDA provider, `headers`: the folders of those of
    CUDA's runtime."""
    wanted = _undefined(provider)
    wanted["libcudnn.so.9"] = set(re.findall(r"\0(cudnn[A-Z]\w+)(?=\0)", provider.read_bytes().decode("latin-1")))
    for library in LIBRARIES:
        sources = [HERE / _BY_HAND[library]] if library in _BY_HAND else []
        written = sources[0].read_text() if sources else ""
        missing = sorted(n for n in wanted.get(library, ()) if not re.search(rf"\b{n}\(", written))
        made = folder / f"{library}.c"
        made.write_text('#include <string.h>\n#include "stub_calls.h"\n' + "\n".join(map(_function, missing)) + "\n")
        versions = folder / f"{library}.map"
        versions.write_text(f"{library} {{ global: *; }};\n")
        versioned = [] if library == "libcuda.so.1" else [f"-Wl,--version-script={versions}"]
        command = [
            compiler() or "cc",
            "-shared",
            "-fPIC",
            "-fcommon",
            "-O1",
            "-w",
            *[f"-I{one}" for one in (*headers, HERE)],
            f"-Wl,-soname,{library}",
        ]
        subprocess.run([*command, *versioned, "-o", folder / library, *sources, made, "-ldl"], check=True)


def calls() -> Counter[str]:
    """How often each function was called in this process, which uses the libraries."""
    counted: Counter[str] = Counter()
    for library in LIBRARIES:
        try:
            at = ctypes.POINTER(_Calls).in_dll(ctypes.CDLL(library), "stub_calls")
        except (OSError, ValueError):
            continue
        while at:
            counted[at.contents.name.decode()] += at.contents.count
            at = at.contents.next
    return counted


class _Calls(ctypes.Structure):
    pass


_Calls._fields_ = [("name", ctypes.c_char_p), ("count", ctypes.c_long), ("next", ctypes.POINTER(_Calls))]


def _undefined(provider: Path) -> dict[str, set[str]]:
    """The names that the provider takes from each library."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", provider], capture_output=True, text=True, check=True)
    wanted: dict[str, set[str]] = {}
    for line in listed.stdout.splitlines():
        name, _, library = line.split()[-1].partition("@")
        if library in LIBRARIES:
            wanted.setdefault(library, set()).add(name)
        elif re.match(r"cu[A-Z]", name):
            wanted.setdefault("libcuda.so.1", set()).add(name)
    return wanted


def _function(name: str) -> str:
    """A function of this name that does nothing, and reports success."""
    if name.startswith(("cublasGetStatus", "cudnnGetErrorString")):
        return f'const char *{name}(int status) {{ return "stub"; }}'
    if name == "cudnnGetVersion":
        return "size_t cudnnGetVersion(void) { return 91000; }"
    if name == "cublasLtMatmulAlgoGetHeuristic":  # one algorithm is found
        given = "void *a, void *b, void *c, void *d, void *e, void *f, void *g, int count, char *to, int *found"
        return f"int {name}({given}) {{ memset(to, 0, 64); *found = 1; return 0; }}"
    if "Create" in name:
        place = "second" if "Backend" in name else "first"
        return f"int {name}(void **first, void **second) {{ static long made[64]; *{place} = made; return 0; }}"
    return f"int {name}(void) {{ CALLED; return 0; }}"
