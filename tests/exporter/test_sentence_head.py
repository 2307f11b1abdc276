"""A sentence-transformers checkpoint gives the vectors that sentence-transformers gives for texts, by any module."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from stageline.exporter.commands.answers import Session, encoder_of, sentence_similarity
from stageline.exporter.export import export
from stageline.exporter.sentence_head import loaded_head
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import CheckpointError, RequestError
from stageline.runtime import Bundle, Pipeline
from stageline.runtime.generation.text_model import open_encoder

sentence_transformers = pytest.importorskip("sentence_transformers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "q", ":", "cat", "dog", "sat", "ran", "the", "##s", "##t"]
TEXTS = ["the cat sat", "THE DOGS RAN", "", "cat " * 40]


def save(folder: Path, prompts: dict[str, str], default: str | None, modules: list[Any], **pooling: Any) -> Path:
    """A tiny BERT in bfloat16 that sentence-transformers saves with these modules."""
    from sentence_transformers.sentence_transformer import modules as st

    base = folder / "base"
    base.mkdir(parents=True)
    (base / "vocab.txt").write_text("\n".join(WORDS))
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": false}')
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64, initializer_range=0.4,
    )  # fmt: skip
    transformers.BertModel(config).to(torch.bfloat16).save_pretrained(base)
    for module in modules:
        module.to(torch.bfloat16).to(torch.float32)  # values that bfloat16 has
    transformer = st.Transformer(str(base), max_seq_length=12)
    made = sentence_transformers.SentenceTransformer(
        modules=[transformer, st.Pooling(32, **pooling), *modules],
        prompts=prompts,
        default_prompt_name=default,
        similarity_fn_name="euclidean",
        truncate_dim=14,
    )
    made.save_pretrained(str(folder / "c"), create_model_card=False)
    (folder / "c/sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12, "do_lower_case": True}))
    return folder / "c"


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with every module that is exported, and its bundle."""
    from sentence_transformers.sentence_transformer import modules as st

    folder = tmp_path_factory.mktemp("s")
    steps = [st.Dense(64, 24), st.LayerNorm(24), st.Dense(24, 16, bias=False, activation_function=torch.nn.Identity()),
             st.Dense(16, 16, activation_function=torch.nn.GELU(), use_residual=True), st.Normalize()]  # fmt: skip
    source = save(folder, {"query": "q : ", "plain": ""}, "query", steps, pooling_mode=("mean", "max"))
    export(source, folder / "b", stages=2)
    return source, folder / "b"


@pytest.mark.parametrize("prompt", [None, "query", "plain"])
def test_the_vectors_of_texts_are_those_of_sentence_transformers(
    everything: tuple[Path, Path], prompt: str | None
) -> None:
    source, bundle = everything
    reference = sentence_transformers.SentenceTransformer(str(source), model_kwargs={"dtype": "float32"})
    want = reference.encode(TEXTS, prompt_name=prompt)
    with Pipeline.open(bundle) as pipeline:
        assert pipeline.encoder is not None
        names = [spec.name for spec in pipeline.signature.inputs]
        encoded = pipeline.encoder.encode(TEXTS, truncate=True, prompt=prompt)
        got = pipeline.run({name: encoded[name] for name in names}, ["sentence_embedding"])["sentence_embedding"]
    assert got.shape == want.shape == (4, 14)
    assert np.abs(got - want).max() <= 1e-5


def test_run_compares_texts_as_the_model_says(everything: tuple[Path, Path]) -> None:
    source, bundle = everything
    reference = sentence_transformers.SentenceTransformer(str(source), model_kwargs={"dtype": "float32"})
    want = reference.encode(TEXTS[:3], prompt_name="plain")
    with Pipeline.open(bundle) as pipeline:
        session = Session(bundle, pipeline.bundle.manifest, pipeline, encoder_of(pipeline.bundle), prompt="plain")
        answer = sentence_similarity(session, TEXTS[:3])
    assert answer["compared_by"] == "euclidean"
    assert np.abs(answer["similarity"] - reference.similarity(want, want).numpy()).max() <= 1e-4
    assert np.abs(answer["embeddings"] - want).max() <= 1e-5


def test_an_unknown_prompt_is_refused_with_those_that_are_known(everything: tuple[Path, Path]) -> None:
    encoder = open_encoder(Bundle.open(everything[1]))
    assert encoder is not None
    with pytest.raises(RequestError, match="prompt 'passage' is not known; known are document, plain, query"):
        encoder.encode(["cat"], prompt="passage")


def test_tensors_of_a_module_that_are_pickled_or_of_another_shape_are_refused(
    everything: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(everything[0], tmp_path / "c")
    file = copy / "2_Dense/model.safetensors"
    tensors = load_file(file)
    save_file({"linear.weight": tensors["linear.weight"]}, file)
    with pytest.raises(
        CheckpointError, match=r"holds linear.weight \[24, 64\], but its config.json makes them linear.b"
    ):
        loaded_head(Checkpoint.open(copy))
    file.rename(file.with_name("pytorch_model.bin"))
    with pytest.raises(
        CheckpointError, match=r"2_Dense has no model.safetensors, and a pickled pytorch_model.bin is n"
    ):
        loaded_head(Checkpoint.open(copy))
