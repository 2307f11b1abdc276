"""Texts of a structure: whatever the logits are, what is drawn is what an independent checker accepts."""

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import formats
import jsonschema
import numpy as np
import pytest
from stageline.exporter.export import export
from stageline.models.errors import EngineError, RequestError
from stageline.models.tokenizer import TextEncoder
from stageline.runtime.generation.grammars import KEPT, Grammars
from stageline.runtime.generation.sampling import Row, sample
from stageline.runtime.generation.settings import Settings
from stageline.runtime.generation.structure import Structure
from stageline.runtime.pipeline import Pipeline

WIDTH = len(formats.VOCABULARY) + 60  # the logits of many checkpoints are wider than their tokenizer
END, OTHER_END = 1, 2
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "é", None]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CHECKED: list[tuple[Structure, Any]] = [
    (Structure.json_schema(SCHEMA), lambda text: jsonschema.validate(json.loads(text), SCHEMA) is None),
    (Structure.regex("[0-9]{2,4}(ab|é)"), lambda text: re.fullmatch("[0-9]{2,4}(ab|é)", text)),
    (Structure.choice(["red", 'a "b"\n\\', "grün"]), lambda text: text in ("red", 'a "b"\n\\', "grün")),
    (Structure.grammar('start: "(" start ")" | "x"'), lambda text: re.fullmatch(r"\(*x\)*", text) is not None),
    (Structure.grammar('root ::= "yes" | "no"'), lambda text: text in ("yes", "no")),
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    formats.tokenizer().backend_tokenizer.save(str(file))
    return TextEncoder.open(file, 256, 2)


@pytest.fixture(scope="module")
def grammars(encoder: TextEncoder) -> Grammars:
    return Grammars(encoder, WIDTH, [END, OTHER_END])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    folder = tmp_path_factory.mktemp("bytes")
    export(formats.single(folder / "checkpoint", "generator", "bfloat16").path, folder / "bundle", stages=2)
    with Pipeline.open(folder / "bundle", slots=8) as pipeline:
        yield pipeline


def row(grammars: Grammars, structure: Structure, **settings: Any) -> Row:
    matcher = grammars.matcher(structure).copy()
    return Row(Settings(**settings), WIDTH, (), [END, OTHER_END], matcher=matcher)


@pytest.mark.parametrize("number", range(len(CHECKED)))
def test_random_logits_make_texts_of_the_structure(grammars: Grammars, encoder: TextEncoder, number: int) -> None:
    structure, accepts = CHECKED[number]
    for seed in range(5):
        random = np.random.default_rng(seed)
        drawn, of = [], row(grammars, structure, temperature=1.5, seed=seed)
        while not of.complete:
            (token,) = sample(random.standard_normal((1, WIDTH)).astype(np.float32), [of])
            drawn.append(token.token_id)  # type: ignore[union-attr]
            assert len(drawn) < 2000
        assert accepts(encoder.decode(drawn)), encoder.decode(drawn)


def test_every_end_token_is_allowed_where_the_text_may_end_and_nowhere_else(grammars: Grammars) -> None:
    of = row(grammars, Structure.regex("a+"))
    logits = np.zeros((1, WIDTH), np.float32)
    a = formats.VOCABULARY.index("a")
    logits[0, [END, OTHER_END]] = 5, 6
    assert [drawn.token_id for drawn in sample(logits, [of])] == [a]  # type: ignore[union-attr]
    assert not of.complete
    assert [drawn.token_id for drawn in sample(logits, [of])] == [OTHER_END]  # type: ignore[union-attr]
    assert of.complete


def test_rows_without_a_structure_are_as_they_were_beside_those_with_one(grammars: Grammars) -> None:
    logits = np.random.default_rng(0).standard_normal((3, WIDTH)).astype(np.float32)
    rows = [Row(Settings(), WIDTH), row(grammars, Structure.regex("[0-9]")), Row(Settings(), WIDTH)]
    tokens = [drawn.token_id for drawn in sample(logits, rows)]  # type: ignore[union-attr]
    assert tokens[::2] == logits.argmax(axis=1).tolist()[::2]
    assert formats.VOCABULARY[tokens[1]] in "0123456789"
    assert rows[0].device_settings(0) is not None
    assert rows[1].device_settings(0) is None


def test_the_stages_texts_hold_at_any_batch_and_the_same_seed_gives_the_same(pipeline: Pipeline) -> None:
    asked = {"structure": Structure.json_schema(SCHEMA), "temperature": 1.5, "max_tokens": 220}
    alone = pipeline.generate("x", seed=3, **asked).result(60)
    free = [pipeline.generate("x", temperature=1.0, seed=seed, max_tokens=40) for seed in range(3)]
    several = [pipeline.generate("x", seed=seed, **asked) for seed in range(4)]
    logged = pipeline.generate("x", n=2, seed=20, logprobs=1, presence_penalty=1.0, **asked).result(60)
    results = [one.result(60) for one in several]
    assert results[3].choices[0].token_ids == alone.choices[0].token_ids
    assert all(one.result(60).completion_tokens for one in free)
    whole = [choice for one in (*results, logged) for choice in one.choices if choice.finish_reason == "stop"]
    assert whole
    for choice in whole:
        jsonschema.validate(json.loads(choice.text), SCHEMA)
    assert all(len(choice.logprobs) == len(choice.token_ids) for choice in logged.choices)


def test_a_whole_text_ends_without_an_end_token(pipeline: Pipeline) -> None:
    (choice,) = pipeline.generate("x", structure=Structure.choice(["yes"]), min_tokens=9).result(60).choices
    assert (choice.text, choice.finish_reason, len(choice.token_ids)) == ("yes", "stop", 3)


def test_a_stop_ends_a_text_before_its_structure_does(pipeline: Pipeline) -> None:
    (choice,) = pipeline.generate("x", structure=Structure.choice(["one, two"]), stop=",").result(60).choices
    assert (choice.text, choice.finish_reason) == ("one", "stop")


def test_a_changeover_keeps_a_texts_place(pipeline: Pipeline) -> None:
    structure = Structure.regex("(abc|xyz){40}")
    running = pipeline.generate("x", structure=structure, temperature=1.5, seed=1)
    next(iter(deltas := iter(running)))
    pipeline.recut(stages=3)
    list(deltas)
    assert re.fullmatch("(abc|xyz){40}", running.result(60).text)


HOSTILE: list[tuple[str, Structure]] = [
    ("a cycle of references", Structure.json_schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})),
    ("nested repeats", Structure.json_schema({"type": "string", "pattern": "((a{1,99}){1,99}){1,99}"})),
    ("a long count", Structure.regex("(x{1000}){1000}")),
    ("many properties", Structure.json_schema({"properties": {f"p{n}": {"type": "integer"} for n in range(900)}})),
    ("many texts", Structure.choice([f"text {n}" for n in range(1000)])),
    ("a long enum", Structure.json_schema({"enum": [f"value {n}" for n in range(15_000)]})),
    ("a product of alternatives", Structure.json_schema(
        {"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {"const": j}}} for j in range(8)]} for i in range(8)]}
    )),
    ("deep", Structure.json_schema('{"items":' * 400 + "{}" + "}" * 400)),
    ("impossible", Structure.json_schema({"type": "string", "minLength": 5, "maxLength": 2})),
    ("no type", Structure.json_schema({"type": "nonsense"})),
    ("elsewhere", Structure.json_schema({"$ref": "http://example.com/schema"})),
    ("open", Structure.regex("[0-9")),
    ("looks back", Structure.regex(r"(?<=a)b")),
    ("endless", Structure.grammar("start: start")),
    ("nothing", Structure.grammar("foo")),
]  # fmt: skip


