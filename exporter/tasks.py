"""Which task a checkpoint is for, and the transformers class that has it; refusals of what is not exported.

What a class is for is read from transformers' own tables of automatic classes, not from how its name ends:
GPT2LMHeadModel generates text, and so does Gemma3ForConditionalGeneration, though it also takes images.
"""

from typing import Any

import transformers
from stageline.models.errors import ExportError
from stageline.models.sentence import SentencePooling
from transformers.models.auto import modeling_auto

FEATURES, SENTENCES, GENERATION = "feature-extraction", "sentence-similarity", "text-generation"

# task (Hugging Face's name) -> the automatic class that has it
TASKS: dict[str, Any] = {
    GENERATION: transformers.AutoModelForCausalLM,
    "text-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "image-classification": transformers.AutoModelForImageClassification,
    "fill-mask": transformers.AutoModelForMaskedLM,
    FEATURES: transformers.AutoModel,
    SENTENCES: transformers.AutoModel,
}
# task -> transformers' table of the classes that have it; XLMWithLMHeadModel is in the first two
_TABLES = {
    "fill-mask": "MASKED_LM",
    GENERATION: "CAUSAL_LM",
    "text-classification": "SEQUENCE_CLASSIFICATION",
    "token-classification": "TOKEN_CLASSIFICATION",
    "image-classification": "IMAGE_CLASSIFICATION",
}
_MULTIMODAL = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
# tables of what is not exported -> what it is for
_OTHERS = {
    "SEQ_TO_SEQ_CAUSAL_LM": "text2text-generation",
    "SPEECH_SEQ_2_SEQ": "automatic-speech-recognition",
    "CTC": "automatic-speech-recognition",
    "QUESTION_ANSWERING": "question-answering",
    "MULTIPLE_CHOICE": "multiple-choice",
    "NEXT_SENTENCE_PREDICTION": "next-sentence-prediction",
    "TABLE_QUESTION_ANSWERING": "table-question-answering",
    "DOCUMENT_QUESTION_ANSWERING": "document-question-answering",
    "VISUAL_QUESTION_ANSWERING": "visual-question-answering",
    "AUDIO_CLASSIFICATION": "audio-classification",
    "AUDIO_FRAME_CLASSIFICATION": "audio-frame-classification",
    "AUDIO_XVECTOR": "speaker verification",
    "TEXT_TO_SPECTROGRAM": "text-to-speech",
    "TEXT_TO_WAVEFORM": "text-to-speech",
    "ZERO_SHOT_IMAGE_CLASSIFICATION": "zero-shot-image-classification",
    "OBJECT_DETECTION": "object-detection",
    "ZERO_SHOT_OBJECT_DETECTION": "zero-shot-object-detection",
    "SEMANTIC_SEGMENTATION": "image-segmentation",
    "INSTANCE_SEGMENTATION": "image-segmentation",
    "UNIVERSAL_SEGMENTATION": "image-segmentation",
    "IMAGE_SEGMENTATION": "image-segmentation",
    "MASK_GENERATION": "mask-generation",
    "DEPTH_ESTIMATION": "depth-estimation",
    "KEYPOINT_DETECTION": "keypoint-detection",
    "KEYPOINT_MATCHING": "keypoint-matching",
    "POSE_ESTIMATION": "pose-estimation",
    "IMAGE_TO_IMAGE": "image-to-image",
    "MASKED_IMAGE_MODELING": "masked-image-modeling",
    "VIDEO_CLASSIFICATION": "video-classification",
    "TIME_SERIES_PREDICTION": "time-series forecasting",
    "TIME_SERIES_CLASSIFICATION": "time-series classification",
    "TIME_SERIES_REGRESSION": "time-series regression",
    "RETRIEVAL": "retrieval over images",
}


