"""Structures as llguidance compiles them for a model's tokenizer, and what they allow a row to draw next.

    prototype ──copy──> Matcher of a row ──take(token)──> mask of the next token, computed beside the stages

llguidance and not xgrammar: that one needs torch, which the runtime does without. A mask is computed in a thread of a
small pool, without Python's lock, from the moment the token before is known; whoever draws waits for what is left.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stageline.models.errors import RequestError
from stageline.models.tokenizer import TextEncoder
from stageline.runtime.generation.structure import JSON_OPTIONS, Structure

KEPT = 64
"""Compiled structures that a model keeps for later requests."""
_THREADS = 2
# Of llguidance's default: a fifth, a quarter, a twelfth. `(x{1000}){1000}` is refused after 0.5 s, not after 6.
_LIMITS = {"initial_lexer_fuel": 200_000, "step_lexer_fuel": 50_000, "max_lexer_states": 20_000}


class Grammars:
    """The structures of one model, compiled. Several threads may use it; its own threads end with it."""

    def __init__(self, encoder: TextEncoder, vocabulary: int, end_ids: Sequence[int]) -> None:
        """`vocabulary`: the width of the logits; tokens that the tokenizer has not are never allowed. `end_ids`: tokens
        that end a text, allowed where it may end."""
        self._encoder, self._vocabulary = encoder, vocabulary
        self._ends = np.array([token for token in dict.fromkeys(end_ids) if token < vocabulary], np.int64)
        self._tokenizer: Any = None
        self._prototypes: OrderedDict[Structure, Matcher] = OrderedDict()
        self._lock, self._compiling = threading.Lock(), threading.Lock()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar")

    def matcher(self, structure: Structure) -> "Matcher":
        """What a new text of this structure starts from. The first time it is compiled, one structure at a time.

        Raises:
            RequestError: the structure is impossible, too complex, or beyond llguidance; the tokenizer is; or
                llguidance is not installed.
        """
        if (found := self._kept(structure)) is None:
            with self._compiling:
                found = self._kept(structure) or self._keep(structure, self._compiled(structure))
        return found

    def _kept(self, structure: Structure) -> "Matcher | None":
        """What was compiled before. It does not wait for what is being compiled: an event loop may ask."""
        with self._lock:
            found = self._prototypes.get(structure)
            if found is not None:
                self._prototypes.move_to_end(structure)
            return found

    def _keep(self, structure: Structure, matcher: "Matcher") -> "Matcher":
        with self._lock:
            self._prototypes[structure] = matcher
            while len(self._prototypes) > KEPT:
                self._prototypes.popitem(last=False)
        return matcher

    def _compiled(self, structure: Structure) -> "Matcher":
        try:
            import llguidance
        except ImportError as error:
            raise RequestError("structured output needs llguidance: pip install 'stageline[structured]'") from error
        if self._tokenizer is None:
            self._tokenizer = self._opened(llguidance)
        try:
            source = self._unforced(structure, _grammar(llguidance, structure))
        except ValueError as error:
            raise _refused(structure, str(error)) from error
        limits = llguidance.LLParserLimits(verbose_errors=False, **_LIMITS)
        matcher = llguidance.LLMatcher(self._tokenizer, source, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refused(structure, matcher.get_error())
        return Matcher(matcher, self._pool, self._tokenizer.vocab_size, self._vocabulary, self._ends)

    def _unforced(self, structure: Structure, source: str) -> str:
        """The grammar, which leaves it to the model how to spell what is certain if a special token is spelt in it:
        llguidance 1.9 would force that token itself, and then find that it does not belong there."""
        special = (text for text, token in self._encoder.added.items() if self._tokenizer.is_special_token(token))
        if not any(text in structure.source for text in special):
            return source
        if source.startswith("{"):
            source = json.loads(source)["grammars"][0]["lark_grammar"] or f"start: {structure.lark_json}"
        return f'%llguidance {{"no_forcing": true}}\n{source}'

    def _opened(self, llguidance: Any) -> Any:
        size = max(self._vocabulary, self._encoder.size)
        end = int(self._ends[0]) if len(self._ends) else None
        try:
            return llguidance.LLTokenizer(self._encoder.to_json(), n_vocab=size, eos_token=end)
        except Exception as error:  # the library raises what it likes
            raise RequestError(
                f"this model's tokenizer cannot follow a structure ({_one_line(str(error))}); ask for none"
            ) from error


class Matcher:
    """Where a text stands in its structure. A prototype, or of one row, whose driver alone uses it."""

    def __init__(
        self, matcher: Any, pool: ThreadPoolExecutor, size: int, vocabulary: int, ends: NDArray[np.int64]
    ) -> None:
        """`matcher`: an LLMatcher for a tokenizer of `size` tokens."""
        self._matcher, self._pool, self._size, self._vocabulary, self._ends = matcher, pool, size, vocabulary, ends
        self._mask: Future[NDArray[np.bool_]] | None = None
        self.complete = False
        """Whether the text is whole and nothing may follow."""

    def copy(self) -> "Matcher":
        """The same place in the structure, for another row; its next mask is being computed."""
        copied = Matcher(self._matcher.deep_copy(), self._pool, self._size, self._vocabulary, self._ends)
        copied._mask = copied._pool.submit(copied._allowed)
        return copied

    @property
    def error(self) -> str:
        """Why it cannot go on; empty if it can. Ask once the mask is taken: until then the matcher is at work."""
        return _one_line(self._matcher.get_error()) if self._matcher.is_error() else ""

    def masked(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """The row's scores [vocabulary] with those tokens at minus infinity that the structure does not allow next."""
        assert self._mask is not None
        return np.where(self._mask.result(), scores, np.float32(-np.inf))

    def take(self, token: int) -> None:
        """Go on by a token that was drawn, and begin with the mask of the next."""
        assert self._mask is not None
        self._mask.result()
        if token not in self._ends:
            self._matcher.consume_token(token)
        self.complete = token in self._ends or (self._matcher.is_stopped() and not self._matcher.is_error())
        if not self.complete:
            self._mask = self._pool.submit(self._allowed)

    def _allowed(self) -> NDArray[np.bool_]:
        """Of each token [vocabulary], whether it may come next; none after an error."""
        words = np.zeros(-(-self._size // 32), np.uint32)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():
            words[:] = 0
        bits = np.unpackbits(words.view(np.uint8), count=self._vocabulary, bitorder="little")
        allowed = bits.view(np.bool_)
        allowed[self._ends] = allowed[self._ends[:1]].any()
        return allowed


def _grammar(llguidance: Any, structure: Structure) -> str:
    """The structure as an LLMatcher takes it."""
    match structure.kind:
        case "json_schema":
            return str(llguidance.LLMatcher.grammar_from_json_schema(structure.source, overrides=JSON_OPTIONS))
        case "regex":
            return str(llguidance.LLMatcher.grammar_from_regex(structure.source))
        case "choice":
            texts = (json.dumps(text, ensure_ascii=False) for text in json.loads(structure.source))
            return f"start: {' | '.join(texts)}"
        case "grammar":
            return str(llguidance.grammar_from("grammar", structure.source))
        case "tools":
            return structure.source


def _refused(structure: Structure, why: str) -> RequestError:
    return RequestError(f"the {structure.kind} cannot be followed: {_one_line(why)}; give another")


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:299] + "…"
