"""Text comes in whole characters, is what all tokens decode to at once, and ends before a stop."""

import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stageline.models.checkpoint import Checkpoint
from stageline.models.tokenizer import TextEncoder
from stageline.runtime.generation.characters import ByteCharacters, DecodedCharacters, characters_of
from stageline.runtime.generation.detokenize import TextStream
from tokenizers import Tokenizer, decoders, models

MINILM = Path("models/checkpoints/minilm/tokenizer.json")
SMOLLM2 = Path("models/checkpoints/smollm2")
BYTES = 256  # the tokenizers made here begin with a token for each byte

TEXTS = [
    "Plain words, and some more.",
    "Ünïcödé: naïve café, straße, æsir, Łódź",
    "Ελληνικά, русский, українська, עברית, العربية, हिन्दी, ไทย",
    "你好，世界。日本語のテキスト。한국어 문장입니다.",
    "👍🏽 👩‍👩‍👧‍👦 🇫🇷 😀😀😀 🧑🏿‍🚀",
    "def f(x):\n    return x ** 2  # code\t\ttabs\r\n\n",
    "e\u0301 combining, \u200bzero width, \ufffd replacement \ufffd\ufffd\ufffd\ufffd\ufffd kept",
    " leading  and   trailing spaces  ",
    "don't can't it's 'quoted' , . ! ?",
]


def encoder_of(tokenizer: Tokenizer) -> TextEncoder:
    return TextEncoder(tokenizer, max_length=10_000, pad_id=0)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level BPE; as the exporter writes it into a bundle."""
    if not SMOLLM2.is_dir():
        pytest.skip("needs the reference checkpoint: stageline models fetch smollm2")
    from stageline.exporter.gguf.tokenizer import save_tokenizer

    folder = tmp_path_factory.mktemp("smollm2")
    save_tokenizer(Checkpoint.open(SMOLLM2), folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def byte_level() -> Tokenizer:
    """A token for each byte and a few longer ones that begin or end inside a character."""
    others = iter(range(256, 512))
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}  # GPT-2's table: these stand for themselves
    alphabet = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    longer = [b"\x82\xac", b"\x9f\x98", b"\xac\xf0\x9f", b"\x80\xf0\x9f\x98", b" the", b"\xe2\x82\xac", b"\x80\x80\x80"]
    names = ["".join(alphabet[byte] for byte in text) for text in [*(bytes([b]) for b in range(256)), *longer]]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def metaspace() -> Tokenizer:
    """As Llama's sentencepiece tokenizer: spaces as U+2581, unknown characters as tokens of one byte."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    names += ["<s>", "</s>", "▁", "▁▁", "▁the", "▁world", "é", "a", ".", "▁,", "\n"]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, [], byte_fallback=True))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def pieces_of(encoder: TextEncoder, tokens: Iterable[int], stop: Sequence[str] = ()) -> list[str]:
    stream = TextStream(encoder, stop)
    return [*(stream.push([token]) for token in tokens), stream.finish()]


def assert_streams_as_it_decodes(tokenizer: Tokenizer, tokens: Sequence[int]) -> None:
    pieces = pieces_of(encoder_of(tokenizer), tokens)
    assert "".join(pieces) == tokenizer.decode(tokens), tokens


@pytest.mark.checkpoints
@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_many_languages_come_whole_from_smollm2(smollm2: Tokenizer, text: str) -> None:
    tokens = smollm2.encode(text).ids
    pieces = pieces_of(encoder_of(smollm2), tokens)
    assert "".join(pieces) == text == smollm2.decode(tokens)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.checkpoints
def test_any_text_comes_whole_from_smollm2(smollm2: Tokenizer) -> None:
    @settings(deadline=None)
    @given(st.text(min_size=1))
    def check(text: str) -> None:
        assert_streams_as_it_decodes(smollm2, smollm2.encode(text).ids)

    check()


