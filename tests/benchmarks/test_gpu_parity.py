"""What the proof on a GPU compares, run on CPUs: it is right about what is right, and what is not."""

import json
import shutil
from pathlib import Path

import gpu_materials
import gpu_parity
import numpy as np
import pytest
from gpu_results import Results
from stageline.runtime.bundle.folder import Bundle


@pytest.fixture
def bundle(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A decoder with the tokens of its texts, and a CPU in place of the GPU."""
    monkeypatch.setattr(gpu_parity, "GPU", "cpu")
    made = Bundle.open(shutil.copytree(tiny_llama, tmp_path / "bundle"))
    told = {"largest_logit": 1.0, "texts": gpu_materials.tokens_of(made)}
    (made.path / "tokens.json").write_text(json.dumps(told))
    return made


def test_tokens_are_equal_wrong_or_near(bundle: Bundle, tmp_path: Path) -> None:
    results = Results(tmp_path / "figures.json")
    gpu_parity.check_tokens(bundle, "onnxruntime", results)
    assert [(row["equal"], row["ties"], row["ok"]) for row in results.figures] == [(8, 0, True)] * 2
    told = json.loads((bundle.path / "tokens.json").read_text())
    (first, *_), second = told["texts"][0]["near"][3], told["texts"][1]["near"][0]
    assert first == [told["texts"][0]["tokens"][3], 0.0]
    told["texts"][0]["tokens"][3] = told["texts"][0]["near"][3][1][0]  # as if the CPU's second were its first
    told["texts"][1]["tokens"][0], told["texts"][1]["near"][0] = second[1][0], second[1:]  # and ours nowhere near
    (bundle.path / "tokens.json").write_text(json.dumps(told))
    gpu_parity.check_tokens(bundle, "onnxruntime", results)
    row = results.figures[-1]
    assert (row["equal"], row["ties"], row["wrong"], row["ok"]) == (6, 1, 1, False)


def test_steps_on_other_places_and_blocks_give_the_same_logits(bundle: Bundle) -> None:
    assert bundle.manifest.vocabulary is not None
    steps = gpu_parity.script(bundle.manifest.vocabulary, seed=3)
    got = gpu_parity.played(bundle, "onnxruntime", "cpu", steps)
    assert len(got) == len([step for step in steps if "copy" not in step])
    whole = [step["input_ids"] for step in steps if "first_slot" in step and step["first_slot"] == 3]
    ids = np.concatenate(whole, axis=1)  # the row that crosses a block, in one step
    alone = [{**steps[3], "input_ids": ids, "new_lengths": np.array([ids.shape[1]]),
              "logits_at": np.arange(ids.shape[1])[None]}]  # fmt: skip
    (want,) = gpu_parity.played(bundle, "onnxruntime", "cpu", alone)
    assert gpu_parity.error(got[6], want[:, -20:]) < 1e-4
    assert gpu_parity.error(got[6] + 0.1 * abs(want).max(), want[:, -20:]) > 1e-2