def task_of(config: Any, pooling: SentencePooling | None) -> str:
    """The task that the checkpoint was saved for, from sentence-transformers' files and config.architectures.

    ExportError if it was saved for a task that is not exported.
    """
    if pooling is not None:
        return SENTENCES
    architectures = getattr(config, "architectures", None) or ()
    for name in architectures:
        if name in _classes("SEQ_TO_SEQ_CAUSAL_LM") and config.is_encoder_decoder:
            raise ExportError(_not_exported(config, name, _OTHERS["SEQ_TO_SEQ_CAUSAL_LM"]))
        if (task := _task_of_class(name)) is not None:
            return task
    for name in architectures:
        if (other := _other_task(name)) is not None:
            raise ExportError(_not_exported(config, name, other))
    return FEATURES


def notes_of(config: Any, task: str) -> list[str]:
    """What a user should know of the task that was chosen, and of the code that has it."""
    stated = getattr(config, "auto_map", None)
    own = isinstance(stated, dict) and any(name.startswith("AutoModel") for name in stated)
    code = f"the checkpoint's own code (auto_map) is not run: it is transformers' {config.model_type}"
    return [*([code] if own else []), *_of_the_task(config, task)]


def _of_the_task(config: Any, task: str) -> list[str]:
    names: list[str] = list(getattr(config, "architectures", None) or ())
    others = [other for other in possible_tasks(config) if other != task]
    instead = f"; with --task: {', '.join(others)}" if others else ""
    if task == GENERATION and is_multimodal(config):
        return [f"exports the language model of {config.model_type}; images and sound are left out"]
    if task == "text-classification" and config.num_labels == 1:
        return ["gives one score for a text or a pair: it is a reranker or a regression"]
    if task == FEATURES and not names:
        return [f"config.json names no architecture, so it gives the hidden states{instead}"]
    if task == FEATURES and all(_task_of_class(name) is None for name in names):
        return [f"gives the hidden states of {names[0]}, without its head{instead}"]
    return []


def possible_tasks(config: Any) -> list[str]:
    """The tasks for which transformers has a model of this model_type."""
    kind = config.model_type
    found = [task for task, table in _TABLES.items() if kind in _table(table)]
    if GENERATION not in found and is_multimodal(config):
        found.insert(0, GENERATION)
    if GENERATION in found and _reads_both_ways(config):
        found.remove(GENERATION)
    return [*found, FEATURES]


def class_of(config: Any, task: str) -> Any:
    """The class of the model for a task: the one that the checkpoint was saved from if it has that task (it may be half
    of what the config describes: T5EncoderModel), else transformers' choice; or an automatic class, if that makes it.

    Each has `_from_config` or `from_config`, and `from_pretrained`. ExportError for a task that the config cannot have.
    """
    if task not in TASKS:
        raise ExportError(f"task {task!r} is not known; known: {', '.join(TASKS)}")
    body = FEATURES if task == SENTENCES else task
    if task == GENERATION and _has_text_model(config):
        return TASKS[task]  # the text part alone
    for name in getattr(config, "architectures", None) or ():
        found: Any = getattr(transformers, name, None)
        if _task_of_class(name) == body and getattr(found, "config_class", None) is type(config):
            _check(config, task)
            return found
    _check(config, task)
    if task == GENERATION and config.model_type not in _table("CAUSAL_LM"):
        return transformers.AutoModelForMultimodalLM
    if body == FEATURES and config.is_encoder_decoder and config.model_type in _table("TEXT_ENCODING"):
        return transformers.AutoModelForTextEncoding
    return TASKS[task]


def reads_images(config: Any, task: str) -> bool:
    """Whether the class of the model for a task reads images and no text. ExportError if it classifies both at once."""
    if task not in ("image-classification", FEATURES):
        return False
    found = class_of(config, task)
    if mapping := getattr(found, "_model_mapping", None):  # of an automatic class
        found = mapping.get(type(config), None)
    alone = getattr(found, "main_input_name", None) == "pixel_values"
    if task == "image-classification" and not alone and is_multimodal(config):
        raise ExportError(f"{config.model_type} classifies an image beside a text, which is not supported yet")
    return alone


def is_multimodal(config: Any) -> bool:
    """Whether it is the config of a model that takes more than text and generates text."""
    kind = config.model_type
    return any(kind in _table(table) for table in _MULTIMODAL) and config.get_text_config() is not config


