"""Stages as a pipeline opens them: from a bundle's files, or stitched again; all alike, however they are cut."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import onnx_ir as ir
from stageline.models.errors import BundleError
from stageline.runtime.bundle.crossing import Crossing
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import Stage
from stageline.runtime.bundle.recut import plan_stages
from stageline.runtime.bundle.stitch import stitch
from stageline.runtime.cluster.addresses import is_remote
from stageline.runtime.cluster.elsewhere import Elsewhere
from stageline.runtime.devices import spread
from stageline.runtime.devices.base import Device
from stageline.runtime.engines import (
    CacheSize,
    Engine,
    StageFile,
    default_device,
    engine_factory,
    engine_on,
    open_sampler,
)
from stageline.runtime.options import PipelineOptions
from stageline.runtime.stages.lanes import Lanes, PipelineStage


@dataclass(frozen=True)
class StageSet:
    """Stages to be opened, sharing `threads` CPU cores (None: all this process may use), or each on its own one of
    `devices`. For those of a bundle: the blocks of each, and what made them."""

    stages: tuple[PipelineStage, ...]
    threads: int | None = None
    devices: Sequence[str] | None = None
    layers: tuple[int, ...] = ()
    opener: "Opener | None" = None

    def open(self) -> Lanes:
        """Open the stages; errors as of `Lanes`."""
        return Lanes(self.stages, self.threads, self.devices, self.opener.elsewhere if self.opener else None)

    @property
    def outside(self) -> bool:
        """Whether any stage is outside of this process."""
        isolated = self.opener is not None and self.opener.options.isolate
        return isolated or any(map(is_remote, self.devices or ()))

    @property
    def bundle(self) -> Bundle | None:
        """The bundle whose stages these are."""
        return self.opener.bundle if self.opener else None


@dataclass(frozen=True)
class Opener:
    """Makes the stages of a bundle, however they are cut, for the engine and the devices of `options`."""

    bundle: Bundle
    options: PipelineOptions
    epoch: int = field(default_factory=time.time_ns)
    """Of this opening; hosts refuse earlier ones."""

    @property
    def elsewhere(self) -> Elsewhere:
        """How stages outside of this process are reached."""
        isolated = self.bundle.path if self.options.isolate else None
        return Elsewhere(self.epoch, self.options.key_file, isolated)

    def again(self) -> "Opener":
        """The same for another opening. Its epoch is the next one: those of pipelines opened later stay later."""
        return replace(self, epoch=self.epoch + 1)

    @property
    def cache(self) -> CacheSize | None:
        """The caches of each stage; None for a model without. RequestError where the model places fewer tokens."""
        return self.options.cache_size(self.bundle.manifest)

    def on_disk(self) -> StageSet:
        """The stages that the bundle has on disk."""
        stages = self.bundle.manifest.stages
        places = self._places(len(stages))
        layers = tuple(stage.last_block - stage.first_block + 1 for stage in stages)
        opened = [
            self._stage(number, stage, self.bundle.path / stage.file, place, layers)
            for number, (stage, place) in enumerate(zip(stages, places, strict=True))
        ]
        return StageSet(tuple(opened), self.options.threads, places, layers, self)

    @contextmanager
    def recut(self, stages: int | Sequence[int]) -> Iterator[StageSet]:
        """The bundle cut as `stages` asks (see `bundle.plan_stages`). Nothing changes on disk: the graphs lie in a
        temporary folder, which lasts as long as the context, so open the engines in it.

        StagelineError where it does not fit the model's blocks, BundleError where the graphs cannot be written.
        """
        bundle = self.bundle
        parts = bundle.parts()
        counts = plan_stages(bundle.manifest, parts, stages)
        on_disk = self.on_disk()
        if tuple(counts) == on_disk.layers:  # their engines may have been built ahead
            yield on_disk
            return
        crossing = Crossing.of(bundle.manifest, parts, counts)
        with tempfile.TemporaryDirectory(prefix="stageline-") as folder:
            opened, places = [], self._places(len(counts))
            for number in range(len(counts)):
                model, stage = stitch(crossing, number, bundle.tensors, bundle.path)
                file = Path(folder) / stage.file
                try:
                    file.write_bytes(ir.to_proto(model).SerializeToString())
                except OSError as error:
                    raise BundleError(f"cannot write a stage to {file}: {error.strerror}") from error
                opened.append(self._stage(number, stage, file, places[number], tuple(counts)))
            yield StageSet(tuple(opened), self.options.threads, places, tuple(counts), self)

    def _places(self, stages: int) -> list[str]:
        devices = self.options.devices or [default_device(self.options.engine)]
        return spread(devices[:stages], stages)

    def _stage(self, number: int, stage: Stage, file: Path, device: str, layers: tuple[int, ...]) -> PipelineStage:
        inputs, outputs = (tuple(spec.name for spec in specs) for specs in (stage.inputs, stage.outputs))
        if self.options.isolate or is_remote(device):
            return PipelineStage(inputs, outputs, self._elsewhere(number, layers))
        opening = StageFile(number, file, self.bundle.path, stage.caches)
        factory = engine_factory(engine_on(self.options.engine, device))
        logits = next((spec for spec in stage.outputs if spec.name == "logits"), None)
        generates = self.cache is not None and logits is not None
        return PipelineStage(
            inputs,
            outputs,
            partial(factory, opening, cache=self.cache, quantise=self.options.quantise),
            partial(open_sampler, int(logits.shape[-1])) if logits is not None and generates else None,
        )

    def _elsewhere(self, number: int, layers: tuple[int, ...]) -> Callable[[Device], Engine]:
        """What asks a host to open a stage."""
        from stageline.runtime.cluster import messages
        from stageline.runtime.engines.remote import RemoteEngine

        options = messages.StageOptions.of(self.options)
        version, digest = messages.stageline_version(), self.bundle.digest()
        asked = messages.Open(stageline=version, bundle=digest, layers=layers, stage=number, options=options)
        return partial(RemoteEngine, asked)


def check_same_model(running: Bundle, new: Bundle) -> None:
    """BundleError unless `new` differs from `running` in its weights only: it can then take over a running pipeline."""
    a, b = running.manifest, new.manifest
    shapes = [{name: tuple(entry.shape) for name, entry in bundle.weights.items()} for bundle in (running, new)]
    unlike = next((name for name, shape in shapes[0].items() if shapes[1].get(name) != shape), None)
    for what, old, other in (
        ("architecture", a.architecture, b.architecture),
        ("number of blocks", a.blocks, b.blocks),
        ("task", a.task, b.task),
        ("vocabulary", a.vocabulary, b.vocabulary),
        ("max positions", a.max_positions, b.max_positions),
        (f"shape of {unlike}", shapes[0].get(unlike or ""), shapes[1].get(unlike or "")),
        ("inputs", [spec.name for spec in a.inputs], [spec.name for spec in b.inputs]),
        ("outputs", [spec.name for spec in a.outputs], [spec.name for spec in b.outputs]),
        ("KV cache", a.cached, b.cached),
        ("generation defaults", a.generation_defaults, b.generation_defaults),
        ("tokenizer", _tokenizer(running), _tokenizer(new)),
    ):
        if old != other:
            raise BundleError(
                f"bundle {new.path} holds another model than {running.path}, which runs: its {what} is {other}, "
                f"not {old}; open it as a pipeline of its own"
            )


def _tokenizer(bundle: Bundle) -> str | None:
    text = bundle.manifest.text
    digests = {entry.path: entry.sha256 for entry in bundle.manifest.files}
    return None if text is None else digests[text.tokenizer]
