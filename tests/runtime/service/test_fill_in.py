"""A `suffix`: the prompts that models which fill in the middle were trained with, by the texts of their cards."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from stageline.models.tokenizer import TextEncoder
from stageline.runtime.bundle.folder import Bundle, file_entry, write_manifest
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.service.app import create_app
from stageline.runtime.service.fill_in import FillIn
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

CARDS = {
    "Qwen2.5-Coder": "<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>",
    "StarCoder": "<fim_prefix>{prefix}<fim_suffix>{suffix}<fim_middle>",
    "SantaCoder": "<fim-prefix>{prefix}<fim-suffix>{suffix}<fim-middle>",
    "DeepSeek-Coder": "<｜fim▁begin｜>{prefix}<｜fim▁hole｜>{suffix}<｜fim▁end｜>",
}


def byte_level(specials: list[str], begin: str | None) -> TextEncoder:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    if begin is not None:
        tokenizer.add_special_tokens([begin])
        number = tokenizer.token_to_id(begin)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, number)])
    return TextEncoder(tokenizer, 1000, 0)


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("begin", [None, "<s>"])
def test_prompts_are_those_of_the_models_cards(card: str, begin: str | None) -> None:
    specials = [part for part in card.replace("}", "{").split("{") if part not in ("prefix", "suffix")]
    encoder = byte_level(specials, begin)
    fill_in = FillIn.of(encoder)
    assert fill_in is not None
    for prefix, suffix in (("def f(x):\n    return ", "\n\nprint(f(1))"), ("", " b"), ("a", ""), ("é🙂", "日本")):
        want = encoder.ids(card.format(prefix=prefix, suffix=suffix))
        assert fill_in.ids(prefix, suffix) == want
        assert fill_in.ids(encoder.ids(prefix, special=False), suffix) == want
    assert FillIn.of(byte_level(specials[:2], begin)) is None


def test_a_suffix_has_no_blank_that_was_not_there() -> None:
    """CodeLlama's tokenizer puts one before a text; its own code for filling in does so before the prefix alone."""
    words = ["<unk>", "▁", "▁a", "a", "b", "▁b", "☺", "▁☺", "c"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("▁", "a"), ("▁", "b"), ("▁", "☺")]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<s>", "▁<PRE>", "▁<SUF>", "▁<MID>"])
    number = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])
    fill_in = FillIn.of(TextEncoder(tokenizer, 1000, 0))
    assert fill_in is not None
    names = ["<s>", "▁<PRE>", "▁a", "▁b", "▁<SUF>", "b", "c", "▁a", "▁<MID>"]
    assert fill_in.ids("a b", "bc a") == [tokenizer.token_to_id(name) for name in names]
    assert fill_in.ids("", "") == [tokenizer.token_to_id(name) for name in names if "<" in name]


def test_a_suffix_over_http(bundles: dict[str, Path], tmp_path: Path) -> None:
    path = shutil.copytree(bundles["llama"], tmp_path / "filling")
    opened = Bundle.open(path)
    assert opened.manifest.text is not None
    name = opened.manifest.text.tokenizer
    tokens = json.loads((path / name).read_text())
    for word, token in (("dog", "<fim_prefix>"), ("ran", "<fim_suffix>"), ("mats", "<fim_middle>")):
        tokens["model"]["vocab"][token] = tokens["model"]["vocab"].pop(word)
    (path / name).write_text(json.dumps(tokens))
    files = tuple(file_entry(path, name) if entry.path == name else entry for entry in opened.manifest.files)
    write_manifest(path, opened.manifest.model_copy(update={"files": files}))
    with Pipeline.open(path) as pipeline:
        client = TestClient(create_app({"filling": pipeline}))
        assert pipeline.encoder is not None
        cat, sat, on = pipeline.encoder.ids("cat sat on", special=False)
        prompt = [*pipeline.encoder.ids(""), 7, cat, sat, 9, on, 11]
        want = pipeline.generate(prompt, max_tokens=6).result(60)
        body: dict[str, Any] = {"model": "filling", "suffix": "on", "max_tokens": 6, "temperature": 0}
        for given in ("cat sat", ["cat sat"], [cat, sat]):
            answer = client.post("/v1/completions", json={**body, "prompt": given}).json()
            assert answer["choices"][0]["text"] == want.text
            assert answer["usage"]["prompt_tokens"] == len(prompt)
