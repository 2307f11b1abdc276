"""The task of a checkpoint, and refusals that say what it is."""

from typing import Any

import pytest
import transformers
from stageline.exporter import tasks
from stageline.models.errors import ExportError


def _config(kind: str, *architectures: str, **values: Any) -> Any:
    return transformers.AutoConfig.for_model(kind, architectures=list(architectures) or None, **values)


@pytest.mark.parametrize(
    ("kind", "name", "task"),
    [
        ("gpt2", "GPT2LMHeadModel", "text-generation"),
        ("bert", "BertForMaskedLM", "fill-mask"),
        ("xlm", "XLMWithLMHeadModel", "fill-mask"),
        ("bert", "BertForSequenceClassification", "text-classification"),
        ("bert", "BertForPreTraining", "feature-extraction"),
        ("t5", "T5EncoderModel", "feature-extraction"),
        ("gemma3", "Gemma3ForConditionalGeneration", "text-generation"),
        ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "text-generation"),
        ("vit", "ViTForImageClassification", "image-classification"),
        ("llama", "MyOwnForCausalLM", "text-generation"),
    ],
)
def test_a_class_has_the_task_of_transformers_tables(kind: str, name: str, task: str) -> None:
    assert tasks.task_of(_config(kind, name), None) == task


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("t5", "T5ForConditionalGeneration", "t5 .* is an encoder-decoder.*its encoder alone: --task feature-extr"),
        (
            "bart",
            "BartForConditionalGeneration",
            "bart .* is an encoder-decoder.*can be exported with --task fill-mask",
        ),
        ("pegasus", "PegasusForConditionalGeneration", "pegasus .* is an encoder-decoder for text2text-generation"),
        ("clip", "CLIPModel", r"its towers can be: CLIPTextModel or CLIPVisionModel.from_pretrained\(FOLDER\)"),
        ("siglip", "SiglipModel", r"its towers can be: SiglipVisionModel.from_pretrained\(FOLDER\)"),
        ("whisper", "WhisperForConditionalGeneration", "whisper .* is an encoder-decoder for automatic-speech-recog"),
        ("bert", "BertForQuestionAnswering", "is for question-answering, which is not supported"),
        ("wav2vec2", "Wav2Vec2ForCTC", "is for automatic-speech-recognition, which is not supported"),
        ("sam", "SamModel", "is for mask-generation, which is not supported"),
    ],
)
def test_what_is_not_exported_is_refused_by_name(kind: str, name: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        tasks.task_of(_config(kind, name), None)


def test_a_task_that_the_checkpoint_cannot_have_is_refused_with_those_that_it_can() -> None:
    with pytest.raises(ExportError, match=r"bert reads texts both ways.*--task fill-mask or text-classification or"):
        tasks.class_of(_config("bert", "BertForMaskedLM"), "text-generation")
    with pytest.raises(ExportError, match=r"no model of llama for fill-mask; .*--task text-generation or"):
        tasks.class_of(_config("llama", "LlamaForCausalLM"), "fill-mask")
    with pytest.raises(ExportError, match="t5 is an encoder-decoder"):
        tasks.class_of(_config("t5"), "text-generation")
    with pytest.raises(ExportError, match=r"task 'poetry' is not known; known: text-generation"):
        tasks.class_of(_config("bert"), "poetry")


def test_a_model_of_text_alone_is_chosen_where_transformers_has_one() -> None:
    """Llama4ForConditionalGeneration cannot run on text in transformers 5.24; its text part can."""
    found = tasks.class_of(_config("llama4", "Llama4ForConditionalGeneration"), "text-generation")
    assert found is transformers.AutoModelForCausalLM


def test_the_class_is_the_saved_one_if_it_has_the_task() -> None:
    assert tasks.class_of(_config("t5", "T5EncoderModel"), "feature-extraction") is transformers.T5EncoderModel
    found = tasks.class_of(_config("gemma3", "Gemma3ForConditionalGeneration"), "text-generation")
    assert found is transformers.Gemma3ForConditionalGeneration
    encoder = tasks.class_of(_config("t5", "T5ForConditionalGeneration"), "feature-extraction")
    assert encoder is transformers.AutoModelForTextEncoding


@pytest.mark.parametrize(
    ("config", "task", "note"),
    [
        (_config("gemma3"), "text-generation", "exports the language model of gemma3"),
        (_config("bert", num_labels=1), "text-classification", "a reranker"),
        (
            _config("qwen2", "Qwen2ForCausalLM", auto_map={"AutoModelForCausalLM": "own.Qwen2"}),
            "text-generation",
            "the checkpoint's own code (auto_map) is not run: it is transformers' qwen2",
        ),
        (_config("bert"), "feature-extraction", "names no architecture"),
        (_config("bert", "BertForPreTraining"), "feature-extraction", "without its head; with --task: fill-mask"),
    ],
)
def test_what_a_user_should_know_of_the_task_is_noted(config: Any, task: str, note: str) -> None:
    (said,) = tasks.notes_of(config, task)
    assert note in said


def test_nothing_is_noted_of_a_task_that_was_meant() -> None:
    tokenizer = {"AutoTokenizer": ["own.Tokenizer", None]}
    assert tasks.notes_of(_config("llama", "LlamaForCausalLM", auto_map=tokenizer), "text-generation") == []
    assert tasks.notes_of(_config("bert", "BertModel", auto_map=[1]), "feature-extraction") == []


def test_an_image_beside_a_text_is_not_classified() -> None:
    shield = transformers.ShieldGemma2Config()
    with pytest.raises(ExportError, match="shieldgemma2 classifies an image beside a text, which is not supported yet"):
        tasks.reads_images(shield, "image-classification")
    assert tasks.reads_images(transformers.ViTConfig(), "image-classification")
    assert not tasks.reads_images(transformers.BertConfig(), "feature-extraction")