@pytest.mark.parametrize("name", [name for name, _ in HOSTILE])
def test_a_hostile_structure_is_refused_or_followed_in_bounded_time(grammars: Grammars, name: str) -> None:
    began = time.perf_counter()
    said = ""
    try:
        of = row(grammars, dict(HOSTILE)[name])
        for seed in range(20):
            if not of.complete:
                (drawn,) = sample(np.random.default_rng(seed).standard_normal((1, WIDTH)).astype(np.float32), [of])
                said = str(drawn) if isinstance(drawn, EngineError) else said
    except RequestError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 500
    assert time.perf_counter() - began < 5


def test_compiled_structures_are_kept_up_to_a_number(grammars: Grammars) -> None:
    first = Structure.regex("first")
    compiled = grammars.matcher(first)
    assert grammars.matcher(first) is compiled
    for number in range(KEPT):
        grammars.matcher(Structure.regex(f"x{number}"))
    assert grammars.matcher(first) is not compiled


def test_threads_share_the_compiled_structures(grammars: Grammars) -> None:
    structure = Structure.regex("shared[0-9]+")
    with ThreadPoolExecutor(8) as pool:
        assert len({id(one) for one in pool.map(lambda _: grammars.matcher(structure), range(16))}) == 1


def test_what_is_kept_does_not_wait_for_what_is_being_compiled(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event loop asks for the one while a thread compiles the other."""
    kept, slow = Structure.regex("kept"), Structure.regex("slow")
    compiled = grammars.matcher(kept)
    begun, go_on = threading.Event(), threading.Event()

    def compiles(structure: Structure) -> Any:
        begun.set()
        assert go_on.wait(10)
        return compiled

    monkeypatch.setattr(grammars, "_compiled", compiles)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(grammars.matcher, slow)
        assert begun.wait(10)
        try:
            assert pool.submit(grammars.matcher, kept).result(5) is compiled
            assert not waiting.done()
        finally:
            go_on.set()


def test_a_tokenizer_of_words_follows_no_structure(word_llama: Path) -> None:
    with (
        Pipeline.open(word_llama) as pipeline,
        pytest.raises(RequestError, match="tokenizer cannot follow a structure"),
    ):
        pipeline.generate("a cat", structure=Structure.json_object())
