"""The tokenizer of a .gguf file as tokenizer.json, and the tokens that end a text.

transformers builds it from the file's vocabulary and merges. What it leaves out is added here: how text is split for
merges (`tokenizer.ggml.pre`, by `src/llama-vocab.cpp` of llama.cpp), whether whole words pass by the merges, whether a
text begins with a token, and control tokens outside the byte alphabet.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import transformers
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import CheckpointError
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer, read_gguf_metadata
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS, GGUF_TOKENIZER_TYPES

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "▁"
_ENDS = frozenset({
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
    "<EOT>", "_<EOT>", "<｜end▁of▁sentence｜>",
})  # fmt: skip
"""Control tokens that llama.cpp takes for the end of a text by their spelling."""
_LLAMA3 = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"})
_WHOLE_WORDS = _LLAMA3 | {"tekken"}  # a word that is a token stays whole, and a text begins with BOS
_GPT2 = frozenset({"gpt-2", "phi-2", "mpt", "olmo", "jais", "granite-docling"})
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
_QWEN2 = frozenset({"stablelm2", "hunyuan"})
_FALCON = frozenset({"falcon"})
_KNOWN_SPLITS = frozenset({*GGUF_PRE_TOKENIZER_SPLITS, *_GPT2, *_SINGLE_DIGITS, *_QWEN2, *_FALCON})


def save_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the tokenizer that the .gguf holds as tokenizer.json and its companions, if it can be read rightly:
    `tokenizer_notes` says why not. One beside the file takes its place.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    if checkpoint.tokenizer is not None or _why_none(checkpoint) is not None:
        return
    file, split = checkpoint.files[0], checkpoint.config.get("tokenizer.ggml.pre")
    try:
        architecture, held, settings = get_gguf_tokenizer(str(file))
        backend, _ = convert_gguf_tokenizer(architecture, held)
        if held["tokenizer_type"] == "gpt2":
            backend = _with_whole_tokens(backend, held["tokens"], held.get("token_type") or [])
            backend.model.ignore_merges = split in _WHOLE_WORDS
            if (pre_tokenizer := _split(split)) is not None:
                backend.pre_tokenizer = pre_tokenizer
        if held["tokenizer_type"] == "llama" and not architecture.startswith("gemma"):
            _spaces(backend, prefixed=bool(held.get("add_prefix_space", True)))
        settings.setdefault("add_bos_token", split in _WHOLE_WORDS)
        transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **settings).save_pretrained(folder)
    except Exception as error:
        raise CheckpointError(f"{file}: its tokenizer cannot be read ({' '.join(str(error).split())[:200]})") from error


def end_ids(checkpoint: Checkpoint) -> list[int]:
    """The tokens that end a text for llama.cpp: EOS, end of turn, end of message, and those it knows by spelling."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    stated = [int(checkpoint.config[key]) for key in keys if checkpoint.config.get(key) is not None]
    tokens, kinds = _vocabulary(checkpoint.files[0])
    named = [
        i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind == _CONTROL and token in _ENDS
    ]
    return list(dict.fromkeys([*stated, *named]))


def tokenizer_notes(checkpoint: Checkpoint) -> list[str]:
    """What a user should know of the tokenizer, each a sentence without its full stop."""
    why = _why_none(checkpoint)
    if checkpoint.tokenizer is not None:
        return [f"{checkpoint.tokenizer.name} beside the .gguf is used in place of the file's own tokenizer"]
    if why is not None:
        return [f"the bundle has no tokenizer, because {why}; give token ids, or put tokenizer.json beside the file"]
    found = []
    if checkpoint.config["tokenizer.ggml.model"] == "gpt2" and checkpoint.config.get("tokenizer.ggml.pre") is None:
        found.append("the file has no tokenizer.ggml.pre, so text is split as GPT-2's is")
    prefix = "tokenizer.chat_template."
    named = sorted(key.removeprefix(prefix) for key in checkpoint.config if key.startswith(prefix))
    if named:
        found.append(f"of the chat templates only the default is taken, not {', '.join(named)}")
    return found


def _why_none(checkpoint: Checkpoint) -> str | None:
    kind, split = (checkpoint.config.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind in (None, "none", "no_vocab"):
        return "the file holds none"
    if kind not in GGUF_TOKENIZER_TYPES:
        return f"tokenizer.ggml.model {kind!r} is not known; known: {', '.join(sorted(GGUF_TOKENIZER_TYPES))}"
    if kind == "gpt2" and split is not None and split not in _KNOWN_SPLITS:
        return f"how tokenizer.ggml.pre {split!r} splits text is not known"
    return None


def _with_whole_tokens(backend: Any, tokens: list[str], kinds: list[int]) -> Any:
    """The tokenizer with the control and user-defined tokens that are spelled with other characters than its alphabet
    of bytes (`<｜User｜>`): transformers spells them in bytes and does not find them in a text."""
    state = json.loads(backend.to_str())
    vocabulary, added = state["model"]["vocab"], {token["id"] for token in state["added_tokens"]}
    spelled = {number: token for token, number in vocabulary.items()}
    for number, (token, kind) in enumerate(zip(tokens, kinds, strict=False)):
        if kind not in (_CONTROL, _USER_DEFINED) or number in added or number not in spelled:
            continue
        del vocabulary[spelled[number]]
        vocabulary[token] = number
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        state["added_tokens"].append({"id": number, "content": token, **plain, "special": kind == _CONTROL})
    state["added_tokens"].sort(key=lambda token: token["id"])
    return Tokenizer.from_str(json.dumps(state))


def _spaces(backend: Any, prefixed: bool) -> None:
    """Make a sentencepiece tokenizer treat spaces as llama.cpp does: `prefixed` puts one before a text and after an
    added token, whatever follows. transformers puts none before a space, and asks no file whether to."""
    replaced = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replaced]) if prefixed else replaced
    backend.pre_tokenizer = None
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1)] if prefixed else steps)


def _split(name: str | None) -> Any:
    """How text is split for merges, where it is neither as GPT-2 nor as transformers has it."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _SINGLE_DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if name in _FALCON:
        threes = pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated")
        contiguous = pre_tokenizers.Punctuation(behavior="contiguous")
        return pre_tokenizers.Sequence([contiguous, gpt2, pre_tokenizers.Digits(individual_digits=False), threes])
    if name in _QWEN2:
        regex = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS["qwen2"]), behavior="isolated")
        return pre_tokenizers.Sequence([regex, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return None


@lru_cache(maxsize=1)
def _vocabulary(file: Path) -> tuple[list[str], list[int]]:
    """The tokens and their kinds; empty where the file has none."""
    metadata, _ = read_gguf_metadata(str(file), ("tokenizer.ggml.tokens",))
    tokens, kinds = (metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    return tokens if isinstance(tokens, list) else [], kinds if isinstance(kinds, list) else []
