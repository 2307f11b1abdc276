"""Which .safetensors files of a folder, or of a repository, are the model's weights, judged by their names."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from stageline.models.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"(?P<before>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<after>.*\.(safetensors|gguf))")
_INDEX = re.compile(r".+\.safetensors\.index(\..+)?\.json")
_NAMED = 6  # files named in a message


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold one model's weights, or the index that says which do."""

    files: tuple[str, ...] = ()
    index: str | None = None


def weight_files(names: Iterable[str], where: object) -> WeightFiles | None:
    """The weights among the `names` of files in one folder; None if there are none.

    The names that transformers gives come first: `model.safetensors`, then the shards of its index. Any other name will
    do if there is only one model to open: one file, one index, or one set of shards. CheckpointError, which begins with
    `where`, if there are several or a shard is missing.
    """
    found = set(names)
    if SINGLE in found:
        return WeightFiles((SINGLE,))
    indexes = [INDEX] if INDEX in found else sorted(filter(_INDEX.fullmatch, found))
    if len(indexes) == 1:
        return WeightFiles(index=indexes[0])
    files = sorted(name for name in found if name.endswith(".safetensors") and not name.startswith("adapter_"))
    sets = {_set_of(name, files) for name in files}
    if len(sets) > 1:
        firsts = sorted(one[0] for one in sets)
        more = f" and {len(firsts) - _NAMED} more" if len(firsts) > _NAMED else ""
        raise CheckpointError(
            f"{where} has weights of several models or variants ({', '.join(firsts[:_NAMED])}{more}); give one's path"
        )
    return complete(sets.pop()[0], files, where) if sets else None


def complete(name: str, names: Iterable[str], where: object) -> WeightFiles:
    """The file `name` with the other shards of its set, by their numbers. CheckpointError if `names` lacks one."""
    shard = _SHARD.fullmatch(name)
    if shard is None:
        return WeightFiles((name,))
    width, count = len(shard["count"]), int(shard["count"])
    wanted = [f"{shard['before']}-{i:0{width}}-of-{shard['count']}{shard['after']}" for i in range(1, count + 1)]
    missing = sorted(set(wanted) - set(names))
    if missing:
        raise CheckpointError(f"{where} lacks {len(missing)} of {count} shards, such as {missing[0]!r}; download them")
    return WeightFiles(tuple(wanted))


def _set_of(name: str, names: list[str]) -> tuple[str, ...]:
    """The files among `names` that are shards of one set with `name`."""
    shard = _SHARD.fullmatch(name)
    if shard is None:
        return (name,)
    parts = shard["before"], shard["count"], shard["after"]
    return tuple(
        n for n in names if (other := _SHARD.fullmatch(n)) and other.group("before", "count", "after") == parts
    )
