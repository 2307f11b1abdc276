"""An export runs what it made: each kind of fault ends it with a line that says where, and leaves nothing behind."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.torch import load_file, save_file
from stageline.exporter import skeleton
from stageline.exporter.export import export
from stageline.exporter.synthesize import synthesize
from stageline.exporter.trace_model import Wanted
from stageline.exporter.verify import at_export
from stageline.exporter.verify.one_block import run_one_block
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import ExportError
from stageline.runtime.bundle.folder import Bundle, file_entry, write_manifest
from stageline.runtime.engines.onnxruntime import OnnxRuntimeEngine

BERT: dict[str, Any] = {
    "model_type": "bert", "architectures": ["BertModel"], "hidden_size": 32, "num_attention_heads": 4,
    "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 30, "max_position_embeddings": 48,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    **BERT, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
Made = tuple[Path, Path]
Change = Callable[[ir.Graph, ir.Value], ir.Value]


def once(made_once: Callable[..., Path], config: dict[str, Any]) -> Made:
    """A checkpoint in bfloat16 and its bundle; do not change them."""
    name = f"checked-{config['model_type']}"
    source = made_once(f"{name}-from", lambda folder: synthesize(config, folder, seed=2, dtype="bfloat16"))
    return source, made_once(name, lambda folder: export(source, folder))


@pytest.fixture(scope="module")
def bert(made_once: Callable[..., Path]) -> Made:
    return once(made_once, BERT)


@pytest.fixture(scope="module")
def llama(made_once: Callable[..., Path]) -> Made:
    return once(made_once, LLAMA)


def run(source: Path, bundle: Path) -> str:
    checkpoint = Checkpoint.open(source)
    manifest = Bundle.open(bundle).manifest
    config = skeleton.config_of(checkpoint.config)
    wanted = Wanted(checkpoint, config, manifest.task, manifest.dtype, None, 1, lambda step: None)
    return at_export.run_at_export(Bundle.open(bundle), wanted)


def changed(made: Made, folder: Path, change: Change) -> Path:
    """A copy of the bundle whose only stage has another output."""
    bundle = Bundle.open(shutil.copytree(made[1], folder))
    (stage,) = bundle.manifest.stages
    model = ir.load(folder / stage.file)
    (output,) = model.graph.outputs
    name, kind, shape = str(output.name), output.type, output.shape
    output.name = "before"
    new = change(model.graph, output)
    new.name, new.type, new.shape = name, kind, shape
    model.graph.outputs[0] = new
    ir.save(model, folder / stage.file)
    files = [file_entry(folder, e.path) if e.path == stage.file else e for e in bundle.manifest.files]
    write_manifest(folder, bundle.manifest.model_copy(update={"files": tuple(files)}))
    return folder


def add(graph: ir.Graph, operator: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
    node = ir.node(operator, inputs, attributes)
    graph.append(node)
    node.outputs[0].type = inputs[0].type
    return node.outputs[0]


def constant(graph: ir.Graph, value: Any) -> ir.Value:
    tensor = ir.tensor(value)
    made = ir.Value(name=f"constant{len(graph.initializers)}", const_value=tensor, type=ir.TensorType(tensor.dtype),
                    shape=ir.Shape(tensor.shape))  # fmt: skip
    graph.register_initializer(made)
    return made


def times(factor: float) -> Change:
    def change(graph: ir.Graph, output: ir.Value) -> ir.Value:
        number = add(graph, "CastLike", constant(graph, np.float32(factor)), output)
        return add(graph, "Mul", output, number)

    return change


def wants_two_tokens(graph: ir.Graph, output: ir.Value) -> ir.Value:
    """What a trace leaves of a condition on the shortest length: the second token's values are read."""
    second = add(graph, "Gather", output, constant(graph, np.array([1])), axis=1)
    return add(graph, "Sub", add(graph, "Add", output, second), second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (times(1.25), "for rows of 5 and 1 tokens, last_hidden_state differs from transformers' by 2"),
        (times(float("nan")), "for rows of 5 and 1 tokens, last_hidden_state differs from transformers' by inf"),
        (wants_two_tokens, "it does not run a row of 1 token: micro-batch 1 of 1: stage 0 failed in ONNX Runtime"),
    ],
)
def test_a_planted_fault_is_found_and_its_rows_are_named(
    bert: Made, tmp_path: Path, change: Change, message: str
) -> None:
    with pytest.raises(ExportError) as refused:
        run(bert[0], changed(bert, tmp_path / "b", change))
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"{bert[0]} was exported, but the bundle is not right, and was removed: ")
    assert "report this line" in str(refused.value)


def test_without_a_reference_values_must_be_finite(bert: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_export, "COMPARED_BYTES", 1000)
    said = run(bert[0], changed(bert, tmp_path / "b", times(1.25)))
    assert said.startswith("ran rows of 1, 5 and 48 tokens; not compared with transformers: the checkpoint has ")
    with pytest.raises(ExportError, match="last_hidden_state is not finite for rows of 5 and 1 tokens"):
        run(bert[0], changed(bert, tmp_path / "n", times(float("inf"))))


