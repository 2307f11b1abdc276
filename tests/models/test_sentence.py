"""How a sentence-transformers checkpoint pools, read from its own files, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from stageline.models import synthetic
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import CheckpointError
from stageline.models.sentence import Normalize, SentencePooling, pooling

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
        ({"pooling_mode": ["lasttoken"]}, "lasttoken"),
    ],
)
def test_each_mode_is_read(tmp_path: Path, config: dict[str, Any], mode: str) -> None:
    found = pooling(checkpoint(tmp_path, PLAIN, config))
    assert found is not None
    assert (found.modes, found.steps, found.max_seq_length) == ((mode,), (), None)


def test_normalize_and_the_length_are_read(tmp_path: Path) -> None:
    held = checkpoint(tmp_path, chain("Transformer", "Pooling", "Normalize"), {"pooling_mode_cls_token": True})
    (held.path / "sentence_bert_config.json").write_text('{"max_seq_length": 384}')
    assert pooling(held) == SentencePooling(("cls",), (Normalize(),), max_seq_length=384)


def test_several_modes_are_joined_in_the_order_of_sentence_transformers(tmp_path: Path) -> None:
    flags = {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True, "pooling_mode_cls_token": False}
    old = pooling(checkpoint(tmp_path / "old", PLAIN, flags))
    new = pooling(checkpoint(tmp_path / "new", PLAIN, {"pooling_mode": ["mean", "cls"]}))
    assert old is not None
    assert new is not None
    assert (old.modes, new.modes) == (("max", "mean"), ("mean", "cls"))


def test_a_cross_encoder_is_none_of_those_that_embed(tmp_path: Path) -> None:
    held = checkpoint(tmp_path, chain("Transformer"), {})
    (held.path / "config_sentence_transformers.json").write_text('{"model_type": "CrossEncoder"}')
    assert pooling(held) is None
    (held.path / "config_sentence_transformers.json").write_text('{"model_type": "SparseEncoder"}')
    with pytest.raises(CheckpointError, match="chains Transformer of a SparseEncoder; supported is a Sentence"):
        pooling(held)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("2_Dense/config.json", {"in_features": 4, "out_features": 2, "activation_function": "my.Own"}, "its own code"),
        ("2_Dense/config.json", {"in_features": 4}, "has the out_features None, a positive number is needed"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "module_input_name 'token_embeddings'; sup"),
        ("sentence_bert_config.json", {"query_expansion": {"length": 32}}, r"has query_expansion \{'length': 32\}, wh"),
        (
            "sentence_bert_config.json",
            {"transformer_task": "fill-mask"},
            "has transformer_task 'fill-mask', which is no",
        ),
        ("config_sentence_transformers.json", {"prompts": {"a": 1}}, "has prompts that are no texts by name"),
        (
            "config_sentence_transformers.json",
            {"default_prompt_name": "q"},
            "has the default_prompt_name 'q', which pr",
        ),
        ("config_sentence_transformers.json", {"similarity_fn_name": "x"}, "has the similarity 'x', known are cosine"),
        ("1_Pooling/config.json", {"pooling_mode": "cls", "include_prompt": False}, "leaves the prompt out"),
    ],
)
def test_a_setting_that_cannot_be_followed_is_named(
    tmp_path: Path, file: str, values: dict[str, Any], message: str
) -> None:
    held = checkpoint(tmp_path, chain("Transformer", "Pooling", "Dense"), {"pooling_mode": "cls"})
    (held.path / "config_sentence_transformers.json").write_text('{"prompts": {"query": "q: "}}')
    (held.path / "2_Dense").mkdir()
    (held.path / "2_Dense/config.json").write_text('{"in_features": 4, "out_features": 2}')
    (held.path / file).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        pooling(held)


@pytest.mark.parametrize(
    ("modules", "config", "message"),
    [
        (chain("Transformer", "Pooling", "CNN"), {}, "chains Transformer, Pooling, CNN of a SentenceTransformer; supp"),
        (chain("WordEmbeddings", "Pooling"), {}, "chains WordEmbeddings, Pooling of a"),
        (chain("Router"), {}, "chains Router of a"),
        (chain("MLMTransformer", "SpladePooling"), {}, "chains MLMTransformer, SpladePooling of a"),
        (chain("Transformer", "WeightedLayerPooling"), {}, "chains Transformer, WeightedLayerPooling"),
        ([], {}, "chains nothing"),
        ({}, {}, "modules.json holds a dict, a list of modules is needed"),
        ([{"type": "custom_st.Transformer", "path": ""}], {}, "type 'custom_st.Transformer', which is its own code"),
        ([{"path": ""}], {}, "lacks type or path"),
        ([{"type": "sentence_transformers.models.Pooling", "path": "../x"}], {}, r"in '../x', outside the folder"),
        (PLAIN, {"pooling_mode": "median"}, "pooling mode 'median', known are mean, cls"),
        (PLAIN, {}, "sets no pooling mode; supported are pooling_mode_cls_token"),
        (PLAIN, {"pooling_mode_magic": True}, "sets pooling_mode_magic; supported"),
    ],
)
def test_what_cannot_be_exported_is_named(tmp_path: Path, modules: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        pooling(checkpoint(tmp_path, modules, config))


def test_a_transformer_in_a_folder_of_its_own_is_refused(tmp_path: Path) -> None:
    modules = [{**PLAIN[0], "path": "0_Transformer"}, PLAIN[1]]
    with pytest.raises(CheckpointError, match=r"puts the Transformer into '0_Transformer'; move its files up"):
        pooling(checkpoint(tmp_path, modules, {}))


def test_a_folder_whose_transformer_lies_deeper_says_what_to_move(tmp_path: Path) -> None:
    held = checkpoint(tmp_path, [{**PLAIN[0], "path": "0_Transformer"}, PLAIN[1]], {}).path
    (held / "0_Transformer").mkdir()
    for name in "config.json", "model.safetensors":
        (held / name).rename(held / "0_Transformer" / name)
    with pytest.raises(CheckpointError, match=r"keeps its Transformer in a folder of its own \(0_Transformer\); move"):
        Checkpoint.open(held)


def test_a_senseless_length_is_refused(tmp_path: Path) -> None:
    held = checkpoint(tmp_path, PLAIN, {"pooling_mode_cls_token": True})
    (held.path / "sentence_bert_config.json").write_text('{"max_seq_length": "long"}')
    with pytest.raises(CheckpointError, match=r"max_seq_length 'long', a positive number is needed"):
        pooling(held)


@pytest.mark.checkpoints
@pytest.mark.skipif(not MINILM.is_dir(), reason="needs the reference checkpoint: stageline models fetch minilm")
def test_minilm_pools_by_mean_and_normalizes() -> None:
    assert pooling(Checkpoint.open(MINILM)) == SentencePooling(("mean",), (Normalize(),), max_seq_length=256)
