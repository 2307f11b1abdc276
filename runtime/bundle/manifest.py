"""The manifest: what a bundle holds, as data that is validated once, when it is read.

docs/reference/bundle.md specifies the format. Paths are POSIX, relative to the bundle's folder, and never leave it.
"""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field
from stageline.runtime.validation import Data

BATCH, LENGTH, PICKS = "batch", "length", "picks"  # free dimensions that the runtime knows
EMBEDDING = "sentence_embedding"  # the output of a model that embeds texts
CACHED_INPUTS = ("input_ids", "past_lengths", "new_lengths", "logits_at")
"""The inputs of a model with caches, all int64: token ids [batch, length], each row's tokens in the cache [batch], its
new tokens [batch], and the positions among these whose logits are requested [batch, picks]."""
INPUT_IDS, PAST_LENGTHS, NEW_LENGTHS, LOGITS_AT = CACHED_INPUTS
ROW_LENGTHS = "row_lengths"
"""A fifth input, if the manifest has `row_scaling`, int64 [batch]: the length of the row that the new keys are made
for, which is that of the prompt, or of the row with its new tokens if that is more."""
Activation = Literal["softmax", "sigmoid", "none"]
"""What makes a classifier's scores of its logits; none: they are the scores."""
_T = TypeVar("_T")


def _inside(path: str) -> str:
    """A path that stays in the bundle, or ValueError."""
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path:
        raise ValueError(f"path {path!r} leaves the bundle")
    return path


