"""Rounding a model's matrices by GPTQ on rows of tokens: each when the model comes to it, so that its inputs are those
that the matrices before it, rounded already, have made.

The rows are texts that the user gives, or that the model draws itself: what it was trained on, without any data.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


def calibrated(wanted: Wanted, traced: TracedModel) -> dict[str, Scheme]:
    """The traced model's schemes, with the numbers that GPTQ finds for the matrices of linear layers. Holds the model
    in float32. ExportError if it cannot be loaded, or there is no text: a model that generates none needs
    `wanted.quantise.texts`."""
    assert wanted.quantise is not None
    wanted.progress("loading the checkpoint into torch")
    model = rounded(load_model(wanted.checkpoint, wanted.task, attention="sdpa"), wanted.dtype)
    length = min(ROW, skeleton.max_positions(model) or ROW, traced.longest or ROW)
    texts = wanted.quantise.texts
    rows = read_rows(wanted, texts, length) if texts else drawn_rows(wanted, model, length)
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

    def replace(module: Any, scheme: Scheme, parts: Parts) -> None:
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
            replace(module, scheme, parts)
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
                replace(module, schemes[name], schemes[name].round(module.weight.numpy()))
        body.config.use_cache = False  # one pass
        body(rows)
    for one in hooks:
        one.remove()
    return made


def drawn_rows(wanted: Wanted, model: Any, length: int) -> torch.Tensor:
    """Rows that the model draws at temperature 1: int64 [rows, length]."""
    config = model.config.get_text_config()
    starts = [config.bos_token_id, config.eos_token_id]
    first = next((token for start in starts for token in (start if isinstance(start, list) else [start])
                  if token is not None), None)  # fmt: skip
    if wanted.task != tasks.GENERATION or first is None:
        raise ExportError(
            f"{wanted.checkpoint.path} draws no text that GPTQ could calibrate with; give texts with --calibrate FILE, "
            "or leave out --method gptq"
        )
    wanted.progress(f"drawing {TOKENS:,} tokens")
    # of its own defaults, none applies: the text goes on after an end, with the next one
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length - 1, pad_token_id=first
    )
    given = torch.full((TOKENS // length, 1), first)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(_SEED)
        return torch.as_tensor(model.generate(given, attention_mask=torch.ones_like(given)))


def read_rows(wanted: Wanted, texts: Sequence[str], length: int) -> torch.Tensor:
    """Rows of the first tokens of the texts, one text after the other: int64 [rows, length]; one shorter row if there
    are fewer."""
    with tempfile.TemporaryDirectory() as folder:
        settings, _ = write_tokenizer(wanted, Path(folder), None)
        if settings is None:
            raise ExportError(wanted.notes[-1] + "; leave out --calibrate")
        tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer" / "tokenizer.json"))
    ids = [token for text in texts for token in tokenizer.encode(text).ids][:TOKENS]
    length = min(length, len(ids))
    return torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)
