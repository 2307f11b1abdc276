"""Makes a small checkpoint of a large one, to draft for it: some of its blocks, with its embeddings and head.

    python benchmarks/cut_draft.py checkpoints/smollm2 checkpoints/smollm2-draft --blocks 0-7,29
    stageline export checkpoints/smollm2-draft -o bundles/smollm2-draft --quantise int8
    python benchmarks/speculation.py bundles/smollm2 --draft bundles/smollm2-draft

It was never trained to be as it is: what it guesses right is the least that a draft of its size can do.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.*)")


def cut(source: Path, target: Path, blocks: list[int]) -> None:
    """Write the checkpoint at `target`, a new folder, with these of the blocks of the Llama at `source`."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, target)
    config = json.loads((source / "config.json").read_text())
    config["num_hidden_layers"] = len(blocks)
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    kept = {}
    with safe_open(source / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            found = _BLOCK.fullmatch(name)
            if found is None:
                kept[name] = tensors.get_tensor(name)
            elif int(found[1]) in blocks:
                kept[f"model.layers.{blocks.index(int(found[1]))}.{found[2]}"] = tensors.get_tensor(name)
    save_file(kept, target / "model.safetensors", {"format": "pt"})


def main() -> None:
    """Cut what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("draft", type=Path)
    parser.add_argument("--blocks", default="0-7,29", help="numbers and ranges, from 0 on")
    given = parser.parse_args()
    blocks: list[int] = []
    for one in given.blocks.split(","):
        first, _, last = one.partition("-")
        blocks += range(int(first), int(last or first) + 1)
    cut(given.checkpoint, given.draft, blocks)


if __name__ == "__main__":
    main()
