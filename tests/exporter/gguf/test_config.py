"""A model that was written as a .gguf is read as the same model; metadata that is not understood stops the export."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from stageline.exporter import skeleton
from stageline.exporter.gguf.config import config, notes
from stageline.exporter.gguf.tensors import GgufTensors
from stageline.exporter.weights import majority_dtype
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import ExportError

gguf = pytest.importorskip("gguf", reason="needs gguf")
from tiny_gguf import VOCABULARY, write_gguf  # noqa: E402

KINDS = gguf.GGMLQuantizationType
ROPE = {"rope_type": "default", "rope_theta": 5e4}
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 256, "initializer_range": 0.3,
    "rope_parameters": ROPE, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
EXPERT_KEYS = {"expert_count": 4, "expert_used_count": 2}
WIDTH_KEYS = {**EXPERT_KEYS, "expert_feed_forward_length": 32}


@dataclass(frozen=True)
class Case:
    """One architecture: values of its config that are unlike the defaults, and the keys that a converter adds."""

    config: type
    values: dict[str, Any]
    keys: dict[str, Any] = field(default_factory=dict)
    drops: tuple[str, ...] = ()


CASES: dict[str, Case] = {
    "llama": Case(
        transformers.LlamaConfig, {"head_dim": 24, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}
    ),
    "mixtral": Case(transformers.MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}, EXPERT_KEYS),
    "qwen2": Case(transformers.Qwen2Config, {"rms_norm_eps": 1e-3, "tie_word_embeddings": True}),
    "qwen3": Case(transformers.Qwen3Config, {"head_dim": 24}),
    "qwen2moe": Case(
        transformers.Qwen2MoeConfig,
        {**EXPERTS, "shared_expert_intermediate_size": 48},
        {**WIDTH_KEYS, "expert_shared_feed_forward_length": 48},
    ),
    "qwen3moe": Case(transformers.Qwen3MoeConfig, {**EXPERTS, "norm_topk_prob": True, "head_dim": 24}, WIDTH_KEYS),
    "gemma2": Case(
        transformers.Gemma2Config,
        {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 16, "attn_logit_softcapping": 20.0,
         "final_logit_softcapping": 10.0, "tie_word_embeddings": True},
        {"attention.sliding_window": 16, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    ),
    "gemma3": Case(
        transformers.Gemma3TextConfig,
        {"num_hidden_layers": 3, "head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 16,
         "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "tie_word_embeddings": True,
         "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        {"attention.sliding_window": 16, "attention.sliding_window_pattern": 3, "rope.scaling.type": "linear",
         "rope.scaling.factor": 8.0},
    ),
    "phi3": Case(
        transformers.Phi3Config,
        {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}, "sliding_window": 16, "pad_token_id": 0},
        {"attention.sliding_window": 16},
    ),
    "starcoder2": Case(transformers.Starcoder2Config, {"norm_epsilon": 1e-3}),
    "stablelm": Case(
        transformers.StableLmConfig,
        {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.25}, "layer_norm_eps": 1e-3, "use_qkv_bias": True},
        {"use_parallel_residual": True},  # stated by converters for models that have none
    ),
    "nemotron": Case(
        transformers.NemotronConfig, {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}, "norm_eps": 1e-3}
    ),
    "falcon": Case(
        transformers.FalconConfig, {"layer_norm_epsilon": 1e-3}, drops=("num_key_value_heads", "intermediate_size")
    ),
    "gpt2": Case(
        transformers.GPT2Config,
        {"n_positions": 256, "layer_norm_epsilon": 1e-3},
        drops=("num_key_value_heads", "intermediate_size", "rope_parameters", "max_position_embeddings"),
    ),
}  # fmt: skip


def tiny(name: str, **changes: Any) -> Any:
    """A random model in evaluation mode, whose vectors (norms, biases) are random as well."""
    case = CASES[name]
    values = {key: value for key, value in {**COMMON, **case.values, **changes}.items() if key not in case.drops}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(case.config(**values), attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def read_back(path: Path) -> Any:
    """The model that an export of the file would be of, with its weights, without any trace."""
    checkpoint = Checkpoint.open(path)
    model: Any = transformers.AutoModelForCausalLM.from_config(
        skeleton.config_of(config(checkpoint)), attn_implementation="eager"
    )
    tensors = GgufTensors(checkpoint, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.copy_(torch.from_numpy(np.array(tensors.read(tensors.names[name]))))
    return model.eval()


def logits(model: Any) -> np.ndarray:
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (2, 60))
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(ids)).logits)


def refusal(path: Path) -> str:
    with pytest.raises(ExportError) as raised:
        config(Checkpoint.open(path))
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama", attention_bias=False, mlp_bias=False)


@pytest.mark.parametrize("name", CASES)
def test_each_architecture_is_the_model_that_it_was_made_of(tmp_path: Path, name: str) -> None:
    model = tiny(name)
    path = write_gguf(tmp_path / "m.gguf", model, "llama" if name == "mixtral" else name, CASES[name].keys)
    assert notes(Checkpoint.open(path)) == []
    want = logits(model)
    np.testing.assert_allclose(logits(read_back(path)), want, atol=1e-5 * np.abs(want).max())


def test_heads_without_a_size_of_their_own_share_the_width(tmp_path: Path) -> None:
    model = tiny("qwen3", head_dim=16)  # transformers' default is 128
    lacking = {"attention.key_length": None, "attention.value_length": None, "rope.dimension_count": None}
    path = write_gguf(tmp_path / "m.gguf", model, "qwen3", lacking)
    want = logits(model)
    np.testing.assert_allclose(logits(read_back(path)), want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.scale", 0.3), ("logit_scale", 0.5), ("final_logit_softcapping", 30.0), ("residual_scale", 0.2),
        ("embedding_scale", 12.0), ("attention.clamp_kqv", 8.0), ("attention.causal", False),
        ("attention.sliding_window", 64), ("attention.max_alibi_bias", 8.0), ("expert_group_count", 2),
        ("rope.dimension_sections", [1, 2, 3, 0]), ("rope.scaling.yarn_log_multiplier", 0.1), ("pooling_type", 3),
        ("nextn_predict_layers", 1),
    ],
)  # fmt: skip
def test_metadata_that_changes_the_computation_stops_the_export(
    tmp_path: Path, llama: Any, key: str, value: object
) -> None:
    message = refusal(write_gguf(tmp_path / "m.gguf", llama, "llama", {key: value}))
    assert re.search(rf"{re.escape(key)} = .* not read from a \.gguf .*export the Hugging Face checkpoint", message)


def test_metadata_without_effect_does_not(tmp_path: Path, llama: Any) -> None:
    neutral = {"attention.scale": 24**-0.5, "logit_scale": 1.0, "expert_count": 0, "attention.causal": True,
               "attention.sliding_window": 256, "tensor_data_layout": "Meta AI original pth", "pooling_type": 0,
               "quantize.imatrix.file": "calibration.dat"}  # fmt: skip
    checkpoint = Checkpoint.open(write_gguf(tmp_path / "m.gguf", llama, "llama", neutral))
    assert config(checkpoint)["head_dim"] == 24
    assert notes(checkpoint) == []


def test_what_only_a_user_can_judge_is_noted(tmp_path: Path, llama: Any) -> None:
    keys = {"flavour": "mild", "general.sampling.temp": 0.5, "general.sampling.top_k": 20}
    found = notes(Checkpoint.open(write_gguf(tmp_path / "m.gguf", llama, "llama", keys)))
    assert found == [
        "metadata that gguf does not know is not read: llama.flavour",
        "the file recommends sampling with temp 0.5, top_k 20; give them with each request",
    ]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"block_count": None}, "the metadata lacks block_count"),
        ({"attention.head_count": 0}, "attention.head_count 0"),
        ({"attention.head_count_kv": [2, 1]}, r"attention.head_count_kv differs from block to block (\[2, 1\])"),
        ({"attention.value_length": 8}, "attention.key_length is 24 and value_length 8"),
        ({"vocab_size": 7}, f"vocab_size is 7, but token_embd.weight has {VOCABULARY} rows"),
        ({"rope.dimension_count": 12}, "rope.dimension_count is 12 of the 24 dimensions of a head"),
        ({"rope.freq_base": "high"}, "could not convert string to float: 'high'"),
    ],
)
def test_metadata_that_contradicts_itself_is_refused(
    tmp_path: Path, llama: Any, keys: dict[str, Any], message: str
) -> None:
    assert re.search(message.replace("(", "[(]").replace(")", "[)]"), refusal(
        write_gguf(tmp_path / "m.gguf", llama, "llama", keys)
    ))  # fmt: skip


def test_an_architecture_that_is_not_read_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "rwkv7")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    assert "has the architecture 'rwkv7'; .gguf files are read of llama, qwen2" in refusal(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": {"blk.0.attn_sinks.weight": np.zeros(4)}}, "has no place for tensor blk.0.attn_sinks.weight"),
        ({"leave_out": ["blk.1.ffn_up.weight"]}, "has no tensor for model.layers.1.mlp.up_proj.weight"),
        ({"extra": {"blk.1.ffn_up.weight": np.zeros((95, 64))}}, "hold 6,080 values, .* has 6,144 by the metadata"),
    ],
)
def test_every_tensor_has_a_place_and_every_parameter_a_tensor(
    tmp_path: Path, llama: Any, change: dict[str, Any], message: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", llama, "llama", **change)
    with pytest.raises(ExportError, match=message):
        read_back(path)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "float32")]
)
def test_an_export_has_the_dtype_of_the_file(tmp_path: Path, llama: Any, kind: str, dtype: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", llama, "llama", kind=KINDS[kind])
    assert majority_dtype(Checkpoint.open(path)) == dtype


ENDS: list[tuple[dict[str, Any], list[int] | int]] = [
    ({}, 1),
    ({"tokenizer.ggml.eot_token_id": 7}, [1, 7]),
    ({"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 8}, [1, 7, 8]),
]


@pytest.mark.parametrize(("keys", "ends"), ENDS)
def test_the_end_of_a_turn_ends_a_text(tmp_path: Path, llama: Any, keys: dict[str, Any], ends: object) -> None:
    assert config(Checkpoint.open(write_gguf(tmp_path / "m.gguf", llama, "llama", keys)))["eos_token_id"] == ends


def test_a_token_that_llama_cpp_knows_as_an_end_is_one(tmp_path: Path, llama: Any) -> None:
    def tokenizer(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["<s>", "</s>", "<|end|>", "<|eot_id|>", *(str(i) for i in range(VOCABULARY - 4))])
        writer.add_token_types([3, 3, 3, 1] + [1] * (VOCABULARY - 4))  # <|eot_id|> is an ordinary word here
        writer.add_eos_token_id(1)

    path = write_gguf(tmp_path / "m.gguf", llama, "llama", tokenizer=tokenizer)
    assert config(Checkpoint.open(path))["eos_token_id"] == [1, 2]


def test_phi3_takes_its_long_factors_from_the_length_that_the_file_states(tmp_path: Path) -> None:
    short, long = [1.0, 1.5, 2.0, 2.5], [2.0, 3.0, 4.0, 8.0]
    rope = {**ROPE, "rope_type": "longrope", "short_factor": short, "long_factor": long, "partial_rotary_factor": 0.5}
    model = tiny("phi3", rope_parameters=rope, original_max_position_embeddings=32, sliding_window=None)
    extra = {"rope_factors_short.weight": np.array(short), "rope_factors_long.weight": np.array(long)}
    keys = {
        "rope.scaling.original_context_length": 32,
        "rope.scaling.attn_factor": (1 + math.log(8) / math.log(32)) ** 0.5,
    }
    want = logits(model)  # of 60 tokens
    got = logits(read_back(write_gguf(tmp_path / "m.gguf", model, "phi3", keys, extra=extra)))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