def test_a_reference_that_runs_nothing_is_said(bert: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> dict[str, Any]:
        raise IndexError("index out of range in self")

    monkeypatch.setattr(at_export, "torch_values", fails)
    reason = r"it does not run rows of 5 and 1 tokens \(index out of range in self\)"
    assert re.fullmatch(rf"ran rows of 1, 5 and 48 tokens; not compared with transformers: {reason}", run(*bert))
    with pytest.raises(ExportError, match="last_hidden_state is not finite for rows of 5 and 1 tokens"):
        run(bert[0], changed(bert, tmp_path / "n", times(float("inf"))))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_named(bert: Made, tmp_path: Path, value: float) -> None:
    """Those that an export does not change are not read before this."""
    source = Path(shutil.copytree(bert[0], tmp_path / "c"))
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if name.endswith("encoder.layer.1.output.dense.weight"))
    tensors[name][:3, 0] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError) as refused:
        run(source, changed(bert, tmp_path / "b", times(1.25)))
    said = f"the checkpoint itself holds values that are infinite or no number: 3 in {name}; download it again"
    assert said in str(refused.value)


def test_a_model_with_one_token_type_is_compared(tmp_path: Path) -> None:
    config = {
        **BERT,
        "model_type": "roberta",
        "architectures": ["RobertaModel"],
        "type_vocab_size": 1,
        "pad_token_id": 1,
    }
    synthesize(config, tmp_path / "c", seed=2, dtype="bfloat16")
    checked = str(export(tmp_path / "c", tmp_path / "b").manifest.checked)
    assert checked.startswith("ran rows of 1, 5 and 46 tokens; largest difference to transformers ")
    assert 0 < float(checked.split()[-4]) < 1e-4


def test_what_ran_is_in_the_manifest(bert: Made, llama: Made) -> None:
    said = str(Bundle.open(bert[1]).manifest.checked)
    assert said.startswith("ran rows of 1, 5 and 48 tokens; largest difference to transformers ")
    assert float(said.split()[-4]) < 1e-4
    said = str(Bundle.open(llama[1]).manifest.checked)
    assert said.startswith("ran rows of 1, 5 and 48 tokens, and 4 tokens generated after 17; largest difference to ")


def spoil_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that forgets all tokens."""
    step = OnnxRuntimeEngine.step

    def forgetful(self: OnnxRuntimeEngine, inputs: Any, *rest: Any) -> Any:
        for buffer in self._slots.values():
            buffer[:] = 0
        return step(self, inputs, *rest)

    monkeypatch.setattr(OnnxRuntimeEngine, "step", forgetful)


def test_a_decoder_of_berts_kin_is_compared_with_its_cache(tmp_path: Path) -> None:
    """It can be given types, of which a cache takes none, and its positions begin after its padding's."""
    config = {**BERT, "model_type": "roberta", "architectures": ["RobertaForCausalLM"], "is_decoder": True,
              "type_vocab_size": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    synthesize(config, tmp_path / "c", seed=2, dtype="bfloat16")
    checked = export(tmp_path / "c", tmp_path / "b").manifest.checked
    assert checked is not None
    assert "4 tokens generated after 17; largest difference to transformers" in checked


@pytest.mark.parametrize("compared", [True, False])
def test_a_wrong_step_after_a_cache_is_found(llama: Made, monkeypatch: pytest.MonkeyPatch, compared: bool) -> None:
    if not compared:
        monkeypatch.setattr(at_export, "COMPARED_BYTES", 1000)
    spoil_steps(monkeypatch)
    with pytest.raises(ExportError, match="for 4 tokens generated after 17, logits differ from t"):
        run(*llama)


def test_of_a_large_model_one_block_runs(llama: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_export, "WHOLE_BYTES", 40_000)
    assert run(*llama).startswith("ran block 1 alone, on rows of 1, 5 and 48 tokens and with a cache: the model has ")
    monkeypatch.setattr(at_export, "WHOLE_BYTES", 1000)
    assert run(*llama).startswith("not run: the smallest stage of one block has ")
    spoil_steps(monkeypatch)
    with pytest.raises(ExportError, match="block 1 gives a token after 47 in its cache another value"):
        run_one_block(Bundle.open(llama[1]), 48, 40_000)


def test_an_export_that_is_not_right_leaves_nothing_behind(
    bert: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stageline.exporter import export as module

    class WrongError(ExportError): ...

    def run_at_export(bundle: Bundle, wanted: Wanted) -> str:
        assert Bundle.open(bundle.path).manifest.checked is None  # complete, under another name
        raise WrongError

    monkeypatch.setattr(module, "run_at_export", run_at_export)
    with pytest.raises(WrongError):
        export(bert[0], tmp_path / "b")
    assert not list(tmp_path.iterdir())
