"""Every tensor of a checkpoint is the model's, or known not to be needed, or refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from stageline.exporter import skeleton
from stageline.exporter.export import export
from stageline.exporter.weights import Weights, find, place
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import ExportError
from stageline.runtime import Pipeline

Tensors = dict[str, torch.Tensor]
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_attention_heads": 4,
    "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 99, "max_position_embeddings": 64,
}  # fmt: skip
BERT = {
    "model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 32, "num_attention_heads": 4,
    "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 99, "max_position_embeddings": 64,
}  # fmt: skip
Q = "model.layers.0.self_attn.q_proj"


def save(folder: Path, model: Any, change: Callable[[Tensors], object] = lambda tensors: None, **config: Any) -> Path:
    """Save a model in bfloat16 with its tensors changed, and entries of its config.json."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stated, **config}))
    return folder


def random(config: dict[str, Any], factory: Any, **changes: Any) -> Any:
    torch.manual_seed(3)
    parsed = skeleton.config_of({**config, "initializer_range": 0.3, **changes})
    return factory.from_config(parsed).eval()


def llama(**changes: Any) -> Any:
    return random(LLAMA, transformers.AutoModelForCausalLM, **changes)


def found(folder: Path, task: str = "text-generation") -> Weights:
    """What is found in a checkpoint for a task, without tracing."""
    checkpoint = Checkpoint.open(folder)
    model = skeleton.build(skeleton.config_of(checkpoint.config), task, torch.bfloat16, "eager")
    return find(checkpoint, model)


def one_more(name: str, dtype: torch.dtype = torch.bfloat16) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: torch.ones(4, dtype=dtype)})


MIXTRAL = {
    **LLAMA, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_key_value_heads": 2,
    "num_local_experts": 3, "num_experts_per_tok": 2,
}  # fmt: skip
EXPERT = "model.layers.0.block_sparse_moe.experts.2.w2.weight"


def mixtral() -> Any:
    return random(MIXTRAL, transformers.AutoModelForCausalLM)


# Tensors that the model does not have


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (f"{Q}.bias", "bring the config.json they were saved with"),
        (f"{Q}.weight_scale", "quantised with compressed-tensors"),
        (f"{Q}.SCB", "quantised with bitsandbytes"),
        (f"{Q}.qzeros", "quantised with gptq or awq"),
        (f"{Q}.lora_A.weight", "of an adapter; merge it"),
        ("model.layers.0.self_attn.q_norm.weight", "the model computes something else"),
        ("model.layers.2.self_attn.q_proj.weight", "config.json states 2 layers, the tensors reach layer 2"),
        ("model.norm.bias", "the model computes something else"),
        ("lm_head.weight_scale", "quantised with"),
        ("model.embed_tokens.weight_scale_inv", "quantised with fp8"),
    ],
)
def test_a_tensor_inside_a_module_that_lacks_it_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    save(tmp_path, llama(), one_more(name))
    with pytest.raises(ExportError, match="inside modules of LlamaForCausalLM") as caught:
        found(tmp_path)
    assert f"holds 1 tensor ({name})" in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", f"{Q}.masked_bias"],
)
def test_what_the_model_computes_itself_is_ignored(tmp_path: Path, name: str) -> None:
    # Old Llama checkpoints hold rotary frequencies, rounded to half precision.
    weights = found(save(tmp_path, llama(), one_more(name)))
    assert name not in weights.names
    assert f"{Q}.weight" in weights.names
    assert not weights.notes


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    save(tmp_path, llama(), one_more("model.layers.2.eh_proj.weight"), num_nextn_predict_layers=1)
    assert "model.layers.2.eh_proj.weight" not in found(tmp_path).names.values()


def test_other_heads_are_left_out_and_named(tmp_path: Path) -> None:
    save(tmp_path, random(BERT, transformers.AutoModelForPreTraining))
    assert found(tmp_path, "feature-extraction").notes == (
        "7 of the checkpoint's 46 tensors are of parts that BertModel does not have: cls (7)",
    )
    assert found(tmp_path, "fill-mask").notes == (
        "4 of the checkpoint's 46 tensors are of parts that BertForMaskedLM does not have: bert.pooler (2), "
        "cls.seq_relationship (2)",
    )


# Tensors that the checkpoint does not have


def test_a_pooler_that_no_output_reads_may_be_missing(tmp_path: Path) -> None:
    reference = random(BERT, transformers.AutoModelForMaskedLM)
    save(tmp_path / "c", reference)
    bundle = export(tmp_path / "c", tmp_path / "b", task="feature-extraction", dtype="float32")
    assert not any("pooler" in name for use in bundle.manifest.uses for name in use.weights.values())
    ids = np.random.default_rng(1).integers(5, 99, (2, 9))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    with Pipeline.open(tmp_path / "b") as pipeline:
        states = pipeline.run(inputs)["last_hidden_state"]
    with torch.no_grad():
        expected = reference.float().bert(torch.tensor(ids)).last_hidden_state.numpy()
    np.testing.assert_allclose(states, expected, atol=1e-4)


