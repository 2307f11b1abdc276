"""What a checkpoint says of generation: what the runtime follows, and a note on each thing that it does not."""

from typing import Any

import transformers
from stageline.exporter.failure import first_line
from stageline.exporter.gguf import config as gguf_config
from stageline.exporter.trace_model import Wanted
from stageline.models.errors import ExportError, RequestError
from stageline.models.json_file import read_json_object
from stageline.runtime.bundle.manifest import GenerationDefaults
from stageline.runtime.generation.request import Sampling

_FILE = "generation_config.json"
_FOLLOWED: dict[str, tuple[str, Any]] = {
    "temperature": ("temperature", 1),
    "top_k": ("top_k", 0),
    "top_p": ("top_p", 1),
    "min_p": ("min_p", 0),
    "repetition_penalty": ("repetition_penalty", 1),
    "no_repeat_ngram_size": ("no_repeat_ngram_size", 0),
    "sequence_bias": ("sequence_bias", []),
    "bad_words_ids": ("bad_words_ids", []),
    "suppress_tokens": ("suppress_tokens", []),
    "begin_suppress_tokens": ("begin_suppress_tokens", []),
    "stop_strings": ("stop", []),
    "max_new_tokens": ("max_tokens", None),
    "max_length": ("max_tokens", None),
    "min_new_tokens": ("min_tokens", 0),
    "min_length": ("min_tokens", 0),
}
"""Name in generation_config.json -> its name in Sampling, and the value that changes nothing."""
_NOT_FOLLOWED: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
    "guidance_scale": 1,
    "typical_p": 1,
    "top_h": None,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "remove_invalid_values": False,
    "token_healing": False,
    "watermarking_config": None,
    "max_time": None,
    "dola_layers": None,
    "diversity_penalty": 0,
    "constraints": None,
    "force_words_ids": None,
}
"""Names that may change what transformers' `generate` yields -> the value that changes nothing."""


def generation_defaults(wanted: Wanted) -> GenerationDefaults:
    """The defaults as transformers reads them: from generation_config.json, or from config.json where there is none.

    What is not followed is added to `wanted.notes`. ExportError for a file that transformers refuses.
    """
    source, stated = _stated(wanted)
    values: dict[str, Any] = {"end_ids": _end_ids(wanted, source, stated)}
    for name, (asked, neutral) in _FOLLOWED.items():
        value = stated.get(name)
        if value is None or value == neutral:
            continue
        try:
            sampling = Sampling.of({asked: [value] if isinstance(value, str) and asked == "stop" else value})
        except RequestError as error:
            wanted.notes.append(f"{source} sets {name}, which is not followed: {error}")
        else:
            values[name] = getattr(sampling, asked)
    for name, neutral in _NOT_FOLLOWED.items():
        value = stated.get(name)
        if value is not None and value != neutral:
            wanted.notes.append(f"{source} sets {name} to {value!r}, which is not followed")
    return GenerationDefaults(**values)


def _stated(wanted: Wanted) -> tuple[str, dict[str, Any]]:
    """The name of the file that counts, and what it sets."""
    checkpoint = wanted.checkpoint
    file = next((file for file in checkpoint.auxiliary if file.name == _FILE), None)
    try:
        if file is not None:
            config = transformers.GenerationConfig.from_dict(read_json_object(file))
        else:
            whole = gguf_config.config(checkpoint) if checkpoint.kind == "gguf" else checkpoint.config
            config = transformers.GenerationConfig.from_model_config(dict(whole))
    except (ValueError, TypeError, AttributeError) as error:
        place = file or checkpoint.path
        raise ExportError(f"{place}: transformers refuses its generation defaults ({first_line(error)})") from error
    name = _FILE if file is not None else "the metadata" if checkpoint.kind == "gguf" else "config.json"
    return name, config.to_dict()


def _end_ids(wanted: Wanted, source: str, stated: dict[str, Any]) -> tuple[int, ...]:
    """The end tokens; a note where config.json names others than the file that counts."""
    ends, elsewhere = _ids(stated.get("eos_token_id")), _ids(getattr(wanted.config, "eos_token_id", None))
    if not ends and elsewhere:
        wanted.notes.append(
            f"{source} names no end token, so none ends a text, as in transformers; config.json names "
            f"{', '.join(map(str, elsewhere))}: give it as stop_token_ids"
        )
    return ends


def _ids(value: Any) -> tuple[int, ...]:
    """Token ids of an id, a list of them, or nothing."""
    several = value if isinstance(value, list) else [value]
    return tuple(i for i in several if isinstance(i, int) and not isinstance(i, bool) and i >= 0)
