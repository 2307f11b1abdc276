"""How a sentence-transformers checkpoint pools, read from its own files, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from stageline.models import synthetic
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import CheckpointError
from stageline.models.sentence import SentencePooling, pooling

MINILM = Path("models/checkpoints/minilm")


def checkpoint(tmp_path: Path, modules: Any, pooling_config: dict[str, Any]) -> Checkpoint:
    folder = tmp_path / "checkpoint"
    synthetic.write_sparse(folder, {"model_type": "bert"}, {"a": ("float32", (2,))})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling_config))
    return Checkpoint.open(folder)


def chain(*names: str) -> list[dict[str, str]]:
    paths = {"Transformer": ""}
    return [
        {"type": f"sentence_transformers.models.{name}", "path": paths.get(name, f"{number}_{name}")}
        for number, name in enumerate(names)
    ]


PLAIN = chain("Transformer", "Pooling")


def test_a_plain_checkpoint_has_no_pooling(tmp_path: Path) -> None:
    synthetic.write_sparse(tmp_path / "c", {}, {"a": ("float32", (2,))})
    assert pooling(Checkpoint.open(tmp_path / "c")) is None


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len_tokens"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_each_mode_is_read(tmp_path: Path, config: dict[str, Any], mode: str) -> None:
    found = pooling(checkpoint(tmp_path, PLAIN, config))
    assert found is not None
    assert (found.mode, found.normalize, found.max_seq_length) == (mode, False, None)


def test_normalize_and_the_length_are_read(tmp_path: Path) -> None:
    held = checkpoint(tmp_path, chain("Transformer", "Pooling", "Normalize"), {"pooling_mode_cls_token": True})
    (held.path / "sentence_bert_config.json").write_text('{"max_seq_length": 384}')
    assert pooling(held) == SentencePooling("cls", normalize=True, max_seq_length=384)


@pytest.mark.parametrize(
    ("modules", "config", "message"),
    [
        (chain("Transformer", "Pooling", "Dense"), {}, "chains Transformer, Pooling, Dense; supported is Transformer"),
        (chain("Transformer", "WeightedLayerPooling"), {}, "chains Transformer, WeightedLayerPooling"),
        ([], {}, "chains nothing"),
        ({}, {}, "modules.json holds a dict, a list of modules is needed"),
        ([{"type": "custom_st.Transformer", "path": ""}], {}, "type 'custom_st.Transformer', which is its own code"),
        ([{"path": ""}], {}, "lacks type or path"),
        ([{"type": "sentence_transformers.models.Pooling", "path": "../x"}], {}, r"in '../x', outside the folder"),
        (PLAIN, {"pooling_mode": "median"}, "pooling mode 'median', known are mean, cls"),
        (PLAIN, {}, "sets no pooling mode; supported is exactly one of"),
        (PLAIN, {"pooling_mode_magic": True}, "sets pooling_mode_magic; supported"),
        (
            PLAIN,
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            "sets pooling_mode_cls_token and pooling_mode_mean_tokens; supported is exactly one",
        ),
    ],
)
def test_what_cannot_be_exported_is_named(tmp_path: Path, modules: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        pooling(checkpoint(tmp_path, modules, config))


def test_a_transformer_in_a_folder_of_its_own_is_refused(tmp_path: Path) -> None:
    modules = [{**PLAIN[0], "path": "0_Transformer"}, PLAIN[1]]
    with pytest.raises(CheckpointError, match=r"puts the Transformer into '0_Transformer'; move its files up"):
        pooling(checkpoint(tmp_path, modules, {}))


def test_a_senseless_length_is_refused(tmp_path: Path) -> None:
    held = checkpoint(tmp_path, PLAIN, {"pooling_mode_cls_token": True})
    (held.path / "sentence_bert_config.json").write_text('{"max_seq_length": "long"}')
    with pytest.raises(CheckpointError, match=r"max_seq_length 'long', a positive number is needed"):
        pooling(held)


@pytest.mark.checkpoints
@pytest.mark.skipif(not MINILM.is_dir(), reason="needs the reference checkpoint: stageline models fetch minilm")
def test_minilm_pools_by_mean_and_normalizes() -> None:
    assert pooling(Checkpoint.open(MINILM)) == SentencePooling("mean", normalize=True, max_seq_length=256)
