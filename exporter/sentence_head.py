"""What a sentence-transformers checkpoint computes after its Transformer: one vector from those of the tokens.

Pooling, Dense, LayerNorm and Normalize compute as in sentence_transformers.sentence_transformer.modules. The tensors of
Dense and LayerNorm lie in files of their own, under the same names in each (`linear.weight`); a bundle holds them
together in weights/sentence_head.safetensors, under the names that they have in the traced module.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from stageline.exporter.narrowing import Narrowing
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import CheckpointError
from stageline.models.safetensors_file import read_header, write_streaming
from stageline.models.sentence import Dense, LayerNorm, Normalize, PoolingMode, SentencePooling, Step, pooling
from stageline.runtime.bundle.folder import file_entry
from stageline.runtime.bundle.manifest import FileEntry

PREFIX = "sentence_head."
_FILE = "weights/sentence_head.safetensors"


class SentenceHead(torch.nn.Module):
    """Pooling and what follows. Its steps are its children; they are in no container, so are not taken for blocks."""

    def __init__(self, settings: SentencePooling, dtype: torch.dtype) -> None:
        super().__init__()
        self.settings = settings
        for number, step in enumerate(settings.steps):
            self.add_module(str(number), _module(step, dtype))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """hidden [batch, length, width], mask [batch, length] -> [batch, width of a sentence]."""
        vectors = torch.cat([_pool(hidden.float(), mask, mode) for mode in self.settings.modes], dim=-1)
        vectors = vectors.to(hidden.dtype)
        for step in self.children():
            vectors = step(vectors)
        return vectors[:, : self.settings.truncate_dim]


def loaded_head(checkpoint: Checkpoint) -> SentenceHead | None:
    """The head of a checkpoint with its tensors, in float32; None if the checkpoint embeds no sentences.

    CheckpointError if its files are damaged or do not fit.
    """
    settings = pooling(checkpoint)
    if settings is None:
        return None
    head = SentenceHead(settings, torch.float32)
    head.load_state_dict(_tensors(head, checkpoint))
    return head.eval()


def place_head(
    settings: SentencePooling, checkpoint: Checkpoint, dtype: str, folder: Path, notes: list[str]
) -> list[FileEntry]:
    """Write the head's tensors into the bundle `folder` with `dtype`, and return the file's entry, if it has tensors.
    What a user should know of their values is added to `notes`.

    CheckpointError if the checkpoint's files are damaged or do not fit; ExportError if values do not fit into `dtype`.
    """
    with torch.device("meta"):
        head = SentenceHead(settings, torch.float32)
    tensors = {PREFIX + name: tensor.numpy() for name, tensor in _tensors(head, checkpoint).items()}
    if not tensors:
        return []
    narrowing = Narrowing(checkpoint.path, dtype)
    specs = [(name, dtype, tensor.shape) for name, tensor in tensors.items()]
    write_streaming(folder / _FILE, specs, lambda name: [narrowing.converted(name, tensors[name])])
    notes += narrowing.check()
    return [file_entry(folder, _FILE)]


def _tensors(head: SentenceHead, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors, in float32, by the names that they have in the head."""
    found: dict[str, torch.Tensor] = {}
    for number, step in enumerate(head.settings.steps):
        wanted = {name: tensor.shape for name, tensor in head.get_submodule(str(number)).state_dict().items()}
        if not wanted or isinstance(step, Normalize):
            continue
        file = checkpoint.path / step.folder / "model.safetensors"
        if not file.is_file():
            raise CheckpointError(
                f"{file.parent} has no model.safetensors, and a pickled pytorch_model.bin is never read; save it again "
                "where you trust it: SentenceTransformer(FOLDER).save_pretrained(NEW_FOLDER)"
            )
        held = {name: torch.Size(entry.shape) for name, entry in read_header(file).items()}
        if held != wanted:
            raise CheckpointError(
                f"{file} holds {_shapes(held)}, but its config.json makes them {_shapes(wanted)}; download both again"
            )
        found.update({f"{number}.{name}": tensor.float() for name, tensor in load_file(file).items()})
    return found


def _shapes(tensors: dict[str, torch.Size]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(tensors.items())) or "nothing"


class _Dense(torch.nn.Module):
    def __init__(self, step: Dense, dtype: torch.dtype) -> None:
        super().__init__()
        kind: Any = getattr(torch.nn, step.activation, None)
        if not isinstance(kind, type) or not issubclass(kind, torch.nn.Module):
            raise CheckpointError(
                f"{step.folder} has the activation {step.activation!r}, which torch.nn lacks; export it without"
            )
        self.activation = kind()
        self.linear = torch.nn.Linear(step.in_features, step.out_features, bias=step.bias, dtype=dtype)
        self.added = step.residual
        if step.residual and step.in_features != step.out_features:
            self.residual = torch.nn.Linear(step.in_features, step.out_features, bias=False, dtype=dtype)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.activation(self.linear(vectors))
        if self.added:
            result = result + (self.residual(vectors) if hasattr(self, "residual") else vectors)
        return result


class _LayerNorm(torch.nn.Module):
    def __init__(self, step: LayerNorm, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(step.width, dtype=dtype)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(vectors)
        return result


class _Normalize(torch.nn.Module):
    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(vectors, p=2.0, dim=-1)


def _module(step: Step, dtype: torch.dtype) -> torch.nn.Module:
    if isinstance(step, Dense):
        return _Dense(step, dtype)
    return _LayerNorm(step, dtype) if isinstance(step, LayerNorm) else _Normalize()


def _pool(hidden: torch.Tensor, mask: torch.Tensor, mode: PoolingMode) -> torch.Tensor:
    """One vector of each row, in float32: a sum of halves overflows or loses the later tokens."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    if mode == "cls":
        # the first token that is not padding: the same as token 0 when padding is on the right
        return _token(hidden, mask.argmax(dim=1))
    if mode == "lasttoken":
        return _token(hidden, (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1))
    if mode == "max":
        return hidden.masked_fill(weights == 0, torch.finfo(hidden.dtype).min).max(dim=1).values
    if mode == "weightedmean":
        weights = weights * torch.arange(1, mask.shape[1] + 1, device=mask.device).to(hidden.dtype).view(1, -1, 1)
    count = weights.sum(dim=1).clamp(min=1e-9)
    return (hidden * weights).sum(dim=1) / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)


def _token(hidden: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    return hidden.gather(1, place.view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])).squeeze(1)