@pytest.mark.checkpoints
def test_any_tokens_of_smollm2_stream_as_they_decode(smollm2: Tokenizer) -> None:
    any_token = st.integers(0, smollm2.get_vocab_size() - 1)
    mostly_bytes = st.integers(0, 300)  # special tokens, bytes and the first merges

    @settings(deadline=None)
    @given(st.lists(any_token | mostly_bytes, max_size=60))
    def check(tokens: list[int]) -> None:
        assert_streams_as_it_decodes(smollm2, tokens)

    check()


@pytest.mark.checkpoints
@pytest.mark.skipif(not MINILM.is_file(), reason="needs the reference checkpoint: stageline models fetch minilm")
def test_wordpieces_stream_as_they_decode() -> None:
    tokenizer = Tokenizer.from_file(str(MINILM))
    for text in TEXTS:
        assert_streams_as_it_decodes(tokenizer, tokenizer.encode(text).ids)

    @settings(deadline=None)
    @given(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1) | st.sampled_from([102, 1005, 1012, 1056])))
    def check(tokens: list[int]) -> None:
        assert_streams_as_it_decodes(tokenizer, tokens)

    check()


@settings(deadline=None)
@given(st.lists(st.integers(0, 264), max_size=80))
def test_any_bytes_stream_as_they_decode(tokens: list[int]) -> None:
    assert_streams_as_it_decodes(byte_level(), tokens)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0xF0, 0x9F, 0x98, 0x80, 0xE2, 0x82, 0xAC, 0x41, *range(BYTES, BYTES + 9)]), max_size=80)
)
def test_tokens_that_begin_and_end_inside_characters_stream_as_they_decode(tokens: list[int]) -> None:
    assert_streams_as_it_decodes(byte_level(), tokens)


def assert_bytes_give_what_decoding_gives(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> None:
    """The same pieces, token by token, and at the end."""
    encoder = encoder_of(tokenizer)
    by_bytes, decoded = characters_of(encoder, prompt), DecodedCharacters(encoder, prompt)
    assert isinstance(by_bytes, ByteCharacters)
    for token in tokens:
        assert by_bytes.push(token) == decoded.push(token), tokens
    assert by_bytes.finish() == decoded.finish(), tokens
    whole = [token for token in prompt if token < tokenizer.get_vocab_size()]
    if "\ufffd" not in tokenizer.decode(whole):
        assert tokenizer.decode(whole) + "".join(pieces_of(encoder, tokens)) == tokenizer.decode([*whole, *tokens])


@settings(deadline=None)
@given(st.lists(st.integers(0, 270), max_size=20), st.lists(st.integers(0, 270), max_size=80))
def test_tokens_that_are_bytes_need_no_decoding(prompt: list[int], tokens: list[int]) -> None:
    assert_bytes_give_what_decoding_gives(byte_level(), prompt, tokens)


@pytest.mark.checkpoints
def test_tokens_of_smollm2_need_no_decoding(smollm2: Tokenizer) -> None:
    any_token = st.integers(0, smollm2.get_vocab_size() + 3)
    mostly_bytes = st.integers(0, 300)

    @settings(deadline=None)
    @given(st.lists(any_token | mostly_bytes, max_size=20), st.lists(any_token | mostly_bytes, max_size=60))
    def check(prompt: list[int], tokens: list[int]) -> None:
        assert_bytes_give_what_decoding_gives(smollm2, prompt, tokens)

    check()


@pytest.mark.checkpoints
def test_every_token_of_smollm2_alone_is_what_it_decodes_to(smollm2: Tokenizer) -> None:
    encoder = encoder_of(smollm2)
    for token in range(smollm2.get_vocab_size() + 2):
        assert "".join(pieces_of(encoder, [token])) == smollm2.decode([token]), token


def test_an_added_token_of_other_characters_stands_for_itself() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["€ uro", "\ufffd"])
    first = tokenizer.token_to_id("€ uro")
    assert pieces_of(encoder_of(tokenizer), [0x41, first, first + 1, 0x42]) == ["A", "€ uro", "", "\ufffdB", ""]
    assert_bytes_give_what_decoding_gives(tokenizer, [], [0xE2, first, first + 1, 0xE2, 0x82, first + 1, 0xAC])


