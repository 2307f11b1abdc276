"""The bundle's tokenizer: one tokenizer.json that gives the tokens that transformers gives for the checkpoint's files.

tokenizer.json is one of several files that say how a checkpoint reads text: tokenizer_config.json, added_tokens.json
and special_tokens_map.json change what it says, and older checkpoints have a vocabulary or a sentencepiece model in its
place. So transformers makes the tokenizer, and the bundle keeps what it made if that gives the same tokens on its own.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from stageline.exporter.gguf.tokenizer import save_tokenizer
from stageline.exporter.trace_model import Wanted
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import CheckpointError
from stageline.models.json_file import read_json_object
from stageline.models.tokenizer import TextEncoder
from stageline.runtime.bundle.folder import file_entry
from stageline.runtime.bundle.manifest import FileEntry, TextSettings
from tokenizers import Tokenizer, normalizers
from transformers.convert_slow_tokenizer import convert_slow_tokenizer

_NAMES_A_LIMIT = 1_000_000  # tokenizers without a limit state a huge one
_FILE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_VOCABULARIES = (_FILE, "vocab*", "*.model", "*.tiktoken", "tekken.json")
_TEXTS = (
    "Hello world",
    "",
    " ",
    "  Two  spaces, THREE   Words and\ttabs\nlines\r\n\n",
    "Ünïcödé naïve CAFÉ Straße İstanbul",
    "日本語のテキスト、中文 한국어 العربية",
    "🙂 👩\u200d👩\u200d👧 ½ ﬁ \u00a0 \u200b x\u0301",
    "don't we're I'll 3.14 12345678 1e-5 a_b/c\\d {}[]<> #@!?;:",
    "word " * 60,
)
_SHORT = 8  # tokens to which the last text is truncated
_ADDED = 32  # of the added tokens, so many are tried within a text


def write_tokenizer(
    wanted: Wanted, folder: Path, max_positions: int | None
) -> tuple[TextSettings | None, list[FileEntry]]:
    """Write the tokenizer and the small files beside it into `folder`/tokenizer, and return how text becomes tensors:
    None where the checkpoint's tokenizer cannot be had; a note says why."""
    target = folder / "tokenizer"
    target.mkdir()
    if wanted.checkpoint.kind == "gguf":
        save_tokenizer(wanted.checkpoint, target)
    for file in wanted.checkpoint.auxiliary:
        shutil.copyfile(file, target / file.name)
    try:
        sides = _write(wanted, target) if wanted.checkpoint.kind == "safetensors" else _stated(target)
    except CheckpointError as error:
        wanted.notes.append(f"the bundle takes token ids only, no text: {error}")
        (target / _FILE).unlink(missing_ok=True)
        sides = None
    settings = None if sides is None else _settings(wanted, max_positions, sides)
    return settings, [file_entry(folder, f"tokenizer/{file.name}") for file in sorted(target.iterdir())]


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer as transformers makes it; None if the checkpoint has none.

    CheckpointError if transformers cannot make it.
    """
    stated = checkpoint.path / _SETTINGS
    files = [file for pattern in _VOCABULARIES for file in checkpoint.path.glob(pattern)]
    if not files and not (stated.is_file() and "tokenizer_class" in read_json_object(stated)):
        return None
    with _quiet():
        try:
            made = transformers.AutoTokenizer.from_pretrained(
                checkpoint.path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # each class of tokenizer raises its own
            raise CheckpointError(
                f"transformers cannot read its tokenizer ({' '.join(str(error).split())[:200]})"
            ) from error
    if not files and made.vocab_files_names:
        raise CheckpointError(f"its tokenizer lacks {' and '.join(made.vocab_files_names.values())}")
    return made


def lowered(normalizer: Any) -> Any:
    """The normalizer of the tokenizers library that lowers a text before this one, unless this one does: what
    sentence-transformers makes of `do_lower_case`."""
    each: list[Any] = [] if normalizer is None else [normalizer]
    if isinstance(normalizer, normalizers.Sequence):
        each = [*normalizer]  # type: ignore[misc]  # the library's stubs do not know that it can be iterated
    if any(isinstance(one, normalizers.Lowercase) for one in each):
        return normalizer
    return normalizers.Sequence([normalizers.Lowercase(), *each])


def _write(wanted: Wanted, target: Path) -> dict[str, Any] | None:
    """Write the tokenizer that transformers makes. Returns the part of the settings that it states, None if there is no
    tokenizer. CheckpointError if it has no form that the tokenizers library can run alone."""
    tokenizer = load_tokenizer(wanted.checkpoint)
    if tokenizer is None:
        if getattr(wanted.config, "vocab_size", None) is not None:  # it reads tokens
            wanted.notes.append("the bundle takes token ids only, no text: the checkpoint has no tokenizer")
        return None
    with _quiet():
        try:
            backend = tokenizer.backend_tokenizer if tokenizer.is_fast else convert_slow_tokenizer(tokenizer)
        except Exception as error:  # each converter raises its own
            raise CheckpointError(
                f"its {type(tokenizer).__name__} has no form that the tokenizers library runs "
                f"({' '.join(str(error).split())[:200]})"
            ) from error
        if tokenizer.is_fast and (target / _FILE).is_file() and (text := _difference(tokenizer, target / _FILE)):
            wanted.notes.append(
                f"the bundle's tokenizer is what transformers makes of all files of the checkpoint: tokenizer.json "
                f"alone reads {text!r} otherwise"
            )
        reader = wanted.pooling or wanted.cross_encoder
        if reader is not None and reader.lower_case:
            backend.normalizer = lowered(backend.normalizer)
        backend.save(str(target / _FILE))
        if text := _difference(tokenizer, target / _FILE):
            raise CheckpointError(
                f"its {type(tokenizer).__name__} computes in Python what the tokenizers library does not ({text!r} "
                "becomes other tokens)"
            )
    _note_tokens_beyond(wanted, backend)
    stated = read_json_object(target / _SETTINGS) if (target / _SETTINGS).is_file() else {}
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    (target / _SETTINGS).write_text(json.dumps({**stated, **named}, indent=2, ensure_ascii=False))
    return {
        "limit": tokenizer.model_max_length,
        "truncation_side": tokenizer.truncation_side,
        "token_types": "token_type_ids" in tokenizer.model_input_names,
    }


def _stated(target: Path) -> dict[str, Any]:
    """The part of the settings that the tokenizer of a .gguf states."""
    file = target / _SETTINGS
    return {"limit": read_json_object(file).get("model_max_length") if file.is_file() else None}


def _settings(wanted: Wanted, max_positions: int | None, stated: dict[str, Any]) -> TextSettings:
    config, head = wanted.config, wanted.pooling
    reader = head or wanted.cross_encoder
    limit = stated.pop("limit")
    if reader is not None and reader.max_seq_length is not None:
        limit = reader.max_seq_length  # sentence-transformers sets the tokenizer's to it
    known = [int(n) for n in (limit, max_positions) if isinstance(n, (int, float)) and 0 < n < _NAMES_A_LIMIT]
    text = config.get_text_config()  # a multimodal config may state them here, there, or in both
    end, padding = (
        getattr(text, name, None) if getattr(config, name, None) is None else getattr(config, name)
        for name in ("eos_token_id", "pad_token_id")
    )
    ends = () if end is None else tuple(np.atleast_1d(end).tolist())
    pad = padding if padding is not None else (ends[0] if ends else 0)
    if head is not None:
        stated |= {"prompts": head.prompts, "default_prompt": head.default_prompt, "similarity": head.similarity}
    return TextSettings(
        tokenizer=f"tokenizer/{_FILE}",
        max_length=min(known, default=_NAMES_A_LIMIT),
        pad_id=max(0, pad),
        **stated,
    )


def _difference(tokenizer: Any, file: Path) -> str | None:
    """A text that `file`, opened as the runtime does, turns into other tokens than transformers' tokenizer; None if
    there is none among those tried, or the file cannot be opened."""
    types = "token_type_ids" in tokenizer.model_input_names
    limit, side = _NAMES_A_LIMIT, tokenizer.truncation_side
    encoder = TextEncoder.open(file, limit, 0, truncation_side=side, token_types=types)
    short = TextEncoder.open(file, _SHORT, 0, truncation_side=side, token_types=types)
    added = [f"Hello {token} world{token}" for token in list(tokenizer.get_added_vocab())[:_ADDED]]
    for text in (*_TEXTS, *added):
        if tokenizer(text).input_ids != encoder.ids(text):
            return text
    first, second = _TEXTS[0], _TEXTS[3]
    checks: list[Callable[[], bool]] = [
        lambda: _same(tokenizer(first, second), encoder.encode([first], [second])),
        lambda: _same(
            tokenizer(_TEXTS[-1], truncation=True, max_length=_SHORT), short.encode([_TEXTS[-1]], None, True)
        ),
    ]
    return None if all(check() for check in checks) else second


def _same(made: Any, arrays: dict[str, Any]) -> bool:
    return all(arrays[name][0].tolist() == made[name] for name in made if name in arrays)


def _note_tokens_beyond(wanted: Wanted, backend: Tokenizer) -> None:
    size = getattr(wanted.config, "vocab_size", None)
    beyond = sorted((number, token) for token, number in backend.get_vocab().items() if size and number >= size)
    if beyond:
        number, token = beyond[0]
        more = f", and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        wanted.notes.append(
            f"the tokenizer has tokens that the model does not: {token!r} is token {number}{more}, the model's are "
            f"below {size}; a text with one is refused"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings: what matters becomes a note."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)
