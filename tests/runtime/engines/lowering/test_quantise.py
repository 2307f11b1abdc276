"""Quantised weights: what they stand for, which products read them, and how far a stage is from what it was."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stageline.models.errors import EngineError
from stageline.runtime.builder.build import WantedEngine, build
from stageline.runtime.builder.emulate import EmulatedStage
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import TensorSpec
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.engines import Array, StageFile
from stageline.runtime.engines.lowering import weights as lowered_weights
from stageline.runtime.engines.lowering.quantise import Quantisation, to_quantised
from stageline.runtime.engines.lowering.weights import QuantisedWeight, Scales
from stageline.runtime.engines.tensorrt.flavour import TENSORRT_RTX
from stageline.runtime.engines.tensorrt.lower import QUANTISED, Lowered, compute_dtype, lower
from stageline.runtime.engines.tensorrt.records import Options
from stageline.runtime.workload import Workload


def on_disk(array: Array, folder: Path, name: str = "w") -> ir.ExternalTensor:
    (folder / name).write_bytes(array.tobytes())
    return ir.ExternalTensor(
        name, 0, array.nbytes, ir.DataType.FLOAT, shape=ir.Shape(array.shape), name=name, base_dir=folder
    )


def stage_file(path: Path, number: int) -> StageFile:
    bundle = Bundle.open(path)
    stage = bundle.manifest.stages[number]
    return StageFile(number, path / stage.file, path, stage.caches)


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    axis=st.sampled_from([0, 1]),
    dtype=st.sampled_from([ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN]),
    part=st.sampled_from([1, 20, 2**24]),
)
def test_a_value_is_off_by_at_most_half_a_step(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    rows: int,
    groups: int,
    axis: int,
    dtype: ir.DataType,
    part: int,
) -> None:
    """Whatever the size of the parts that are quantised at a time."""
    rng, group = np.random.default_rng(seed), 8
    array = (rng.standard_normal((rows, groups * group)) * 10 ** rng.uniform(-2, 2, (rows, 1))).astype(np.float32)
    array[rng.random(array.shape) < 0.1] = 0
    array = np.ascontiguousarray(array.T) if axis == 0 else array
    weight = QuantisedWeight(on_disk(array, tmp_path_factory.mktemp("w")), dtype, axis, group, ir.DataType.FLOAT16)
    scales = Scales(weight.tensor, ir.DataType.FLOAT16, weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowered_weights, "_PART", part)
        values = weight.read().astype(np.float64)
        assert scales.read().shape == scales.shape
    spread = np.repeat(scales.read().astype(np.float64).reshape(weight.scales().shape), group, axis)
    error = np.abs(values * spread - array)
    if dtype == ir.DataType.FLOAT8E4M3FN:
        # a mantissa of 3 bits, and 2^-9 scales at the bottom; what float16 rounds off the scale is far less
        assert (error <= np.maximum(np.abs(array) / 16 * 1.02, spread * 2**-10 * 1.02)).all()
    else:  # a scale that float16 rounded down cuts the largest value by that much more
        largest = np.abs(values).max() * spread
        assert (error <= 0.5 * spread + largest * 2**-11 + 1e-12).all()


def test_scales_are_of_output_channels_whichever_way_the_matrix_lies(tmp_path: Path) -> None:
    zeros = "{" + ", ".join(["0"] * 12) + "}"
    model = ir.from_onnx_text(f"""<ir_version: 11, opset_import: ["": 23]>
    stage (float[n, 4] x) => (float[n, 3] y)
    <float[3, 4] w = {zeros}, float[3, 4] v = {zeros}, float[4, 3] u = {zeros}> {{
        wt = Transpose <perm = [1, 0]> (w)
        a = MatMul(x, wt)
        b = Gemm <transB = 1> (x, v)
        c = MatMul(x, u)
        y = Sum(a, b, c)
    }}""")
    for name in "wvu":
        initializer = model.graph.initializers[name]
        assert initializer.const_value is not None
        shape = initializer.const_value.shape.numpy()
        initializer.const_value = on_disk(np.ones(shape, np.float32), tmp_path, name)
    weights = to_quantised(model, "int8", ir.DataType.FLOAT16)
    assert {name: weight.shape for name, weight in weights.items()} == {
        "w.int8": (3, 4), "w.int8.scales": (3,), "v.int8": (3, 4), "v.int8.scales": (3,),
        "u.int8": (4, 3), "u.int8.scales": (3,),
    }  # fmt: skip
    dequantised = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    axes = {str(node.inputs[0].name): node.attributes["axis"].as_int() for node in dequantised if node.inputs[0]}
    assert axes == {"w.int8": 0, "v.int8": 0, "u.int8": 1}


@pytest.mark.parametrize("precision", QUANTISED)
def test_every_product_of_a_stage_reads_quantised_weights_and_lookups_do_not(
    llama_bundle: Path, precision: Quantisation
) -> None:
    lowered = lower(stage_file(llama_bundle, 0), precision, 32, stripped=False)
    graph = ir.from_proto(onnx.ModelProto.FromString(lowered.proto)).graph
    products = [node for node in graph if node.op_type == "MatMul"]
    quantised = [node for node in graph if node.op_type == "DequantizeLinear"]
    if precision != "int4":  # 64 divides the columns of the last of the seven alone
        assert len(products) == len(quantised) == 7
    for node in graph:
        if node.op_type == "Gather" and node.inputs[0].is_initializer():
            assert node.inputs[0].dtype == compute_dtype(precision, "bfloat16")


@pytest.mark.parametrize(("precision", "most"), [("int8", 2e-2), ("fp8", 8e-2)])
def test_a_stage_with_quantised_weights_is_close_to_itself(
    llama_bundle: Path, precision: Quantisation, most: float
) -> None:
    file, tokens = stage_file(llama_bundle, 0), np.random.default_rng(5).integers(3, 50, (3, 12))
    given = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    inputs = Signature.of(Bundle.open(llama_bundle).manifest).check_inputs(given)[0]
    got, want = (
        EmulatedStage(lower(file, kind, 32, stripped=False), 3, 32).run(inputs) for kind in (precision, "fp32")
    )
    for name, expected in want.items():
        error = np.abs(got[name] - expected).max(axis=-1) / np.abs(expected).max(axis=-1).clip(min=1)
        assert 1e-5 < np.quantile(error, 0.9) <= most, name


@pytest.mark.slow
@pytest.mark.parametrize("precision", QUANTISED)
def test_tensorrt_builds_quantised_stages(llama_bundle: Path, precision: Quantisation, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = shutil.copytree(llama_bundle, tmp_path / "bundle")
    wanted = [WantedEngine(TENSORRT_RTX, "sm89", precision)]
    for outcome in build(Bundle.open(path), wanted, Workload(length=8, slots=2, capacity=32), Options()):
        assert outcome.error is None
        assert outcome.record is not None
        assert outcome.record.cache_dtype == "bfloat16"  # what the bundle computes in


def test_stripped_and_quantised_is_refused(llama_bundle: Path) -> None:
    wanted = [WantedEngine(TENSORRT_RTX, "sm89", "int8")]
    with pytest.raises(EngineError, match="--stripped reads weights unchanged from the bundle"):
        build(Bundle.open(llama_bundle), wanted, Workload(length=8, slots=2, capacity=32), Options(stripped=True))


@pytest.mark.parametrize("kind", QUANTISED)
def test_emulated_products_are_those_of_the_quantised_weights_and_of_nothing_else_quantised(
    kind: Quantisation, tmp_path: Path
) -> None:
    rng = np.random.default_rng(3)
    array = rng.standard_normal((256, 192)).astype(np.float32)
    zeros = ir.tensor(np.zeros((256, 192), np.float32), name="w")
    model = ir.from_onnx_text("""<ir_version: 11, opset_import: ["": 23]>
    stage (float[n, 192] x, float[256, 192] w) => (float[n, 256] y) {
        wt = Transpose <perm = [1, 0]> (w)
        y = MatMul(x, wt)
    }""")
    weight = model.graph.inputs.pop()
    weight.const_value = zeros
    model.graph.register_initializer(weight)
    weight.const_value = on_disk(array, tmp_path)
    weights = to_quantised(model, kind, ir.DataType.FLOAT16)
    spec = TensorSpec(name="y", dtype="float32", shape=("n", 256))
    lowered = Lowered(ir.to_proto(model).SerializeToString(), weights, (), (spec,), (), ir.DataType.FLOAT)
    x = rng.standard_normal((5, 192)).astype(np.float32) * 10 ** rng.uniform(-3, 3, (5, 1)).astype(np.float32)
    got = EmulatedStage(lowered, 5, 1).run({"x": x})["y"]
    values, scales = (part.read().astype(np.float64) for part in weights.values())
    want = x @ (values * np.repeat(scales.reshape(256, -1), 192 // scales.reshape(256, -1).shape[1], 1)).T
    assert (np.abs(got - want).max(axis=1) <= 1e-5 * np.abs(want).max(axis=1)).all()