def test_tokens_that_depend_on_their_neighbours_are_decoded() -> None:
    assert isinstance(characters_of(encoder_of(metaspace()), []), DecodedCharacters)
    assert isinstance(characters_of(encoder_of(Tokenizer(models.BPE({"a": 0}, []))), []), DecodedCharacters)


whole_characters = st.characters(exclude_categories=["Cs"]).map(lambda character: list(character.encode()))
words = st.integers(BYTES, BYTES + 10).map(lambda token: [token])
broken = st.tuples(st.sampled_from([[0x80] * 9, [0xF0, 0x9F], [0xFF], [0xE2, 0x82, 0x41]]), st.integers(264, 266)).map(
    lambda pair: [BYTES + 7, *pair[0], pair[1]]  # between tokens that are not bytes
)


@settings(deadline=None)
@given(st.lists(whole_characters | words | broken))
def test_sentencepiece_tokens_stream_as_they_decode(units: list[list[int]]) -> None:
    assert_streams_as_it_decodes(metaspace(), [token for unit in units for token in unit])


def test_a_character_in_bytes_that_an_unfinished_one_follows_is_kept() -> None:
    pieces = pieces_of(encoder_of(metaspace()), [BYTES + 4, *"é".encode(), 0xF0, 0x9F, BYTES + 7, *"😀".encode()])
    assert pieces == ["the", "", "é", "", "", "\ufffd\ufffda", "", "", "", "😀", ""]
    assert pieces_of(encoder_of(metaspace()), [*"é😀".encode(), 0xE2]) == ["", "é", "", "", "", "😀", "", "\ufffd"]


@settings(deadline=None)
@given(st.lists(st.integers(0, BYTES + 10), max_size=80))
def test_no_tokens_of_sentencepiece_fail_or_lose_a_word(tokens: list[int]) -> None:
    tokenizer = metaspace()
    text = "".join(pieces_of(encoder_of(tokenizer), tokens))
    assert text.count("world") == tokens.count(BYTES + 5)


def test_spaces_between_words_stay_across_special_tokens() -> None:
    the, world, end = BYTES + 4, BYTES + 5, BYTES + 1
    assert pieces_of(encoder_of(metaspace()), [the, *[end] * 50, world]) == ["the", *[""] * 50, " world", ""]


def test_tokens_beyond_the_tokenizer_have_no_text() -> None:
    """Models have rows in their vocabulary that no token was made for."""
    assert pieces_of(encoder_of(metaspace()), [BYTES + 4, 100_000, BYTES + 5]) == ["the", "", " world", ""]


def test_half_a_character_is_held_until_it_is_whole() -> None:
    assert pieces_of(encoder_of(byte_level()), [0x41, *"😀".encode(), 0x42]) == ["A", "", "", "", "😀", "B", ""]


def test_half_a_character_at_the_end_comes_as_a_replacement() -> None:
    assert pieces_of(encoder_of(byte_level()), [0x41, 0xF0, 0x9F]) == ["A", "", "", "\ufffd"]


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_bytes_that_are_no_characters_are_not_held_for_ever(make: object) -> None:
    assert callable(make)
    pieces = pieces_of(encoder_of(make()), [0x80] * 100)
    assert "".join(pieces[:-1]) == "\ufffd" * 97
    assert pieces[-1] == "\ufffd" * 3


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize("tokens", [[0x80], [0xE2], [BYTES + 1], [100_000], [0x41], [0xC3, 0xA9]])
def test_a_token_takes_as_long_after_many_as_after_few(make: object, tokens: list[int]) -> None:
    assert callable(make)
    stream = TextStream(encoder_of(make()))
    took_s = []
    for _ in range(4000):
        start = time.perf_counter()
        stream.push(tokens)
        took_s.append(time.perf_counter() - start)
    assert median(took_s[-500:]) < 3 * median(took_s[100:600])


