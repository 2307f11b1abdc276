"""The bundle's tokenizer gives the tokens that transformers gives, whichever files say how a text is read."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from stageline.exporter.skeleton import config_of
from stageline.exporter.tokenizer import write_tokenizer
from stageline.exporter.trace_model import Wanted
from stageline.models.checkpoint import Checkpoint
from stageline.models.sentence import pooling
from stageline.models.synthetic import write_random
from stageline.models.tokenizer import TextEncoder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "the cat sat on the mat, and the dog ran after the cat.",
    "Les élèves étaient là où ça coûte: naïve café, Straße, İstanbul!",
    "日本語のテキスト 中文 한국어 🙂🙃 don't we're I'll 3.14 12345",
] * 20
LETTERS = sorted({letter for text in CORPUS for letter in text if letter.strip()})
WORDPIECE = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + one for one in LETTERS), "cat", "the"]
TOOL = {"content": "<tool>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
Files = Callable[[Path], None]


def wordpiece(**stated: Any) -> Files:
    """vocab.txt of a BERT, with `stated` in tokenizer_config.json."""

    def write(folder: Path) -> None:
        (folder / "vocab.txt").write_text("\n".join(WORDPIECE))
        text = json.dumps({"tokenizer_class": "BertTokenizer", **stated})
        (folder / "tokenizer_config.json").write_text(text)

    return write


def wordpiece_json(**stated: Any) -> Files:
    """A tokenizer.json that lowers, with `stated` in tokenizer_config.json."""

    def write(folder: Path) -> None:
        wordpiece(do_lower_case=True)(folder)
        transformers.AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "vocab.txt").unlink()
        wordpiece(**stated)(folder)
        (folder / "vocab.txt").unlink()

    return write


def added_tokens(folder: Path) -> None:
    wordpiece_json(do_lower_case=True)(folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<tool>": len(WORDPIECE)}))


def byte_pairs(name: str, **stated: Any) -> Files:
    """vocab.json and merges.txt of a byte-level tokenizer."""

    def write(folder: Path) -> None:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(
            CORPUS, trainers.BpeTrainer(vocab_size=340, special_tokens=specials, initial_alphabet=alphabet)
        )
        tokenizer.model.save(str(folder))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, **stated}))

    return write


def sentencepiece(kind: str, name: str, file: str, **stated: Any) -> Files:
    """A sentencepiece model."""

    def write(folder: Path) -> None:
        import sentencepiece as spm

        made = BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=made, vocab_size=400, model_type=kind, pad_id=3,
            byte_fallback=kind == "bpe", hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        (folder / file).write_bytes(made.getvalue())
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, **stated}))

    return write


CASES: dict[str, tuple[str, Files]] = {
    "vocab.txt": ("bert", wordpiece(do_lower_case=True)),
    "vocab.txt, cased, with accents": ("bert", wordpiece(do_lower_case=False, strip_accents=False)),
    "do_lower_case beside tokenizer.json": ("bert", wordpiece_json(do_lower_case=False)),
    "strip_accents beside tokenizer.json": ("bert", wordpiece_json(strip_accents=False)),
    "added_tokens_decoder": ("bert", wordpiece_json(added_tokens_decoder={"400": {**TOOL, "special": True}})),
    "added_tokens.json": ("bert", added_tokens),
    "truncated on the left": ("bert", wordpiece_json(truncation_side="left", padding_side="left")),
    "vocab.json and merges.txt": ("gpt2", byte_pairs("GPT2Tokenizer")),
    "a space before every text": ("gpt2", byte_pairs("GPT2Tokenizer", add_prefix_space=True)),
    "no token types": ("bert", byte_pairs("RobertaTokenizer")),
    "sentencepiece, unigram": ("t5", sentencepiece("unigram", "T5Tokenizer", "spiece.model")),
    "sentencepiece, bpe": ("llama", sentencepiece("bpe", "LlamaTokenizer", "tokenizer.model")),
    "bos and eos": ("llama", sentencepiece("bpe", "LlamaTokenizer", "tokenizer.model", add_eos_token=True)),
}


def wanted(folder: Path, model_type: str, **config: Any) -> Wanted:
    """What an export of a model with the files in `folder` passes on; the model itself is not used."""
    write_random(folder / "made", {"model_type": model_type}, {"w": ("bfloat16", (1,))}, seed=0)
    (folder / "made/model.safetensors").rename(folder / "model.safetensors")
    values = {"model_type": model_type, "vocab_size": 1000, **config}
    (folder / "config.json").write_text(json.dumps(values))
    checkpoint = Checkpoint.open(folder)
    return Wanted(checkpoint, config_of(values), "", "bfloat16", pooling(checkpoint), 1, lambda step: None)


@pytest.fixture(scope="module", params=CASES, ids=str)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """transformers' tokenizer, the settings of the bundle's, and the bundle's folder."""
    model_type, write = CASES[request.param]
    folder = tmp_path_factory.mktemp("c")
    write(folder)
    bundle = tmp_path_factory.mktemp("b")
    order = wanted(folder, model_type)
    text, _ = write_tokenizer(order, bundle, None)
    assert text is not None, order.notes
    return transformers.AutoTokenizer.from_pretrained(folder), text, bundle


