"""Write a stage as an ONNX model of standard operators, its weights in a file beside it."""

from pathlib import Path

import onnx
import onnx_ir as ir
from stageline.runtime.engines.tensorrt.lower import Lowered

_ALIGNMENT = 4096  # of weights in their file, so that a reader can map them into memory


def write_model(lowered: Lowered, folder: Path, name: str) -> None:
    """Write `name`.onnx and `name`.weights into `folder`: the graph that TensorRT gets, with its weights in the graph's
    types.

    The weights are a file of their own and no link to the bundle's: onnx refuses hard links. One weight at a time is in
    memory. EngineError if a value is beyond the type's range.
    """
    model = ir.from_proto(onnx.ModelProto.FromString(lowered.proto))
    model.producer_name = "stageline"
    with (folder / f"{name}.weights").open("wb") as file:
        for key, weight in lowered.weights.items():
            begin = file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
            file.write(ir.tensor(weight.read(), dtype=weight.dtype).tobytes())
            model.graph.initializers[key].const_value = ir.ExternalTensor(
                f"{name}.weights", begin, file.tell() - begin, weight.dtype, shape=ir.Shape(weight.shape), name=key
            )
    (folder / f"{name}.onnx").write_bytes(ir.to_proto(model).SerializeToString())
