"""The cost model against closed formulas and torch's own count."""

import math
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from llamas import TIED
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.engines import WeightDtype
from stageline.runtime.engines.lowering.float32 import HALVES, to_float32
from stageline.runtime.engines.lowering.nbits import to_nbits
from stageline.runtime.planning.cost import UseCost, cut_values, use_costs, values_bytes
from stageline.runtime.workload import Shape


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Bundle:
    return Bundle.open(tiny_llama)


def costs(bundle: Bundle, shape: Shape, cache_itemsize: int = 4) -> list[UseCost]:
    return use_costs(bundle.manifest, bundle.tensors, bundle.parts(), shape, cache_itemsize)


def test_bert_block_costs_what_the_formula_says(tiny_bundle: Path) -> None:
    batch, length, width, inner, heads = 3, 7, 32, 64, 4
    for block in costs(Bundle.open(tiny_bundle), Shape(batch, length))[1:-1]:
        products = 4 * width**2 + 2 * width * inner
        attention = batch * heads * length**2 * 2 * (width // heads)
        assert block.flops == 2 * products * batch * length + 2 * attention
        assert block.parameters == products + 4 * width + inner + width + 4 * width
        assert block.parameter_bytes == block.weight_read_bytes == 4 * block.parameters
        assert block.cache_token_bytes == 0


@pytest.mark.parametrize(("length", "past"), [(5, 0), (1, 9), (4, 6)])
def test_llama_block_costs_what_the_formula_says(llama: Bundle, length: int, past: int) -> None:
    batch, width, inner, heads, shared, size = 2, 64, 96, 8, 2, 8
    found = costs(llama, Shape(batch, length, past), cache_itemsize=2)
    products = width * (heads + 2 * shared) * size + heads * size * width + 3 * width * inner
    seen = sum(past + place for place in range(1, length + 1))
    for block in found[1:-1]:
        assert block.flops == 2 * products * batch * length + 2 * batch * heads * seen * 2 * size
        assert block.parameters == products + 2 * width
        assert block.cache_token_bytes == 2 * shared * size * 2
        assert block.cache_read_bytes == block.cache_token_bytes * batch * (past + length)


def test_head_costs_by_the_places_whose_logits_are_wanted(llama: Bundle) -> None:
    whole, last = costs(llama, Shape(2, 5))[-1], costs(llama, Shape(2, 5, picks=1))[-1]
    assert whole.flops == 2 * 2 * 5 * 64 * 12
    assert last.flops == whole.flops // 5


def test_embeddings_are_read_by_the_row(llama: Bundle) -> None:
    prologue = costs(llama, Shape(2, 5))[0]
    assert prologue.parameter_bytes == 12 * 64 * 4
    assert prologue.weight_read_bytes == 2 * 5 * 64 * 4


@pytest.mark.parametrize(("batch", "length"), [(1, 4), (3, 16)])
def test_agrees_with_torch_on_a_whole_bert(tiny_bundle: Path, tiny_checkpoint: Path, batch: int, length: int) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones((batch, length), dtype=torch.int64))
    counted = sum(cost.flops for cost in costs(Bundle.open(tiny_bundle), Shape(batch, length)))
    assert counted == counter.get_total_flops()


def test_parameters_are_those_of_the_checkpoint(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    total = sum(cost.parameters for cost in costs(bundle, Shape(1, 4)))
    assert total == sum(math.prod(entry.shape) for entry in bundle.tensors.values())


def test_a_cut_is_crossed_by_the_hidden_state_and_the_mask(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    hidden, mask = 2 * 5 * 32 * 2, 2 * 5  # the mask as truth values
    values = cut_values(bundle.manifest, bundle.parts())
    assert [values_bytes(crossing, Shape(2, 5)) for crossing in values] == [0, hidden + mask, hidden + mask]


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_weights_count_as_an_engine_holds_them(
    export_once: Callable[..., Path], weights: WeightDtype
) -> None:
    """A Llama whose matrices are large enough, and whose head is its table, quantised once more."""
    bundle = export_once(TIED)
    opened = Bundle.open(bundle)
    (stage,) = opened.manifest.stages
    model = ir.load(bundle / stage.file)
    ir.external_data.set_base_dir(model.graph, bundle)
    lowered = to_nbits(to_float32(model), weights).graph.initializers
    held = {name: tensor for name, value in lowered.items() if (tensor := value.const_value) is not None}
    assert any(name.endswith(".nbits.0") for name in held)
    wide = {name: 2 * tensor.nbytes if tensor.dtype in HALVES else tensor.nbytes for name, tensor in held.items()}
    found = use_costs(opened.manifest, opened.tensors, opened.parts(), Shape(1, 1), quantise=weights)
    total = sum(cost.parameter_bytes for cost in found)
    assert total == pytest.approx(sum(wide.values()), rel=0.01)  # a half-precision weight is widened
    assert found[-1].weight_read_bytes == pytest.approx(found[-1].parameter_bytes, rel=0.01)
    assert found[0].weight_read_bytes == 128 * 4