def test_a_missing_weight_of_a_block_is_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"  # of a block that is not traced, but a copy of the first
    save(tmp_path / "c", llama(num_hidden_layers=3), lambda tensors: tensors.pop(name))
    with pytest.raises(ExportError, match=rf"lacks 1 tensor \({name}\), which LlamaForCausalLM needs"):
        export(tmp_path / "c", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_classifier_without_its_head_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "c", random(BERT, transformers.AutoModelForMaskedLM))
    message = (
        r"lacks 4 tensors \(bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias, classifier.weight\)"
    )
    with pytest.raises(ExportError, match=message):
        export(tmp_path / "c", tmp_path / "b", task="text-classification")


def test_a_head_that_is_neither_stored_nor_tied_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "c", llama(tie_word_embeddings=False), lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ExportError, match=r"lacks 1 tensor \(lm_head.weight\).*set tie_word_embeddings to true"):
        export(tmp_path / "c", tmp_path / "b")


def test_names_of_another_code_are_told(tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[f"x.{name}"] = tensors.pop(name)
        tensors["tok_embeddings.weight"] = torch.ones(2)

    with pytest.raises(ExportError, match="the names of Meta's or Mistral's own code"):
        found(save(tmp_path, llama(), rename))


# Tied weights: what the files say


def test_equal_copies_of_a_tied_weight_stay_one(tmp_path: Path) -> None:
    def copy(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    weights = found(save(tmp_path, llama(tie_word_embeddings=True), copy))
    assert weights.names["lm_head.weight"] == weights.names["model.embed_tokens.weight"]
    assert not weights.notes


@pytest.mark.parametrize("stored", ["both", "head"])
def test_a_tied_head_is_what_the_files_say(tmp_path: Path, stored: str) -> None:
    def change(tensors: Tensors) -> None:
        embeddings = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = torch.randn_like(embeddings)
        if stored == "head":
            del tensors["model.embed_tokens.weight"]

    save(tmp_path / "c", llama(tie_word_embeddings=True), change)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c", dtype=torch.float32)
    bundle = export(tmp_path / "c", tmp_path / "b", dtype="float32")
    assert any("ties lm_head.weight" in note for note in bundle.manifest.notes) == (stored == "both")
    ids = np.random.default_rng(2).integers(3, 99, (2, 11))
    with Pipeline.open(tmp_path / "b") as pipeline:
        logits = pipeline.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"]
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-3 * np.abs(expected).max())


# Names of older versions, and of other kinds


def test_old_names_of_layer_norms_are_read(tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(name)

    save(tmp_path, random(BERT, transformers.AutoModelForMaskedLM), rename)
    weights = found(tmp_path, "fill-mask")
    name = "bert.embeddings.LayerNorm.{}"
    assert weights.names[name.format("weight")] == name.format("gamma")
    assert weights.names[name.format("bias")] == name.format("beta")
    assert not weights.missing
    assert not weights.notes


def test_old_names_of_weight_norms_are_read(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "model_type": "wav2vec2",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "conv_dim": [8],
        "conv_stride": [2],
        "conv_kernel": [3],
        "num_feat_extract_layers": 1,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    }

    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            old = name.replace("parametrizations.weight.original0", "weight_g")
            tensors[old.replace("parametrizations.weight.original1", "weight_v")] = tensors.pop(name)

    save(tmp_path, random(config, transformers.AutoModel), rename)
    convolution = "encoder.pos_conv_embed.conv"
    names = found(tmp_path, "feature-extraction").names
    assert names[f"{convolution}.parametrizations.weight.original0"] == f"{convolution}.weight_g"
    assert names[f"{convolution}.parametrizations.weight.original1"] == f"{convolution}.weight_v"


def test_one_weight_under_two_names_with_different_values_is_refused(tmp_path: Path) -> None:
    def twice(tensors: Tensors) -> None:
        tensors["embed_tokens.weight"] = tensors["model.embed_tokens.weight"] + 1

    with pytest.raises(ExportError, match=r"holds model.embed_tokens.weight twice with different values"):
        found(save(tmp_path, llama(), twice))


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.int8, "int8"), (torch.int64, "int64"), (torch.float8_e4m3fn, "float8_e4m3fn")]
)
def test_integers_and_narrow_floats_are_no_weights(tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    save(tmp_path, llama(), lambda tensors: tensors.update({f"{Q}.weight": tensors[f"{Q}.weight"].to(dtype)}))
    with pytest.raises(ExportError, match=rf"tensor {Q}.weight holds {kind}, where the model has real numbers"):
        found(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", [EXPERT, "model.norm.weight"])
def test_nor_where_transformers_merges_tensors(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """It would take the numbers as they are, without their scale."""
    save(tmp_path, mixtral(), lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(ExportError, match=rf"tensor {name} holds .*8.*, where the model has real numbers"):
        found(tmp_path)


def test_an_expert_that_is_missing_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save(tmp_path / "c", mixtral(), lambda tensors: tensors.pop(EXPERT)))
    model = skeleton.build(skeleton.config_of(checkpoint.config), "text-generation", torch.bfloat16, "eager")
    merged = r"the tensors of model.layers.0.mlp.experts.down_proj make it \[2, 32, 48\], config.json \[3, 32, 48\]"
    with pytest.raises(ExportError, match=rf"{merged}; some are missing, or the config"):
        place(find(checkpoint, model), model, "bfloat16", tmp_path, [])


def test_experts_that_are_stored_whole_and_in_parts_are_refused(tmp_path: Path) -> None:
    whole = "model.layers.0.mlp.experts.down_proj"
    save(tmp_path, mixtral(), lambda tensors: tensors.update({whole: torch.ones(3, 32, 48, dtype=torch.bfloat16)}))
    with pytest.raises(ExportError, match=rf"holds {whole} twice, whole \({whole}\) and in parts \(model.*w2.weight\)"):
        found(tmp_path)


def test_tensors_that_cannot_be_merged_are_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save(tmp_path / "c", mixtral(), lambda t: t.update({EXPERT: torch.ones(7, 5)})))
    model = skeleton.build(skeleton.config_of(checkpoint.config), "text-generation", torch.bfloat16, "eager")
    with pytest.raises(ExportError, match="holds tensors that cannot be merged into those of MixtralForCausalLM; the"):
        place(find(checkpoint, model), model, "bfloat16", tmp_path, [])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "language_model."])
