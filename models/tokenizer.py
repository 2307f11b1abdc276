"""Text to token arrays and back, with the tokenizers library alone: what serving needs of a checkpoint's tokenizer."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from stageline.models.errors import CheckpointError, RequestError
from stageline.models.token_bytes import TokenBytes, is_byte_level
from tokenizers import AddedToken, Tokenizer

_COMPOSED = {"NFC": 4}  # characters that a normalizer makes one of, at most


class TextEncoder:
    """A checkpoint's tokenizer. Make one with `TextEncoder.open`; several threads may use it."""

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        pad_id: int,
        truncation_side: Literal["right", "left"] = "right",
        token_types: bool = True,
        prompts: Mapping[str, str] | None = None,
        default_prompt: str | None = None,
    ) -> None:
        """`truncation_side`: where a text that is too long loses tokens. `token_types`: whether the second text of a
        pair has token type 1, if the tokenizer says so; else all types are 0. `prompts`: what `encode` puts before a
        text, by name; `default_prompt`: the name of the one that it takes if none is named."""
        self.max_length = max_length
        """The maximum number of tokens of a text, special ones included."""
        self.pad_id = pad_id
        self._truncation_side, self._token_types = truncation_side, token_types
        self._prompts, self._default_prompt = dict(prompts or {}), default_prompt
        # tokenizer.json states padding and truncation as its model was trained, not as it is served.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer

    @classmethod
    def open(cls, path: Path, max_length: int, pad_id: int, **settings: Any) -> "TextEncoder":
        """Read a tokenizer.json; `settings` as in the constructor.

        Raises:
            CheckpointError: the file cannot be read or is not a tokenizer.
        """
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{path} cannot be read as a tokenizer ({error}); download it again") from error
        return cls(tokenizer, max_length, pad_id, **settings)

    def encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        truncate: bool = False,
        prompt: str | None = None,
        limit: int | None = None,
    ) -> dict[str, NDArray[np.int64]]:
        """Turn texts, or each text with its pair, into arrays padded on the right to the longest of them. `prompt`: the
        name of what is put before each text; default: the default prompt, if there is one. `limit`: the most tokens
        that are kept of a text, special ones included; what comes after them is cut off.

        Returns input_ids, attention_mask and token_type_ids, each int64 [batch, length].

        Raises:
            RequestError: no texts, something that is not a text, a text without tokens, one longer than `max_length`
                while `truncate` is off, or a prompt that is not known.
        """
        inputs = _inputs(texts, pairs)
        if before := self._prompt(prompt):
            inputs = _inputs([before + text for text in texts], pairs)
        encodings = list(self._tokenizer.encode_batch(inputs))
        if limit is not None:
            encodings = [self._cut(one, text, limit) for one, text in zip(encodings, inputs, strict=True)]
        for number, encoding in enumerate(encodings):
            if len(encoding.ids) > self.max_length:
                if not truncate:
                    raise RequestError(
                        f"text {number} has {len(encoding.ids)} tokens, at most {self.max_length} fit; "
                        "shorten it, or in Python pass truncate=True"
                    )
                text = inputs[number]
                (encodings[number],) = self._truncating.encode_batch([text])  # as in `ids`
            elif not encoding.ids:
                raise RequestError(f"text {number} ({inputs[number]!r}) has no tokens; give a text with some")

        ids, mask = padded([encoding.ids for encoding in encodings], self.pad_id)
        types, _ = padded([encoding.type_ids for encoding in encodings], 0)
        if not self._token_types:
            types = np.zeros_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}

    def _cut(self, encoding: Any, text: Any, limit: int) -> Any:
        """The encoding, or that of the beginning of its text that fits into `limit` tokens with the special ones."""
        if len(encoding.ids) <= limit:
            return encoding
        if not isinstance(text, str):
            raise RequestError("pairs of texts cannot be cut to a number of tokens; shorten them")
        room = limit - self._tokenizer.num_special_tokens_to_add(False)
        if room < 1:
            raise RequestError(f"a text cut to {limit} tokens has none of its own; keep at least {limit + 1 - room}")
        (plain,) = self._tokenizer.encode_batch([text], add_special_tokens=False)  # as in `ids`
        plain.truncate(room, direction=self._truncation_side)
        return self._tokenizer.post_process(plain)

    def _prompt(self, name: str | None) -> str:
        name = self._default_prompt if name is None else name
        if name is None:
            return ""
        if name not in self._prompts:
            known = f"known are {', '.join(self._prompts)}" if self._prompts else "this model has none"
            raise RequestError(f"prompt {name!r} is not known; {known}")
        return self._prompts[name]

    @property
    def prompt_names(self) -> list[str]:
        """The names that `encode` knows prompts by."""
        return list(self._prompts)

    def ids(self, text: str, special: bool = True) -> list[int]:
        """The tokens of one text, of any number; `special`: with those that the tokenizer adds to every text.

        Raises:
            RequestError: it is not a text.
        """
        (checked,) = _inputs([text], None)
        # Unlike the call for a single text, that for a batch lets other threads run: a long text takes seconds.
        (found,) = self._tokenizer.encode_batch_fast([checked], add_special_tokens=special)
        return list(found.ids)

    def pieces(self, text: str, special: bool = True) -> tuple[list[int], list[str]]:
        """The tokens of one text, with those that the tokenizer adds if `special`, and what of the text each one is:
        joined they are the text. What is between two tokens is the later one's; a character in several tokens is that
        of the last.

        Raises:
            RequestError: it is not a text.
        """
        (checked,) = _inputs([text], None)
        encoding = self._tokenizer.encode(checked, add_special_tokens=special)
        begins, end = [], 0
        for (start, stop), added in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
            begins.append(end if added else min(start, end))
            end = end if added else stop
        ends = [*begins[1:], len(text)]
        return list(encoding.ids), [text[begin:stop] for begin, stop in zip(begins, ends, strict=True)]

    def least(self, text: str) -> int:
        """A number of tokens that the text has at least, known without making them: for 4 MB they take seconds and half
        a gigabyte. 0 where nothing is known."""
        return 0 if self._widest is None else -(-len(text) // self._widest)

    @cached_property
    def _widest(self) -> int | None:
        """The most characters that one token stands for; None where there is no bound that is easily known."""
        tokenizer = self._tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        if not is_byte_level(tokenizer) or any(token.lstrip or token.rstrip for token in added):
            return None  # others may take unknown words, or blanks, for one token
        composes = 1 if tokenizer.normalizer is None else _COMPOSED.get(type(tokenizer.normalizer).__name__)
        return None if composes is None else composes * max(map(len, tokenizer.get_vocab()))

    def count(self, text: str) -> int:
        """How many tokens the text has, special ones included.

        Raises:
            RequestError: it is not a text.
        """
        (checked,) = _inputs([text], None)
        (found,) = self._tokenizer.encode_batch_fast([checked])
        return len(found.ids)

    def names(self, ids: Sequence[int]) -> list[str]:
        """How the vocabulary spells each of these tokens; empty for an id that it does not have."""
        return [str(self._tokenizer.id_to_token(i) or "") for i in ids]

    def decode(self, ids: Sequence[int] | NDArray[np.int64], special: bool = False) -> str:
        """The text of these tokens [length], without the special ones unless they are asked for.

        Raises:
            RequestError: an id is negative or does not fit 32 bits.
        """
        try:
            return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=not special))
        except OverflowError as error:
            raise RequestError("a token id is negative or too large; ids come from encode or a model") from error

    @property
    def size(self) -> int:
        """How many tokens there are, the special ones included."""
        return int(self._tokenizer.get_vocab_size())

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""
        return str(self._tokenizer.to_str())

    def token(self, text: str) -> int | None:
        """The token that stands for this text; None if there is none."""
        found: int | None = self._tokenizer.token_to_id(text)
        return found

    def leaves_out(self, token: int) -> bool:
        """Whether decode leaves this token out: it is a special one, or unknown to the tokenizer."""
        return token in self._special_ids or self._tokenizer.id_to_token(token) is None

    @property
    def special_texts(self) -> list[str]:
        """How the special tokens are spelt."""
        added = self._tokenizer.get_added_tokens_decoder()
        return [token.content for token in added.values() if token.special and token.content]

    @cached_property
    def added(self) -> dict[str, int]:
        """The tokens that stand for a text as a whole wherever it comes, special or not, by that text; the longest text
        first."""
        tokens = self._tokenizer.get_added_tokens_decoder()
        texts = {token.content: number for number, token in tokens.items() if token.content}
        return dict(sorted(texts.items(), key=lambda item: -len(item[0])))

    def with_special(self, text: str) -> tuple["TextEncoder", int]:
        """A tokenizer that knows one special token more, and the id of that."""
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True)])
        number = tokenizer.token_to_id(text)
        assert number is not None
        return TextEncoder(tokenizer, self.max_length, self.pad_id), number

    @cached_property
    def token_bytes(self) -> TokenBytes | None:
        """What each token adds to a text; None where that depends on the tokens beside it."""
        return TokenBytes(self._tokenizer, self._special_ids) if is_byte_level(self._tokenizer) else None

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    @cached_property
    def _truncating(self) -> Any:
        """A second tokenizer: truncation is a state of the object, and other threads are using the first."""
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.enable_truncation(self.max_length, direction=self._truncation_side)
        return tokenizer


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of tokens as one array, padded on the right, and its attention mask; both int64 [rows, length]."""
    shape = (len(rows), max(map(len, rows)))
    ids, mask = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    return ids, mask


def _inputs(texts: Sequence[str], pairs: Sequence[str] | None) -> list[str] | list[tuple[str, str]]:
    """Check what a user gave, and bring it into the form the library takes."""
    if isinstance(texts, str) or isinstance(pairs, str):
        raise RequestError("a single text was given where a list of texts is needed; pass [text]")
    if not len(texts):
        raise RequestError("no texts were given; pass at least one")
    if pairs is not None and len(pairs) != len(texts):
        raise RequestError(f"{len(texts)} texts were given with {len(pairs)} pairs; give one pair for each text")
    for number, text in [*enumerate(texts), *enumerate(pairs or ())]:
        if not isinstance(text, str):
            raise RequestError(f"text {number} is a {type(text).__name__}; give a str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"text {number} is not valid Unicode ({error.reason}); repair its decoding") from error
    return list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
