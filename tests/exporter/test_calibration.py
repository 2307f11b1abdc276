"""Rounding a whole model by GPTQ: each matrix on the inputs that the rounded ones before it make; what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from llamas import TIED
from stageline.exporter import calibration
from stageline.exporter.calibration import Calibrated, first_tokens, round_all
from stageline.exporter.export import export
from stageline.exporter.quantise.choice import Quantisation, schemes
from stageline.exporter.quantise.gptq import gptq, hessian_of
from stageline.exporter.quantise.nearest import Scheme
from stageline.exporter.skeleton import config_of
from stageline.exporter.synthesize import synthesize
from stageline.exporter.trace_model import Wanted
from stageline.exporter.verify.against_torch import verify
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import ExportError

BY_GPTQ = Quantisation("int4", 64, "gptq")


def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{k: v for k, v in TIED.items() if k not in ("model_type", "architectures")})
    return transformers.LlamaForCausalLM(config).eval()


def test_every_matrix_is_rounded_on_the_inputs_that_it_then_has() -> None:
    model, before = llama(), llama().state_dict()  # alike: of one seed
    names = {name: name for name, _ in model.named_parameters()}
    ways = schemes(model, names, BY_GPTQ)
    rows = torch.from_numpy(np.random.default_rng(0).integers(3, 300, (8, 64)))
    made = round_all(model, rows, ways, names, lambda step: None)
    assert {name: Scheme(one.bits, one.group) for name, one in made.items()} == ways
    # what the rounded model feeds a matrix is what the matrix was fed when it was rounded
    fed: dict[str, torch.Tensor] = {}
    for path, module in model.model.named_modules(prefix="model"):
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs, name=f"{path}.weight": fed.update({name: inputs[0]}))
    with torch.no_grad():
        model.model(rows)
    assert len(fed) == 2 * 7 == len(ways) - 1
    for name, inputs in fed.items():
        one = made[name]
        assert isinstance(one, Calibrated)
        wanted = gptq(before[name].numpy(), hessian_of(inputs), ways[name])
        np.testing.assert_array_equal(one.made.packed, wanted.packed)
    assert not isinstance(made["model.embed_tokens.weight"], Calibrated)


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", r"^model.layers.1.mlp.up_proj.weight holds values that are infinite"),
        ("model.layers.0.input_layernorm.weight", r"multiplies by model.layers.0.self_attn.q_proj.weight is infinite"),
    ],
)
def test_numbers_that_are_not_finite_are_refused(damaged: str, message: str) -> None:
    model = llama()
    model.state_dict()[damaged].view(-1)[5] = torch.inf
    names = {name: name for name, _ in model.named_parameters()}
    with pytest.raises(ExportError, match=message):
        round_all(model, torch.arange(8).reshape(1, 8), schemes(model, names, BY_GPTQ), names, lambda step: None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tied"
    synthesize({**TIED, "bos_token_id": 1, "eos_token_id": 2}, folder, seed=1, dtype="bfloat16")
    return folder


def test_a_model_is_rounded_on_what_it_draws_and_exported(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "TOKENS", 512)
    bundle = export(checkpoint, tmp_path / "bundle", quantise=BY_GPTQ)
    assert "matrices were rounded by GPTQ on 512 tokens of text that the model drew" in bundle.manifest.notes
    assert "largest difference to transformers" in (bundle.manifest.checked or "")
    assert verify(bundle.path, checkpoint, seed=0).passed


def test_texts_need_a_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot read texts \(.*tokenizer.*\); leave out --calibrate"):
        export(checkpoint, tmp_path / "bundle", quantise=Quantisation("int4", 64, "gptq", ("a text",)))
    assert not (tmp_path / "bundle").exists()


def test_texts_are_read_whole_by_the_tokenizer_of_the_checkpoint(tiny_checkpoint: Path) -> None:
    texts = ("a cat sat " * 200, "dog", "a cat " * 9000)
    source = Checkpoint.open(tiny_checkpoint)
    way = Quantisation("int4", 64, "gptq", texts)
    wanted = Wanted(source, config_of(source.config), "text-classification", "float32", None, 1, print, quantise=way)
    tokens = first_tokens(wanted)
    read = transformers.AutoTokenizer.from_pretrained(tiny_checkpoint)
    every = [token for text in texts for token in read(text, truncation=False).input_ids]
    assert len(every) > len(tokens) == calibration.TOKENS
    assert tokens == every[: calibration.TOKENS]
    assert not wanted.notes


def test_a_model_that_draws_no_text_needs_texts(tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    synthesize({**TIED, "architectures": ["LlamaModel"]}, folder, seed=1, dtype="bfloat16")
    with pytest.raises(ExportError, match=r"draws no text that GPTQ could calibrate with; give texts with --calibrate"):
        export(folder, tmp_path / "bundle", quantise=BY_GPTQ)