def _has_text_model(config: Any) -> bool:
    """Whether transformers makes a class of text alone from the config of a model that takes more (Llama 4)."""
    name = _table("CAUSAL_LM").get(config.model_type)
    text = config.sub_configs.get("text_config")
    return is_multimodal(config) and name is not None and getattr(transformers, name).config_class is text


def _check(config: Any, task: str) -> None:
    """ExportError if no model of this config can have the task."""
    kind = config.model_type
    possible = possible_tasks(config)
    choices = f"; it can be exported with --task {' or '.join(possible)}"
    if task == GENERATION and config.is_encoder_decoder:
        raise ExportError(f"{kind} is an encoder-decoder, which is not supported yet{_encoder_alone(kind)}")
    if task == GENERATION and _reads_both_ways(config):
        raise ExportError(
            f"{kind} reads texts both ways and does not generate (is_decoder is false in config.json){choices}"
        )
    if task in _TABLES and task not in possible:
        raise ExportError(f"transformers has no model of {kind} for {task}{choices}")


def _encoder_alone(kind: str) -> str:
    return "; its encoder alone: --task feature-extraction" if kind in _table("TEXT_ENCODING") else ""


def _reads_both_ways(config: Any) -> bool:
    """Whether it is of a type that generates only where its config says so (BERT)."""
    return getattr(config, "is_decoder", None) is False and config.model_type in _table("MASKED_LM")


def _not_exported(config: Any, name: str, other: str) -> str:
    kind = config.model_type
    if config.is_encoder_decoder:
        also = next((task for task, table in _TABLES.items() if name in _classes(table)), None)
        instead = _encoder_alone(kind) or (f"; it can be exported with --task {also}" if also else "")
        return f"{kind} ({name}) is an encoder-decoder for {other}, which is not supported yet{instead}"
    headless = name not in _flat(modeling_auto.MODEL_MAPPING_NAMES)
    instead = f"; without its head: --task {' or '.join(possible_tasks(config))}" if headless else _towers(config)
    return f"{name} is for {other}, which is not supported; what is: {', '.join(TASKS)}{instead}"


def _towers(config: Any) -> str:
    """How to export the parts of a model of two towers (CLIP), each of which transformers has a class for."""
    if not {"text_config", "vision_config"} <= config.sub_configs.keys():
        return ""
    kinds = [getattr(getattr(config, part, None), "model_type", None) for part in ("text_config", "vision_config")]
    found = [names for kind in kinds if isinstance(names := modeling_auto.MODEL_MAPPING_NAMES.get(str(kind)), str)]
    if not found:
        return ""
    return f"; its towers can be: {' or '.join(found)}.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"


def _task_of_class(name: str) -> str | None:
    """The task that a class of transformers has; None for none of ours."""
    for task, table in _TABLES.items():
        if name in _classes(table):
            return task
    if any(name in _classes(table) for table in _MULTIMODAL):
        return GENERATION
    if _other_task(name) is not None:
        return None
    if name in _classes("IMAGE") | _classes("TEXT_ENCODING") | set(_flat(modeling_auto.MODEL_MAPPING_NAMES)):
        return FEATURES
    if hasattr(transformers, name):
        return FEATURES if name.endswith("EncoderModel") else None
    # a class of one's own, with its base in transformers: named as transformers names its own
    endings = {"ForCausalLM": GENERATION, "LMHeadModel": GENERATION, "ForMaskedLM": "fill-mask",
               "ForSequenceClassification": "text-classification", "ForTokenClassification": "token-classification",
               "ForImageClassification": "image-classification", "Model": FEATURES}  # fmt: skip
    return next((task for ending, task in endings.items() if name.endswith(ending)), None)


def _other_task(name: str) -> str | None:
    return next((other for table, other in _OTHERS.items() if name in _classes(table)), None)


def _table(name: str) -> dict[str, Any]:
    """transformers' table of this name: model_type -> class or classes."""
    return dict(getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES"))


def _classes(table: str) -> set[str]:
    return set(_flat(_table(table)))


def _flat(table: Any) -> list[str]:
    return [name for names in table.values() for name in ([names] if isinstance(names, str) else names)]