def test_a_prefix_before_all_names_is_told(tmp_path: Path, prefix: str) -> None:
    def wrap(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    with pytest.raises(ExportError, match=rf"it holds them with '{prefix}' before these names"):
        found(save(tmp_path, llama(tie_word_embeddings=True), wrap))


def test_a_number_of_layers_that_is_too_large_is_told(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"config.json states 3 layers, the tensors reach layer 1; correct num_hid"):
        export(save(tmp_path / "c", llama(), num_hidden_layers=3), tmp_path / "b")


@pytest.mark.parametrize("rows", [96, 104])
def test_a_vocabulary_that_was_changed_is_told(tmp_path: Path, rows: int) -> None:
    def resize(tensors: Tensors) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.ones(rows, 32, dtype=torch.bfloat16)

    with pytest.raises(ExportError, match=f"if the vocabulary was changed, set vocab_size from 99 to {rows} there"):
        found(save(tmp_path, llama(), resize))


def test_weights_that_were_not_gathered_are_refused_as_such(tmp_path: Path) -> None:
    """What DeepSpeed's ZeRO-3 saves where it was not told to gather them."""
    empty = torch.ones(0, dtype=torch.bfloat16)
    save(tmp_path, llama(), lambda tensors: tensors.update({name: empty.clone() for name in tensors if "proj" in name}))
    with pytest.raises(ExportError, match=r"shape \[0\] .*it is empty, .*ZeRO-3.*; gather the weights"):
        found(tmp_path)


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    save(tmp_path, llama(), lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(ExportError, match=r"model.norm.weight has shape \[7\] but config.json makes it \[32\]"):
        found(tmp_path)


def test_a_stored_buffer_of_real_numbers_is_not_replaced_by_its_first_value(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "model_type": "deepseek_v3",
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 0,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "vocab_size": 99,
    }
    bias = "model.layers.0.mlp.gate.e_score_correction_bias"
    save(tmp_path / "c", random(config, transformers.AutoModelForCausalLM), lambda tensors: tensors.pop(bias))
    with pytest.raises(ExportError, match=rf"lacks 1 tensor \({bias}\)"):
        export(tmp_path / "c", tmp_path / "b", task="text-generation")


def test_a_config_may_lack_a_part(tmp_path: Path) -> None:
    config = {**BERT, "model_type": "esm", "architectures": ["EsmForMaskedLM"], "pad_token_id": 1, "mask_token_id": 2}
    assert not found(save(tmp_path, random(config, transformers.AutoModelForMaskedLM)), "fill-mask").missing
