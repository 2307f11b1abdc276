"""The model without its weights: a torch module built from the config alone, for tracing.

Parameters live on the meta device while the model is built and become fake tensors for the trace, so a model of any
size costs kilobytes. Buffers stay real, because some (rotary frequencies) are computed when the model is built.
"""

import inspect
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import accelerate
import torch
import transformers
from stageline.exporter.failure import first_line
from stageline.exporter.tasks import class_of
from stageline.models.errors import ExportError
from stageline.runtime.bundle.manifest import EMBEDDING
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

SAMPLES = {"batch": 3, "length": 7, "picks": 5}  # unlike any usual width, so that none is taken for a constant

_DTYPE = ("dtype", "torch_dtype")  # keys of config.json that nothing here follows: the tensors have their types

COMPUTES_ITSELF = "it computes attention itself"


class RefusedError(Exception):
    """The model does not allow this way to trace its attention (stageline.exporter.attention); the message says why."""


class NoCacheError(RefusedError):
    """The model does not allow any way with a KV cache."""


@dataclass(frozen=True)
class Input:
    """One input of the model: a name, a torch dtype, and a shape whose strings are free dimensions."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def sample_shape(self) -> tuple[int, ...]:
        """The shape used for tracing."""
        return tuple(SAMPLES[d] if isinstance(d, str) else d for d in self.shape)


class Task(torch.nn.Module):
    """A transformers model reduced to named tensors in and a tuple of tensors out."""

    row_scaling = None
    """It keeps no keys that could depend on the length of a row."""

    def __init__(self, model: Any, inputs: tuple[Input, ...], outputs: tuple[str, ...], head: torch.nn.Module | None):
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.input_names = tuple(i.name for i in inputs)
        self.output_names = outputs
        self.head = head
        self.extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        self.rows_of: Callable[[torch.Tensor], AbstractContextManager[None]] = lambda lengths: nullcontext()
        """What to be in while rows of these lengths [batch] are computed."""

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip(self.input_names, tensors, strict=True))
        mask = named.get("attention_mask")
        with nullcontext() if mask is None else self.rows_of(mask.sum(dim=1)):
            result = self.model(**named, **self.extra, return_dict=True)
        if self.output_names == ("logits",):
            return (result.logits,)
        hidden = result.last_hidden_state
        if self.head is None:
            return (hidden,)
        return (self.head(hidden, named["attention_mask"]), hidden)


def config_of(config: Mapping[str, Any]) -> Any:
    """The transformers config object of a config.json. ExportError if transformers does not know the model_type."""
    values = _floats({key: value for key, value in config.items() if key not in _DTYPE})
    kind = values.pop("model_type", None)
    names = values.get("architectures") or []
    if kind is None:
        raise ExportError(_why_no_type(values))
    if not isinstance(kind, str):
        raise ExportError(f"config.json: model_type is {kind!r}; it must be one name")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ExportError(f"config.json: architectures is {names!r}; it must be a list of names of classes")
    if "auto_map" in values and kind not in transformers.CONFIG_MAPPING:
        raise ExportError(
            f"model_type {kind!r} brings its own code (auto_map), which is never run; export a model that "
            f"transformers {transformers.__version__} has built in"
        )
    if kind not in transformers.CONFIG_MAPPING:
        raise ExportError(
            f"transformers {transformers.__version__} does not know model_type {kind!r}; "
            "check the spelling in config.json or install a newer transformers"
        )
    try:
        return transformers.AutoConfig.for_model(kind, **values)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise _not_valid(kind, error) from error
    except Exception as error:  # huggingface_hub's strict dataclasses raise their own family
        if "Validation" not in type(error).__name__:
            raise
        raise _not_valid(kind, error) from error


def _why_no_type(values: Mapping[str, Any]) -> str:
    """What a config.json without model_type is of, as far as that shows."""
    if "_diffusers_version" in values:
        return (
            f"config.json is of {values.get('_class_name', 'a module')}, a part of a diffusers pipeline, which is not "
            "read; export a model of transformers"
        )
    if "pretrained_cfg" in values:
        return (
            f"config.json is of timm's {values.get('architecture', 'code')}, which is not read; "
            "export a model of transformers"
        )
    named: Any = [getattr(transformers, str(name), None) for name in values.get("architectures") or ()]
    configs = [getattr(known, "config_class", None) for known in named]
    types = [config.model_type for config in configs if config is not None]
    add = f'add "model_type": "{types[0]}"' if types else "add the model_type it was trained as"
    return f"config.json has no model_type, so its architecture is unknown; {add}"


def _not_valid(kind: str, error: Exception) -> ExportError:
    said = " ".join(str(error).split())
    if type(error) is KeyError and len(said.split()) == 1:  # a name that was looked up in a table
        said = f"transformers has no {said}"
    elif isinstance(error, ArithmeticError):
        said = f"{said} ({type(error).__name__})"
    return ExportError(f"config.json of model_type {kind!r} is not valid: {said[:300]}")


def _floats(value: Any) -> Any:
    """The config with the floats that JSON lacks ({"__float__": "Infinity"} in transformers' files) as numbers."""
    if isinstance(value, dict):
        return float(value["__float__"]) if value.keys() == {"__float__"} else {k: _floats(v) for k, v in value.items()}
    return [_floats(v) for v in value] if isinstance(value, list) else value


@contextmanager
def no_such_attention(name: str) -> Iterator[None]:
    """Around calls into transformers: a model that looks up `name` in a table of its own, in vain, raises RefusedError.
    Any other KeyError is a bug, and stays one."""
    try:
        yield
    except KeyError as error:
        if error.args != (name,):
            raise
        raise RefusedError(COMPUTES_ITSELF) from error


def build(config: Any, task: str, dtype: torch.dtype, attention: str) -> Any:
    """The transformers model for a task, parameters on meta, in evaluation mode. RefusedError if it cannot have this
    attention."""
    found = class_of(config, task)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if part is None:  # ESM has a part that only its folding needs
            continue
        part.use_cache = False
        part._attn_implementation_internal = None  # a config that was used before still holds its choice
    try:
        with accelerate.init_empty_weights(include_buffers=False), no_such_attention(attention):
            make = getattr(found, "_from_config", None) or found.from_config
            model = make(config, dtype=dtype, attn_implementation=attention)
            model.set_experts_implementation("batched_mm")  # the one whose shapes do not depend on the router's choice
    except ImportError as error:
        raise ExportError(f"{config.model_type} needs another package: {first_line(error)}") from error
    except ValueError as error:
        first = " ".join(str(error).split())[:200]
        if attention != "eager" and "attention" in first.lower():
            raise RefusedError(COMPUTES_ITSELF) from error
        raise ExportError(f"no model of {config.model_type} for {task} can be made: {first}") from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise _not_valid(config.model_type, error) from error
    _in_one_dtype(model, dtype)
    model.tie_weights()  # replacing parameters by meta ones undid it
    return model.eval()


def _in_one_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give parameters that the model's code makes in float32 (DeBERTa's biases) the dtype that transformers loads them
    in."""
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(kept in name for kept in strict):
            parameter.data = parameter.data.to(dtype)


def outputs_of(task: str) -> tuple[str, ...]:
    """The names of a task's outputs."""
    named = {
        "feature-extraction": ("last_hidden_state",),
        "sentence-similarity": (EMBEDDING, "last_hidden_state"),
    }
    return named.get(task, ("logits",))