def ends_before_stop(text: str, stops: Sequence[str]) -> str | None:
    """The text before the stop that is complete first, the longest of them; None without one."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return None


@settings(deadline=None)
@given(
    st.text("ab€", max_size=30),
    st.lists(st.text("ab€", min_size=1, max_size=5), max_size=3),
    st.lists(st.integers(0, 60), max_size=10),
)
def test_text_ends_before_the_first_stop_however_it_is_cut_into_pieces(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    stream = TextStream(encoder_of(byte_level()), stops)
    tokens = list(text.encode())
    pieces = [stream.push(tokens[start:end]) for start, end in pairwise([0, *sorted(cuts), len(tokens)])]
    expected = ends_before_stop(text, stops)
    if expected is None:
        held = max(
            (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])),
            default=0,
        )
        assert "".join(pieces) == text[: len(text) - held]  # no more is held than what may be a stop
        assert not stream.stopped
        assert "".join(pieces) + stream.finish() == text
    else:
        assert stream.stopped
        assert "".join(pieces) == expected
        assert stream.push([0x41]) + stream.finish() == ""


def test_a_stop_across_tokens_is_found_and_what_only_looked_like_one_is_given() -> None:
    pieces = pieces_of(encoder_of(byte_level()), b"one\nUse\nUser: two", ["\nUser:"])
    assert "".join(pieces) == "one\nUse"
    assert pieces[3:8] == ["", "", "", "", "\nUse"]


def test_what_was_held_for_a_stop_is_given_at_the_end() -> None:
    stream = TextStream(encoder_of(byte_level()), ["##"])
    assert [stream.push([byte]) for byte in b"a#"] == ["a", ""]
    assert stream.finish() == "#"
    assert stream.finish() == ""


def test_the_text_of_the_first_min_tokens_is_not_searched_for_stops() -> None:
    stream = TextStream(encoder_of(byte_level()), ["ab"], min_tokens=3)
    assert [stream.push([byte]) for byte in b"abab"] == ["a", "b", "a", "b"]
    assert not stream.stopped
    assert [stream.push([byte]) for byte in b"ab"] == ["", ""]
    assert stream.stopped


def test_a_long_stop_that_is_nearly_there_all_the_time_costs_little() -> None:
    stream = TextStream(encoder_of(byte_level()), ["a" * 20_000 + "b"])
    start = time.perf_counter()
    given_out = "".join(stream.push([ord("a")]) for _ in range(40_000))
    assert time.perf_counter() - start < 5
    assert given_out == "a" * 20_000


def test_special_tokens_are_spelt_where_they_are_shown() -> None:
    tokenizer = byte_level()
    end = tokenizer.token_to_id("<end>")
    tokens = [*b"a", end, 0xE2, 0x82, end, *"€".encode(), 0xE2]
    for stops in ((), ("no such text",)):
        stream = TextStream(encoder_of(tokenizer), stops, shown=[end])
        pieces = [stream.push([token]) for token in tokens]
        assert pieces == ["a", "<end>", "", "", "\ufffd<end>", "", "", "€", ""]
        assert stream.finish() == "\ufffd"
    stream = TextStream(encoder_of(tokenizer), ["<end>"], shown=[end])
    assert stream.push([*b"a", end]) == "a"
    assert stream.stopped
    assert TextStream(encoder_of(tokenizer)).push([*b"a", end]) == "a"


def test_words_keep_their_spaces_beside_a_special_token_that_is_shown() -> None:
    tokenizer = metaspace()
    mark = tokenizer.token_to_id("<s>")
    words = tokenizer.encode("ab ab", add_special_tokens=False).ids
    stream = TextStream(encoder_of(tokenizer), shown=[mark])
    tokens = [*words, mark, *words, mark]
    text = "".join(stream.push([token]) for token in tokens) + stream.finish()
    assert text == tokenizer.decode(tokens, skip_special_tokens=False)
