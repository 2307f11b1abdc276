"""Checkpoints and bundles that many tests read: tiny ones that are made up, and the reference ones."""

import functools
import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

gc.set_threshold(100_000, 20, 100)  # tracing makes millions of objects that live on: collecting costs an eighth of it
MadeOnce = Callable[[str, Callable[[Path], object]], Path]
ExportOnce = Callable[..., Path]
TINY_BERT: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "vocab_size": 12,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "max_position_embeddings": 512,
    "bos_token_id": 2,
    "eos_token_id": None,
}
WORD_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "sat", "ran", "on", "mats")


@pytest.fixture(scope="session", autouse=True)
def torchlib_parsed_once() -> None:
    """torch parses the source of torchlib's 500 functions for every export anew, a tenth of its time; here once."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    parse: Any = ONNXRegistry.from_torchlib
    ONNXRegistry.from_torchlib = classmethod(functools.cache(parse.__func__))  # type: ignore[method-assign]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, since workers take whole files and the last one would run alone: those that read the
    reference checkpoints, then those with the most slow tests."""
    order: dict[Path, list[int]] = {}
    for item in items:
        of_file = order.setdefault(item.path, [0, 0])
        of_file[0] -= item.get_closest_marker("checkpoints") is not None
        of_file[1] -= item.get_closest_marker("slow") is not None
    items.sort(key=lambda item: (order[item.path][0] == 0, order[item.path][1]))


def write_tokenizer(folder: Path, words: tuple[str, ...] = WORDS) -> None:
    """A word tokenizer with BERT's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(words[:5]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"mask_token": "[MASK]", "tokenizer_class": "PreTrainedTokenizerFast"})
    )


def _make_checkpoint(folder: Path, **changes: Any) -> Path:
    """A tiny BERT with random weights and a tokenizer; `changes` are entries of its config."""
    from stageline.exporter.synthesize import synthesize

    config: Mapping[str, Any] = {**TINY_BERT, **changes}
    synthesize(config, folder, seed=5, dtype="bfloat16")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Path]:
    """Makes a tiny BERT in the folder it is given; keywords are changes to its config."""
    return _make_checkpoint


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Gives the path of a name, at which a function makes something: once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def get(name: str, make: Callable[[Path], object]) -> Path:
        with FileLock(root / f"{name}.lock"):
            if not (root / name).exists():
                make(root / name)
        return root / name

    return get


@pytest.fixture(scope="session")
def export_once(made_once: MadeOnce) -> ExportOnce:
    """Exports a config with random weights, once for all tests that ask for the same; do not change the bundle."""
    from stageline.exporter.export import export
    from stageline.exporter.synthesize import synthesize
    from stageline.runtime.bundle.recut import recut

    def get(config: Mapping[str, Any], stages: int = 1, seed: int = 1, dtype: str = "bfloat16") -> Path:
        name = "export-" + hashlib.sha256(json.dumps([config, seed, dtype], sort_keys=True).encode()).hexdigest()[:16]
        checkpoint = made_once(f"{name}-from", lambda folder: synthesize(config, folder, seed=seed, dtype=dtype))
        whole = made_once(name, lambda folder: export(checkpoint, folder))
        if stages == 1:
            return whole
        return made_once(f"{name}-{stages}", lambda folder: recut(shutil.copytree(whole, folder), stages))

    return get


@pytest.fixture(scope="session")
def tiny_checkpoint(made_once: MadeOnce) -> Path:
    """A BERT classifier of three blocks; do not change it."""
    return made_once("tiny-checkpoint", _make_checkpoint)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, made_once: MadeOnce) -> Path:
    """`tiny_checkpoint` exported to two stages; do not change it, copy it."""
    from stageline.exporter.export import export

    return made_once("tiny-bundle", lambda folder: export(tiny_checkpoint, folder, stages=2))


@pytest.fixture(scope="session")
def tiny_llama(made_once: MadeOnce) -> Path:
    """A Llama of six blocks that generates, exported to one stage; do not change it, copy it."""
    from stageline.exporter.export import export

    checkpoint = made_once("tiny-llama-checkpoint", lambda folder: _make_checkpoint(folder, **TINY_LLAMA))
    return made_once("tiny-llama", lambda folder: export(checkpoint, folder))


@pytest.fixture(scope="session")
def word_llama_checkpoint(made_once: MadeOnce) -> Path:
    """A Llama of three blocks that generates the words of `WORDS`; do not change it."""
    return made_once("word-llama-checkpoint", lambda folder: _make_checkpoint(folder, **WORD_LLAMA))


@pytest.fixture(scope="session")
def word_llama(word_llama_checkpoint: Path, made_once: MadeOnce) -> Path:
    """`word_llama_checkpoint` exported to two stages; do not change it, copy it."""
    from stageline.exporter.export import export

    return made_once("word-llama", lambda folder: export(word_llama_checkpoint, folder, stages=2))


@pytest.fixture(scope="session")
def link_reference_bundle(made_once: MadeOnce) -> Callable[[str, Path], Path]:
    """Links the files of a reference checkpoint's bundle, of one stage, into a folder: replace them there, do not write
    into them. Skips the test where the checkpoint is not fetched."""
    from stageline.exporter.export import export
    from stageline.models.catalogue import default_root

    def link(name: str, folder: Path) -> Path:
        checkpoint = default_root() / name
        if not checkpoint.is_dir():
            pytest.skip(f"{name} is not here: stageline models fetch {name}")
        there = Path(os.environ.get("STAGELINE_REFERENCE", "nowhere")) / name  # make test exports them beside mypy
        make = functools.partial(shutil.copytree, there) if there.is_dir() else functools.partial(export, checkpoint)
        made = made_once(name, make)
        return Path(shutil.copytree(made, folder, copy_function=os.link))

    return link