def opened(text: Any, bundle: Path, limit: int = 10**6) -> TextEncoder:
    return TextEncoder.open(
        bundle / text.tokenizer, limit, 0, truncation_side=text.truncation_side, token_types=text.token_types
    )


def test_any_text_has_the_tokens_that_transformers_gives(both: tuple[Any, Any, Path]) -> None:
    tokenizer, settings_, bundle = both
    encoder = opened(settings_, bundle)
    specials = tokenizer.all_special_tokens + ["<tool>", "The cat", "\t", "\n\n", " "]

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.one_of(st.text(max_size=8), st.sampled_from(specials)), max_size=6).map("".join))
    def same(text: str) -> None:
        assert encoder.ids(text) == tokenizer(text).input_ids
        assert encoder.ids(text, special=False) == tokenizer(text, add_special_tokens=False).input_ids

    same()


def test_pairs_and_long_texts_too(both: tuple[Any, Any, Path]) -> None:
    tokenizer, settings_, bundle = both
    first, second = "The cat, élève", "a dog 🙂 " * 9
    pair = tokenizer(first, second, return_token_type_ids=settings_.token_types)
    arrays = opened(settings_, bundle).encode([first], [second])
    assert arrays["input_ids"][0].tolist() == pair.input_ids
    assert arrays["token_type_ids"][0].tolist() == pair.get("token_type_ids", [0] * len(pair.input_ids))
    long = opened(settings_, bundle, 9)
    for text in ([second], None), ([first], [second]):
        want = tokenizer(text[0][0], *(text[1] or ()), truncation=True, max_length=9)
        assert long.encode(*text, truncate=True)["input_ids"][0].tolist() == want.input_ids
    assert settings_.token_types == ("token_type_ids" in tokenizer.model_input_names)


def exported(folder: Path, write: Files, model_type: str = "bert", **config: Any) -> tuple[Any, list[str]]:
    (folder / "b").mkdir()
    write(folder)
    order = wanted(folder, model_type, **config)
    return write_tokenizer(order, folder / "b", None)[0], order.notes


def test_the_note_names_a_text_that_tokenizer_json_alone_reads_otherwise(tmp_path: Path) -> None:
    _, notes = exported(tmp_path, wordpiece_json(do_lower_case=False))
    assert notes == [
        "the bundle's tokenizer is what transformers makes of all files of the checkpoint: tokenizer.json alone reads "
        "'Hello world' otherwise"
    ]


def test_tokens_that_the_model_does_not_have_are_noted(tmp_path: Path) -> None:
    text, notes = exported(tmp_path, added_tokens, vocab_size=len(WORDPIECE))
    assert text is not None
    number = len(WORDPIECE)
    assert f"'<tool>' is token {number}, the model's are below {number}; a text with one is refused" in notes[-1]


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda folder: None, "the checkpoint has no tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "transformers cannot read its tokenizer ("),
        (lambda folder: (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}'),
         "its tokenizer lacks vocab.txt"),
        (lambda folder: (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}'),
         "its ByT5Tokenizer has no form that the tokenizers library runs"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_cannot_be_had_leaves_a_bundle_of_token_ids(tmp_path: Path, write: Files, reason: str) -> None:
    text, notes = exported(tmp_path, write)
    assert text is None
    assert len(notes) == 1
    assert notes[0].startswith(f"the bundle takes token ids only, no text: {reason}")
    assert "\n" not in notes[0]
    assert not (tmp_path / "b/tokenizer/tokenizer.json").exists()


def test_the_mask_token_that_only_the_class_states_is_in_the_bundle(tmp_path: Path) -> None:
    exported(tmp_path, wordpiece())
    stated = json.loads((tmp_path / "b/tokenizer/tokenizer_config.json").read_text())
    assert stated["mask_token"] == "[MASK]"
