"""The command line: what each command prints, and that it starts without torch."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from stageline.exporter.commands.answers import encoder_of
from stageline.exporter.commands.cli import app, main
from stageline.exporter.export import export


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def document(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    """The JSON document that a command prints with --json."""
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_export_tells_what_it_made(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tiny_checkpoint), "-o", str(tmp_path / "b"), "--layers", "1,2"]) == 0
    message = capsys.readouterr()
    assert "2 stages, 3 blocks," in message.out
    assert "stamped: 3 blocks" in message.out
    assert message.err.splitlines()[:2] == ["reading the checkpoint", "tracing"]


def test_export_as_json_is_one_document(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = document(capsys, "export", tiny_checkpoint, "-o", tmp_path / "b", "--dtype", "float16")
    assert (message["stages"], message["blocks"]) == (1, 3)
    assert message["weight_bytes"] == 2 * message["parameters"]


def test_inspect_shows_stages_and_what_crosses_the_cut(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle)]) == 0
    message = capsys.readouterr().out
    assert "0 -> 1  hidden.2" in message
    assert "at batch 8 x length 128" in message
    found = document(capsys, "inspect", bundle)
    assert [(stage["first_block"], stage["last_block"]) for stage in found["stages"]] == [(0, 1), (2, 2)]
    assert found["cuts"][0][0]["nominal_bytes"] == 8 * 128 * 32 * 2


def test_recut_changes_the_stages_in_place(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(document(capsys, "recut", bundle, "--stages", "3")["stages"]) == 3
    assert main(["recut", str(bundle), "--layers", "2,1"]) == 0
    assert "0-1" in capsys.readouterr().out


def test_verify_exits_by_its_verdict(
    bundle: Path,
    tiny_checkpoint: Path,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert document(capsys, "verify", bundle, "--against", tiny_checkpoint)["passed"] is True
    other = make_checkpoint(tmp_path / "other", initializer_range=1.0, layer_norm_eps=0.5)
    assert main(["verify", str(bundle), "--against", str(other)]) == 1
    assert "DIFFERS from torch" in capsys.readouterr().out


def test_run_classifies(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(bundle), "--text", "a cat sat", "--text", "dog"]) == 0
    assert capsys.readouterr().out.count(" %  LABEL_") == 4
    labels = document(capsys, "run", bundle, "--text", "a cat")["labels"][0]
    assert sum(label["probability"] for label in labels) == pytest.approx(1)


WORDS = ["", "", "", "", "", "a", "cat", "dog", "sat", "ran", "on", "mats"]  # by id; special tokens decode to nothing
MASK = 4


def features(model: Any, inputs: Any) -> list[str]:
    (hidden,) = model(**inputs).last_hidden_state
    return [f"  {list(hidden.shape)}  " + " ".join(f"{value:.4f}" for value in hidden[0, :5]) + " ..."]


def masks(model: Any, inputs: Any) -> list[str]:
    (chances,) = model(**inputs).logits[inputs["input_ids"] == MASK].softmax(-1)
    best = chances.sort(descending=True)
    named = zip(best.values[:5].tolist(), best.indices[:5].tolist(), strict=True)
    return ["  mask 0", *(f"  {100 * chance:5.1f} %  {WORDS[i]!r}" for chance, i in named)]


def labels(model: Any, inputs: Any) -> list[str]:
    (best,) = model(**inputs).logits.argmax(-1).tolist()
    tokens = [WORDS[i] for i in inputs["input_ids"][0].tolist()]
    return [f"  {token}  LABEL_{label}" for token, label in zip(tokens, best, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "text", "expected"),
    [("BertModel", "a cat", features), ("BertForMaskedLM", "a [MASK] sat", masks),
     ("BertForTokenClassification", "a cat", labels)],
)  # fmt: skip
def test_run_prints_what_transformers_answers(
    architecture: str,
    text: str,
    expected: Callable[[Any, Any], list[str]],
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", architectures=[architecture])
    bundle = export(checkpoint, tmp_path / "b")
    ids = torch.tensor(encoder_of(bundle).encode([text])["input_ids"])
    model = getattr(transformers, architecture).from_pretrained(checkpoint, dtype=torch.float32).eval()
    assert main(["run", str(tmp_path / "b"), "--text", text]) == 0
    with torch.no_grad():
        assert capsys.readouterr().out.splitlines() == [text, *expected(model, {"input_ids": ids})]


@pytest.mark.slow
def test_run_continues_text_greedily(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "eos_token_id": None, "bos_token_id": 2}
    checkpoint, texts = make_checkpoint(tmp_path / "c", **changes), ["a cat sat", "dog"]
    bundle = export(checkpoint, tmp_path / "b", stages=3)
    encoder = encoder_of(bundle)
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    answer = document(capsys, "run", bundle.path, "--text", texts[0], "--text", texts[1], "--new-tokens", "3")
    for number, text in enumerate(texts):
        prompt = torch.tensor([encoder.ids(text)])
        with torch.no_grad():
            best = model(prompt).logits[0, -1].softmax(-1).sort(descending=True)
            row = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=3)[0]
        assert [token["id"] for token in answer["next"][number]] == best.indices[:5].tolist()
        chances = [token["probability"] for token in answer["next"][number]]
        assert chances == pytest.approx(best.values[:5].tolist(), abs=1e-4)
        given, whole = encoder.decode(prompt[0].tolist()), encoder.decode(row.tolist())
        assert answer["continuations"][number] == whole[len(given) :]


def test_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert [entry["name"] for entry in document(capsys, "models", "list")] == ["minilm", "smollm2"]


@pytest.mark.parametrize("sparse", [False, True])
def test_a_made_up_checkpoint_exports_for_its_task(
    sparse: bool, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(tiny_checkpoint / "config.json")
    assert main(["models", "synthesize", config, "-o", str(tmp_path / "c"), *["--sparse"] * sparse]) == 0
    assert export(tmp_path / "c", tmp_path / "b").manifest.task == "text-classification"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recut", "b", "--stages", "0"], "Invalid value for '--stages': must be at least 1 (it is '0')"),
        (["recut", "b", "--stages", "two"], "'--stages': must be a whole number (it is 'two')"),
        (["bench", "b", "--repeats", "0"], "'--repeats': must be at least 1 (it is '0')"),
        (["bench", "b", "--lengths", "4", "--texts", "t"], "give one of --texts, --lengths and --workload"),
        (["bench", "b", "--timeline"], "Option '--timeline' requires an argument"),
        (["bench", "compare", "a"], "Missing argument 'B'"),
        (["models", "fetch"], "Missing argument 'NAME'"),
        (["models", "nope"], "No such command 'nope'"),
        (["recut", "b", "--layers", "2,x"], "'2,x' is not a list of numbers such as 8,7,9"),
        (["recut", "b", "--layers", "2", "--stages", "1"], "not both"),
        (["recut", "b"], "give --stages or --layers"),
        (["export", "c"], "Missing option '-o'"),
        (["export", "c", "-o", "b", "--method", "gptq"], "--method is for --quantise int8 or int4"),
        (["export", "c", "-o", "b", "--quantise", "int4", "--calibrate", "t"], "--calibrate is for --method gptq"),
        (["nope"], "'nope'"),
    ],
)
def test_usage_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    group, name = arguments[0], arguments[1] if len(arguments) > 1 else ""
    meant = {"nope": "", "bench": f"bench {'run' if name == 'b' else name} ", "models": f"models {name} "}
    command = "models " if name == "nope" else meant.get(group, f"{group} ")
    assert line.endswith(f"; see stageline {command}--help")
    assert "nput should" not in line


def test_every_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    commands = [[str(c.name)] for c in app.registered_commands]
    commands += [
        [str(group.name), str(c.name)]
        for group in app.registered_groups
        for c in group.typer_instance.registered_commands
    ]
    assert len(commands) >= 20
    for command in ([], *commands):
        assert main([*command, "--help"]) == 0
        shown = ["bench"] if command == ["bench", "run"] else command  # run is what `stageline bench BUNDLE` means
        assert f"Example: stageline {' '.join(shown)}".strip() in capsys.readouterr().out, command


def test_interrupted_is_130(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stageline.exporter.commands.bundles.Bundle.open", interrupted)
    assert main(["inspect", str(bundle)]) == 130


def test_serving_commands_never_import_torch(bundle: Path) -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(("torch", "transformers", "accelerate", "gguf", "onnxscript")))
from stageline.exporter.commands.cli import main
b = sys.argv[1]
for command in (["inspect", b], ["run", b, "--text", "a cat"], ["recut", b, "--stages", "3"], ["models", "list"]):
    assert main(command) == 0, command
assert main(["export", b, "-o", b + "2"]) == 1
"""
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == 'stageline: this command needs the exporter: pip install "stageline[export]"\n'
