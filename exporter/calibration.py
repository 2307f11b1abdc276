"""Rounding a model's matrices by GPTQ on rows of tokens: each when the model comes to it, so that its inputs are those
that the matrices before it, rounded already, have made.

The rows are texts that the user gives, or that the model draws itself: what it was trained on, without any data.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from stageline.exporter import skeleton, tasks
from stageline.exporter.quantise.gptq import gptq, hessian_of
from stageline.exporter.quantise.nearest import ROLES, Parts, Scheme
from stageline.exporter.quantise.streaming import check_finite
from stageline.exporter.tokenizer import write_tokenizer
from stageline.exporter.trace_model import TracedModel, Wanted
from stageline.exporter.verify.against_torch import load_model, rounded
from stageline.models.errors import ExportError
from stageline.models.packing import dequantised
from tokenizers import Tokenizer

TOKENS, ROW = 1 << 14, 256
"""Tokens that the matrices see, and of those the tokens of a row."""
_SEED = 0


@dataclass(frozen=True)
class Calibrated(Scheme):
    """The scheme of one matrix, whose numbers are known."""

    made: Parts

    def round(self, weight: Any) -> Parts:
        """The numbers, whatever the weight."""
        return self.made


def first_tokens(wanted: Wanted) -> list[int]:
    """The first tokens of the texts that are given, one text after the other; without texts, the token with which the
    model begins to draw some. ExportError if it draws none, or there is no tokenizer to read texts with."""
    texts = wanted.quantise.texts if wanted.quantise else ()
    if texts:
        return _tokens(wanted, texts)[:TOKENS]
    config = wanted.config.get_text_config()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    begins = [token for token in (config.bos_token_id, *ends) if token is not None]
    if wanted.task != tasks.GENERATION or not begins:
        raise ExportError(
            f"{wanted.checkpoint.path} draws no text that GPTQ could calibrate with; give texts with --calibrate FILE, "
            "or leave out --method gptq"
        )
    return begins[:1]


def _tokens(wanted: Wanted, texts: Sequence[str]) -> list[int]:
    notes: list[str] = []  # those of the export are written when it writes its own
    with tempfile.TemporaryDirectory() as folder:
        settings, _ = write_tokenizer(replace(wanted, notes=notes), Path(folder), None)
        if settings is None:
            why = notes[-1] if notes else "it has no tokenizer"
            raise ExportError(f"{wanted.checkpoint.path} cannot read texts ({why}); leave out --calibrate")
        tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer" / "tokenizer.json"))
    tokenizer.no_truncation()  # rows are cut later
    return [token for text in texts for token in tokenizer.encode(text).ids]


def calibrated(wanted: Wanted, traced: TracedModel, first: Sequence[int]) -> dict[str, Scheme]:
    """The traced model's schemes, with the numbers that GPTQ finds for the matrices of linear layers; `first`: as
    `first_tokens` gives it. Holds the model in float32. ExportError if it cannot be loaded."""
    assert wanted.quantise is not None
    wanted.progress("loading the checkpoint into torch")
    model = rounded(load_model(wanted.checkpoint, wanted.task, attention="sdpa"), wanted.dtype)
    length = min(ROW, skeleton.max_positions(model) or ROW, traced.longest or ROW)
    texts = wanted.quantise.texts
    if not texts:
        wanted.progress(f"drawing {TOKENS:,} tokens")
    rows = _cut(first, length) if texts else _drawn(model, first[0], length)
    whose = "texts that were given" if texts else "text that the model drew"
    wanted.notes.append(f"matrices were rounded by GPTQ on {rows.numel():,} tokens of {whose}")
    return round_all(model, rows, traced.schemes, traced.weights.names, wanted.progress)


def round_all(
    model: Any,
    rows: torch.Tensor,
    schemes: Mapping[str, Scheme],
    names: Mapping[str, str],
    progress: Callable[[str], None],
) -> dict[str, Scheme]:
    """The schemes, by the checkpoint's names for weights, with numbers for the matrices that the model computes with
    when it reads `rows` int64 [rows, tokens]; the model is left with them. `names` maps its parameters to these."""
    made: dict[str, Scheme] = dict(schemes)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # the last inputs, which several products may share

    def become(module: Any, scheme: Scheme, parts: Parts) -> None:
        shape = tuple(module.weight.shape)
        held = dequantised(scheme.packing(shape, "float32"), dict(zip(ROLES, parts, strict=True)))
        module.weight.copy_(torch.from_numpy(held))

    def hook(name: str, scheme: Scheme) -> Any:
        def before(module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...]) -> None:
            if isinstance(made[name], Calibrated):
                return  # its layer is computed once more
            if not seen or seen[0][0] is not inputs[0]:
                seen[:] = [(inputs[0], hessian_of(inputs[0]))]
                if not torch.isfinite(seen[0][1]).all():
                    raise ExportError(
                        f"what the model multiplies by {name} is infinite or no number for the text it is calibrated "
                        "with; leave out --method gptq"
                    )
            progress(f"rounding {name}")
            weight = module.weight.numpy()
            check_finite(name, weight)
            parts = gptq(weight, seen[0][1], scheme)
            become(module, scheme, parts)
            made[name] = Calibrated(scheme.bits, scheme.group, parts)

        return before

    body = model.base_model
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    hooks = []
    with torch.no_grad():
        for path, module in model.named_modules():
            name = names.get(f"{path}.weight", "")
            if name not in schemes:
                continue
            if isinstance(module, torch.nn.Linear) and module is not head:
                hooks.append(module.register_forward_pre_hook(hook(name, schemes[name])))
            elif isinstance(module, torch.nn.Embedding):
                check_finite(name, module.weight.numpy())
                become(module, schemes[name], schemes[name].round(module.weight.numpy()))
        body.config.use_cache = False  # one pass
        body(rows)
    for one in hooks:
        one.remove()
    return made


def _drawn(model: Any, first: int, length: int) -> torch.Tensor:
    """Rows that the model draws after the token `first` at temperature 1: int64 [rows, length]."""
    # of its own defaults, none applies: the text goes on after an end, with the next one
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length - 1, pad_token_id=first
    )
    given = torch.full((TOKENS // length, 1), first)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(_SEED)
        return torch.as_tensor(model.generate(given, attention_mask=torch.ones_like(given)))


def _cut(tokens: Sequence[int], length: int) -> torch.Tensor:
    """Whole rows of the tokens: int64 [rows, length]; one shorter row if there are fewer."""
    length = min(length, len(tokens))
    return torch.tensor(tokens[: len(tokens) // length * length]).reshape(-1, length)