BundlePath = Annotated[str, AfterValidator(_inside)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ValueName = Annotated[str, Field(min_length=1)]


class FileEntry(Data):
    """One file of the bundle. `sha256` is None for a weight file that is too large to be read at export
    (stageline.runtime.bundle.folder.HASH_LIMIT_BYTES); `header_sha256`, over its safetensors header, is checked
    then."""

    path: BundlePath
    size_bytes: int = Field(ge=0)
    sha256: Sha256 | None = None
    header_sha256: Sha256 | None = None


class TensorSpec(Data):
    """An input or output of a graph. `dtype` is a NumPy name or `bfloat16`; a string in `shape` is a free
    dimension (`batch`, `length`, ...)."""

    name: ValueName
    dtype: str
    shape: tuple[int | str, ...]


class CacheSpec(Data):
    """The keys and values of earlier tokens that one CacheAttention operator reads and extends. Each row of the batch
    has keys [heads, tokens, key_size] and values [heads, tokens, value_size]. `name` is unique in the model; in a part
    it is a number."""

    name: ValueName
    heads: int = Field(gt=0)
    key_size: int = Field(gt=0)
    value_size: int = Field(gt=0)


class PackedWeight(Data):
    """A quantised weight. `method` and `settings` say how the tensors `parts` of the weight files, by their role, are
    unpacked to its values, of `shape` (docs/reference/bundle.md); `dtype`: the type of the model that it is of."""

    method: str
    settings: dict[str, int | str] = Field(default_factory=dict)
    shape: tuple[int, ...]
    dtype: Literal["float32", "float16", "bfloat16"]
    parts: dict[str, ValueName] = Field(min_length=1)


class Part(Data):
    """One traced graph: the prologue, one distinct kind of block, or the epilogue.

    The graph's inputs are `inputs` (activations, under local names) followed by `weights` (local names of tensors that
    a use of this part binds to tensors of the weight files).
    """

    file: BundlePath
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[TensorSpec, ...]
    caches: tuple[CacheSpec, ...] = ()


class Use(Data):
    """One use of a part in the model's chain: prologue, block 0, block 1, ..., epilogue.

    `reads` and `writes` map the part's input and output names to names of values in the whole model; `weights` maps its
    weight names to tensor names in the weight files. `module` is the path of the torch module it was traced from (""
    for prologue and epilogue), `call` counts earlier calls of the same module (ALBERT calls one module many times).
    """

    part: int = Field(ge=0)
    reads: dict[str, ValueName]
    writes: dict[str, ValueName]
    weights: dict[str, str]
    module: str = ""
    call: int = Field(default=0, ge=0)


def uses_of(each: Sequence[_T], first: int, end: int) -> Sequence[_T]:
    """The items that belong to a stage of blocks `first` to `end` - 1, if `each` holds one item for each use: the
    prologue is in the stage of the first block, the epilogue in that of the last."""
    return each[0 if first == 0 else first + 1 : len(each) if end == len(each) - 2 else end + 1]


class Stage(Data):
    """A contiguous range of blocks as one ONNX graph. The first stage also has the prologue, the last the epilogue.

    `inputs` and `outputs` are named by values of the whole model: an input is one of the model's inputs or an output of
    an earlier stage. `weight_bytes` and `parameters` count what the stage reads.
    """

    file: BundlePath
    first_block: int = Field(ge=0)
    last_block: int = Field(ge=0)  # inclusive
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weight_bytes: int = Field(ge=0)
    parameters: int = Field(ge=0)
    caches: tuple[CacheSpec, ...] = ()


class TextSettings(Data):
    """How text becomes tensors. `max_length` is in tokens, special ones included."""

    tokenizer: BundlePath
    max_length: int = Field(gt=0)
    pad_id: int = Field(ge=0)
    eos_ids: tuple[int, ...] = ()  # end tokens, up to version 3; later in GenerationDefaults
    truncation_side: Literal["right", "left"] = "right"  # where a text that is too long loses tokens
    token_types: bool = True  # whether the tokens of a pair's second text may have type 1
    prompts: dict[str, str] = Field(default_factory=dict)  # what is put before a text that is embedded, by name
    default_prompt: str | None = None  # the one of these that a text has if none is named
    similarity: Literal["cosine", "dot", "euclidean", "manhattan"] = "cosine"  # how embeddings are compared


class ImageSettings(Data):
    """How an image in RGB becomes pixel_values, in this order; sizes are height and width in pixels."""

    resize: tuple[int, int] | None = None  # to this size
    shortest_edge: int | None = Field(default=None, gt=0)  # or until its shorter side is so long
    resample: int = Field(default=2, ge=0, le=5)  # Pillow's number of the filter
    crop: tuple[int, int] | None = None  # from the middle; zeros where the image is smaller
    scale: float | None = None  # values are multiplied by it
    mean: tuple[float, float, float] | None = None  # subtracted from each channel
    std: tuple[float, float, float] | None = None  # which is then divided by it

    @property
    def size(self) -> tuple[int, int] | None:
        """What every image has in the end; None if that depends on the image."""
        return self.crop or self.resize


class GenerationDefaults(Data):
    """What the checkpoint says of generation, in generation_config.json or, without one, in config.json. Names and
    meanings are those of transformers' GenerationConfig. None: it says nothing."""

    end_ids: tuple[int, ...] = ()  # eos_token_id
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None  # prompt and output
    min_new_tokens: int | None = None
    min_length: int | None = None  # prompt and output


class RowScaling(Data):
    """How a row's keys depend on its length in tokens: those of rows of up to `shortest` tokens are alike, and those of
    rows of `longest` tokens or more (None: no others are). A row that grows from the one kind to the other is computed
    again from its first token; without `longest`, keys stay as they were made."""

    shortest: int = Field(gt=0)
    longest: int | None = Field(default=None, gt=0)

    def kind(self, length: int) -> int:
        """The length that stands for all that have the same keys as `length`."""
        return max(self.shortest, length if self.longest is None else min(length, self.longest))


class Refusal(Data):
    """A way to trace attention that the model does not allow, and why; the reason speaks of the model as "it"."""

    attention: str
    reason: str


class Float32Nodes(Data):
    """Precision of engines -> names of nodes of the stages that compute in float32 all the same."""

    fp16: tuple[ValueName, ...] = ()
    bf16: tuple[ValueName, ...] = ()


class UncutManifest(Data):
    """The manifest of a bundle, except its stages: what they are stitched from."""

    format: Literal["stageline-bundle"] = "stageline-bundle"
    version: Literal[2, 3, 4, 5] = 4  # 5 where weights are packed
    task: str  # as Hugging Face names it: feature-extraction, sentence-similarity, text-classification, ...
    architecture: str  # the config's model_type
    dtype: Literal["float32", "float16", "bfloat16"]
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    vocabulary: int | None = None  # token ids are below this
    max_positions: int | None = None  # tokens in a row that the model can place
    row_scaling: RowScaling | None = None  # of a model with caches whose keys depend on the length of a row
    text: TextSettings | None = None
    image: ImageSettings | None = None  # of a model of images
    parts: tuple[Part, ...]
    uses: tuple[Use, ...] = Field(min_length=3)
    labels: tuple[str, ...] | None = None  # of a classifier
    generation: GenerationDefaults | None = None  # of a model that generates; None up to version 3
    activation: Activation = "softmax"  # makes a classifier's scores of its logits
    packed: dict[str, PackedWeight] | None = None  # quantised weights, by the names that uses have for them
    weight_files: tuple[BundlePath, ...]
    files: tuple[FileEntry, ...]
    trace: str  # "stamped" or "full", and why
    attention: str | None = None  # cache, cache-torch, fused or primitive (docs/reference/bundle.md); None in version 2
    refused: tuple[Refusal, ...] | None = None  # what was tried before that attention
    no_cache_reason: str | None = None  # why a model of text keeps no keys and values
    notes: tuple[str, ...] = ()  # what a user should know of the export, each a sentence
    float32_nodes: Float32Nodes | None = None  # found by `stageline verify --find-precision`
    checked: str | None = None  # what the export ran of the bundle, and how it compares
    made_by: dict[str, str]  # package -> version

    @property
    def cached(self) -> bool:
        """Whether the model keeps keys and values of earlier tokens, so that it can generate."""
        return any(part.caches for part in self.parts)

    @property
    def exact(self) -> Literal["float32"] | None:
        """The `quantise` of engines that compute with the numbers that the weights mean, as a reference does."""
        return "float32" if self.packed else None

    @property
    def generation_defaults(self) -> GenerationDefaults:
        """What the checkpoint says of generation, whatever the bundle's version."""
        return self.generation or GenerationDefaults(end_ids=self.text.eos_ids if self.text else ())

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.uses) - 2

    @property
    def no_generation_reason(self) -> str:
        """Why a model that is not `cached` does not generate, as part of a sentence."""
        if self.task != "text-generation":
            return f"its task is {self.task}"
        return self.no_cache_reason or "it was exported without a KV cache"


class Manifest(UncutManifest):
    """Everything that the runtime needs to know about a bundle."""

    stages: tuple[Stage, ...] = Field(min_length=1)

    @property
    def layers(self) -> tuple[int, ...]:
        """Number of blocks of each stage."""
        return tuple(stage.last_block - stage.first_block + 1 for stage in self.stages)
