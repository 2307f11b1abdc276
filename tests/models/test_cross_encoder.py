"""What a CrossEncoder says of its scores is read from where each version of sentence-transformers writes it."""

import json
from pathlib import Path
from typing import Any

import pytest
from stageline.models import synthetic
from stageline.models.checkpoint import Checkpoint
from stageline.models.cross_encoder import CrossEncoder, cross_encoder
from stageline.models.errors import CheckpointError

SIGMOID, IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"
KIND = {"model_type": "CrossEncoder"}


def read(folder: Path, config: dict[str, Any], **files: Any) -> CrossEncoder | None:
    synthetic.write_sparse(folder, {"model_type": "bert", **config}, {"a": ("float32", (2,))})
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return cross_encoder(Checkpoint.open(folder))


def modules(*names: str) -> list[dict[str, Any]]:
    return [{"type": f"sentence_transformers.base.modules.{name}", "path": f"{place}_{name}" if place else ""}
            for place, name in enumerate(names)]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "settings", "activation"),
    [
        ({"sbert_ce_default_activation_function": IDENTITY}, None, IDENTITY),
        ({"sentence_transformers": {"activation_fn": IDENTITY, "version": "4.1.0"}}, None, IDENTITY),
        ({"sentence_transformers": {"version": "4.1.0"}}, None, None),
        ({}, {**KIND, "activation_fn": IDENTITY}, IDENTITY),
        ({"sentence_transformers": {"activation_fn": SIGMOID}}, {**KIND, "activation_fn": IDENTITY}, IDENTITY),
        ({}, {**KIND, "activation_fn": None}, None),
    ],
)
def test_each_version_states_its_activation(
    tmp_path: Path, config: dict[str, Any], settings: dict[str, Any] | None, activation: str | None
) -> None:
    files = {} if settings is None else {"config_sentence_transformers": settings}
    found = read(tmp_path / "c", config, **files)
    assert found == CrossEncoder(activation)


def test_other_checkpoints_are_none(tmp_path: Path) -> None:
    assert read(tmp_path / "plain", {}) is None
    assert read(tmp_path / "sentences", {}, config_sentence_transformers={"model_type": "SentenceTransformer"}) is None


def test_what_it_says_of_its_texts_is_read(tmp_path: Path) -> None:
    bert = {"max_seq_length": 40, "do_lower_case": True, "transformer_task": "sequence-classification",
            "module_output_name": "scores", "modality_config": {"text": {"method": "forward"}}}  # fmt: skip
    found = read(tmp_path / "c", {}, config_sentence_transformers=KIND, sentence_bert_config=bert,
                 modules=modules("Transformer", "Dropout"))  # fmt: skip
    assert found == CrossEncoder(None, 40, True)


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"modules": modules("Transformer", "LogitScore")}, "chains Transformer, LogitScore of a CrossEncoder"),
        ({"modules": modules("Transformer", "Dense")}, "chains Transformer, Dense"),
        ({"config_sentence_transformers": {**KIND, "prompts": {"q": "Query: "}, "default_prompt_name": "q"}},
         "puts the prompt 'q' before each text"),
        ({"sentence_bert_config": {"transformer_task": "text-generation"}}, "transformer_task 'text-generation'"),
    ],
)  # fmt: skip
def test_what_would_change_its_scores_is_refused(tmp_path: Path, files: dict[str, Any], line: str) -> None:
    with pytest.raises(CheckpointError, match=line):
        read(tmp_path / "c", {}, **{"config_sentence_transformers": KIND, **files})


def test_prompts_that_are_not_the_default_are_no_matter(tmp_path: Path) -> None:
    stated = {**KIND, "prompts": {"q": "Query: ", "none": ""}, "default_prompt_name": "none"}
    assert read(tmp_path / "c", {}, config_sentence_transformers=stated) == CrossEncoder(None)
