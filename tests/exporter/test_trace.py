"""The smallest models are built without data and traced with their blocks marked."""

from typing import Any

import pytest
import torch
from stageline.exporter import skeleton, tasks
from stageline.exporter.attention import Attention, CacheAttention, FusedAttention
from stageline.exporter.skeleton import RefusedError
from stageline.exporter.trace import Trace, representatives, trace
from stageline.models.errors import ExportError
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 12, "num_hidden_layers": 3, "vocab_size": 19,
    "max_position_embeddings": 32,
}  # fmt: skip


def traced(attention: Attention, real: frozenset[int]) -> Trace:
    with attention.installed():
        model = skeleton.build(skeleton.config_of(LLAMA), "text-generation", torch.float32, attention.implementation)
        mode = skeleton.fake_mode()
        skeleton.fake_weights(model, mode, ())
        task = attention.wrap(model, torch.float32, "text-generation", None)
        with mode:
            samples = tuple(torch.ones(spec.sample_shape(), dtype=spec.dtype) for spec in task.inputs)
        with mode, torch.no_grad():
            stack = attention.watch(task, samples)
        return trace(task, samples, stack, [0] * len(stack), real)


@pytest.mark.parametrize(
    ("attention", "operator"), [(CacheAttention(), "CacheAttention"), (FusedAttention(), "Attention")]
)
def test_blocks_are_marked_and_those_left_out_are_stood_in_for(attention: Attention, operator: str) -> None:
    graph = traced(attention, frozenset({0, 2})).model.graph
    tags = [node.attributes["tag"].as_string() for node in graph if node.op_type == "Mark"]
    assert {tag.split(".")[1] for tag in tags} == {"0", "2"}
    assert {"in.0.0", "out.0.0", "in.2.0", "out.2.0"} <= set(tags)
    assert sum(node.op_type == operator for node in graph) == 2
    assert [str(d) for d in graph.inputs[0].shape or ()] == ["batch", "length"]
    assert attention.implementation not in AttentionInterface._global_mapping, "transformers is as it was"


def test_weights_have_shapes_but_no_data() -> None:
    model = skeleton.build(skeleton.config_of(LLAMA), "text-generation", torch.float16, "eager")
    assert all(parameter.is_meta for parameter in model.parameters())
    skeleton.fake_weights(model, skeleton.fake_mode(), ())
    assert all(isinstance(parameter.data, FakeTensor) for parameter in model.parameters())
    assert type(dict(model.named_buffers())["model.rotary_emb.inv_freq"]) is torch.Tensor


def test_parameters_have_the_dtype_that_transformers_loads_them_in() -> None:
    """DeBERTa's code makes some of its biases in float32."""
    config = skeleton.config_of({"model_type": "deberta", "hidden_size": 8, "num_attention_heads": 2,
                                 "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 19})  # fmt: skip
    model = skeleton.build(config, "feature-extraction", torch.bfloat16, "eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_tied_weights_stay_tied() -> None:
    model = skeleton.build(
        skeleton.config_of({**LLAMA, "tie_word_embeddings": True}), "text-generation", torch.float32, "eager"
    )
    skeleton.fake_weights(model, skeleton.fake_mode(), ())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_a_task_is_read_from_the_class_that_the_checkpoint_names() -> None:
    assert tasks.task_of(skeleton.config_of(LLAMA), None) == "text-generation"
    assert tasks.task_of(skeleton.config_of({"model_type": "bert"}), None) == "feature-extraction"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]; it must be one name"),
        ({"architectures": "LlamaForCausalLM"}, r"architectures is 'LlamaForCausalLM'; it must be a list of names"),
        ({"architectures": [1]}, r"architectures is \[1\]; it must be a list of names"),
        ({"num_attention_heads": 0}, r"not valid: integer .*modulo by zero \(ZeroDivisionError\)"),
        ({"hidden_act": "swish9"}, "model_type 'llama' is not valid: transformers has no 'swish9'"),
        (
            {"rope_scaling": {"type": "su9", "factor": 2.0}},
            "model_type 'llama' is not valid: transformers has no 'su9'",
        ),
        ({"intermediate_size": -3}, "model_type 'llama' is not valid: .*negative"),
        ({"model_type": None}, 'has no model_type, so its architecture is unknown; add "model_type": "llama"'),
        (
            {"model_type": None, "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30"},
            "config.json is of UNet2DConditionModel, a part of a diffusers pipeline, which is not read",
        ),
        (
            {"model_type": None, "architecture": "resnet50", "pretrained_cfg": {}},
            "config.json is of timm's resnet50, which is not read",
        ),
    ],
)
def test_a_config_that_makes_no_model_is_refused_with_the_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        skeleton.build(skeleton.config_of({**LLAMA, **changes}), "text-generation", torch.bfloat16, "eager")


@pytest.mark.parametrize("dtype", ["auto", "int8", "bfloat16"])
def test_the_dtype_that_the_config_states_is_not_followed(dtype: str) -> None:
    config = skeleton.config_of({**LLAMA, "torch_dtype": dtype})
    model = skeleton.build(config, "text-generation", torch.float16, "eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


@pytest.mark.parametrize(("types", "names"), [(2, 3), (1, 2), (0, 2)])
def test_token_types_are_an_input_where_there_are_several(types: int, names: int) -> None:
    """RoBERTa has one type: an input for it could only be zero."""
    config = skeleton.config_of({**LLAMA, "model_type": "roberta", "type_vocab_size": types})
    model = skeleton.build(config, "fill-mask", torch.bfloat16, "eager")
    expected = ("input_ids", "attention_mask", "token_type_ids")[:names]
    assert tuple(one.name for one in skeleton.inputs_of(model, torch.bfloat16)) == expected


def test_rows_end_at_the_positions_of_mpt() -> None:
    config = skeleton.config_of({"model_type": "mpt", "d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 9,
                                 "max_seq_len": 24})  # fmt: skip
    assert skeleton.max_positions(skeleton.build(config, "text-generation", torch.bfloat16, "eager")) == 24


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ExportError, match=r"task 'poetry' is not known; known: text-generation, "):
        skeleton.build(skeleton.config_of(LLAMA), "poetry", torch.float32, "eager")


def test_only_the_lookup_of_the_attention_is_a_refusal() -> None:
    with pytest.raises(RefusedError, match="it computes attention itself"), skeleton.no_such_attention("fast"):
        {}["fast"]
    with pytest.raises(KeyError, match="other"), skeleton.no_such_attention("fast"):
        {}["other"]


def test_the_first_and_the_last_block_of_each_kind_are_traced() -> None:
    assert representatives([0, 0, 2, 0, 2, 0]) == {0, 2, 4, 5}
