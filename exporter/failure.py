"""Why torch could not trace a model, in words about the model: torch's own messages are about torch's inside."""

import dis
import re
import traceback
from pathlib import Path

_FUNCTION = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'(?:, overload='(\w+)')?")
_OVERLOAD = re.compile(r"Cannot find a compatible OpOverload for ([\w.]+)")
_MISSING = re.compile(r"missing \d+ required (?:positional|keyword-only) arguments?: (.*)")


def reason_of(error: BaseException) -> str:
    """Why the model cannot be traced, and where in its code; the error itself stays its cause."""
    chain = _chain(error)
    text = "\n".join(f"{type(e).__name__}: {e}" for e in chain)
    place = next((place for e in reversed(chain) if (place := _place(e)) is not None), "")
    if found := _FUNCTION.search(text):
        return f"it uses {found[1]}, which ONNX has no function for"
    if found := _OVERLOAD.search(text):
        return f"it uses {found[1]} in a way that torch does not export to ONNX{place}"
    if found := _MISSING.search(text):
        return f"it needs {found[1].replace(chr(39), '')} as well"
    if "Constraints violated" in text or "ConstraintViolation" in text:
        return "its code holds for rows of one length only: it repeats itself for each token, or branches on the length"
    if "data-dependent" in text.lower() or "DataDependent" in text or "GuardOnDataDependent" in text:
        return f"its code goes one way or another by the values that it computes{place}"
    if "ModuleNotFoundError" in text or "ImportError" in text:
        return first_line(chain[-1])
    if "scalar type" in text or "have the same dtype" in text:
        return f"its code mixes types{place}; try --dtype float32"
    cause = chain[-1]
    if _raised_in_transformers(cause):
        return f"{first_line(cause)}{place}"
    return f"{type(cause).__name__}{place or ' inside torch'}"


def first_line(error: BaseException) -> str:
    """The error's first line of text."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line[:300]


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _place(error: BaseException) -> str | None:
    """The last line of a model's code that led to the error."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "transformers" in Path(f.filename).parts]
    models = [f for f in frames if Path(f.filename).name.startswith("modeling_")]
    if not (models or frames):
        return None
    last = (models or frames)[-1]
    return f" ({Path(last.filename).name}, line {last.lineno}: {last.line})"


def _raised_in_transformers(error: BaseException) -> bool:
    """Whether a `raise` of transformers' own made it, and not a function of torch's that transformers called."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    code = last.tb_frame.f_code
    raised = code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raised and "transformers" in Path(code.co_filename).parts