def max_positions(model: Any) -> int | None:
    """How many tokens in a row the model can place; dynamic NTK extends the stated number by its factor."""
    config = model.config.get_text_config()
    stated = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)  # MPT's
    if stated is None:
        return None
    rotary = getattr(config, "rope_parameters", None) or {}
    factor = rotary["factor"] if rotary.get("rope_type") == "dynamic" else 1
    return int(stated * factor) - first_position(model)


def first_position(model: Any) -> int:
    """The place in the model's table of positions that a row's first token has: after the padding row, if the table has
    one (RoBERTa), else 0."""
    config = model.config.get_text_config()
    stated = getattr(config, "max_position_embeddings", None)
    for module in model.modules():
        if (
            isinstance(module, torch.nn.Embedding)
            and module.num_embeddings == stated
            and module.padding_idx is not None
            and stated != getattr(config, "vocab_size", None)
        ):
            return module.padding_idx + 1
    return 0


def inputs_of(model: Any, dtype: torch.dtype, image_size: tuple[int, int] | None = None) -> tuple[Input, ...]:
    """The model's inputs, from its own declaration and the signature of its forward. `image_size`: height and width of
    images; default: what the config states."""
    accepted = inspect.signature(model.forward).parameters
    main = model.main_input_name
    config = model.config
    if main == "input_ids" or (model.can_generate() and "input_ids" in accepted):
        names = ["input_ids", "attention_mask"]
        if "token_type_ids" in accepted and (getattr(config, "type_vocab_size", None) or 0) > 1:
            names.append("token_type_ids")  # RoBERTa has one type, which it takes by itself
        return tuple(Input(n, torch.int64, ("batch", "length")) for n in names if n in accepted)
    if main == "pixel_values":
        return (Input("pixel_values", dtype, ("batch", *_image_shape(config, image_size))),)
    raise ExportError(
        f"{type(model).__name__} reads {main}; what can be exported reads input_ids (text) or pixel_values (images)"
    )


def _image_shape(config: Any, wanted: tuple[int, int] | None) -> tuple[int, int, int]:
    """Channels, height and width of the images that the model takes, from its config or that of its vision part."""
    vision = config if getattr(config, "image_size", None) else getattr(config, "vision_config", config)
    size = wanted or getattr(vision, "image_size", None)
    if size is None:
        raise ExportError(
            "neither config.json nor preprocessor_config.json states the size of images; add image_size to config.json"
        )
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return getattr(vision, "num_channels", 3), height, width  # PP-LCNet's config, of images in colour, has no number


def fake_mode() -> FakeTensorMode:
    """A mode in which tensors have shapes but no data."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def fake_weights(model: torch.nn.Module, mode: FakeTensorMode, stored: Container[str]) -> None:
    """Replace every meta parameter, and every buffer whose name is `stored` in the checkpoint, by a fake CPU tensor, so
    that the trace does not see the values that those buffers have now. A tensor that modules share stays shared."""
    made: dict[int, torch.nn.Parameter] = {}
    kept = []  # the ids above stay valid while their parameters live
    with mode:
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    kept.append(parameter)
                    made[id(parameter)] = torch.nn.Parameter(
                        torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False
                    )
                module._parameters[name] = made[id(parameter)]
        for path, module in model.named_modules():
            for name, buffer in list(module._buffers.items()):
                if buffer is not None and (f"{path}.{name}" if path else name) in stored:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def parameter_shapes(model: torch.nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every distinct parameter, and every buffer of real numbers that is stored, as name -> (dtype, shape); for writing
    synthetic checkpoints."""
    kept = model.state_dict().keys()
    buffers = {n: b for n, b in model.named_buffers() if b.is_floating_point() and n in kept}
    tensors = {**dict(model.named_parameters()), **buffers}
    return {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()}
