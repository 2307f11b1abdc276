"""Stages as a pipeline opens them: from a bundle's files, or stitched anew; all alike, however they are cut."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx_ir as ir
from stageline.models.errors import BundleError
from stageline.runtime.bundle.crossing import Crossing
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import Stage
from stageline.runtime.bundle.recut import plan_stages
from stageline.runtime.bundle.stitch import stitch
from stageline.runtime.devices import spread
from stageline.runtime.engines import CacheSize, StageFile, WeightDtype, engine_factory, engine_on
from stageline.runtime.stages.lanes import PipelineStage


@dataclass(frozen=True)
class StageSet:
    """Stages to be opened on `threads` processors in all (None: all this process may use), or each on its own one of
    `devices`. For those of a bundle, `layers` has the blocks of each."""

    stages: tuple[PipelineStage, ...]
    threads: int | None = None
    devices: tuple[str, ...] | None = None
    bundle: Bundle | None = None
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Opener:
    """What the engines of all stages are opened with. `devices` are given to the stages in turn."""

    engine: str
    devices: tuple[str, ...]
    cache: CacheSize | None
    quantise: WeightDtype | None

    def as_cut(self, bundle: Bundle, threads: int | None) -> StageSet:
        """The stages that the bundle has on disk."""
        stages = bundle.manifest.stages
        places = self._places(len(stages))
        opened = [
            self._stage(number, stage, bundle.path / stage.file, bundle, place)
            for number, (stage, place) in enumerate(zip(stages, places, strict=True))
        ]
        layers = tuple(stage.last_block - stage.first_block + 1 for stage in stages)
        return StageSet(tuple(opened), threads, places, bundle, layers)

    @contextmanager
    def recut(self, bundle: Bundle, stages: int | Sequence[int], threads: int | None) -> Iterator[StageSet]:
        """The bundle cut as `stages` says (see `bundle.plan_stages`). On disk it stays as it is: the graphs lie in a
        folder aside, which lasts as long as the context, so open the engines in it.

        StagelineError where it does not fit the model's blocks, BundleError where the graphs cannot be written.
        """
        parts = bundle.parts()
        counts = plan_stages(bundle.manifest, parts, stages)
        on_disk = self.as_cut(bundle, threads)
        if tuple(counts) == on_disk.layers:  # their engines may have been built ahead
            yield on_disk
            return
        plan = Crossing.of(bundle.manifest, parts, counts)
        with tempfile.TemporaryDirectory(prefix="stageline-") as folder:
            opened, places = [], self._places(len(counts))
            for number in range(len(counts)):
                model, stage = stitch(plan, number, bundle.tensors, bundle.path)
                file = Path(folder) / stage.file
                try:
                    file.write_bytes(ir.to_proto(model).SerializeToString())
                except OSError as error:
                    raise BundleError(f"cannot write a stage to {file}: {error.strerror}") from error
                opened.append(self._stage(number, stage, file, bundle, places[number]))
            yield StageSet(tuple(opened), threads, places, bundle, tuple(counts))

    def _places(self, stages: int) -> tuple[str, ...]:
        return tuple(spread(self.devices[:stages], stages))

    def _stage(self, number: int, stage: Stage, file: Path, bundle: Bundle, device: str) -> PipelineStage:
        opening = StageFile(number, file, bundle.path, stage.caches)
        return PipelineStage(
            tuple(spec.name for spec in stage.inputs),
            tuple(spec.name for spec in stage.outputs),
            partial(engine_factory(engine_on(self.engine, device)), opening, cache=self.cache, quantise=self.quantise),
        )


def check_same_model(running: Bundle, new: Bundle) -> None:
    """BundleError unless `new` differs from `running` in its weights only: it can then take over a running pipeline."""
    a, b = running.manifest, new.manifest
    shapes = [{name: tuple(entry.shape) for name, entry in bundle.tensors.items()} for bundle in (running, new)]
    unlike = next((name for name, shape in shapes[0].items() if shapes[1].get(name) != shape), None)
    for what, old, other in (
        ("architecture", a.architecture, b.architecture),
        ("number of blocks", a.blocks, b.blocks),
        ("task", a.task, b.task),
        ("vocabulary", a.vocabulary, b.vocabulary),
        ("most positions", a.max_positions, b.max_positions),
        (f"shape of {unlike}", shapes[0].get(unlike or ""), shapes[1].get(unlike or "")),
        ("inputs", [spec.name for spec in a.inputs], [spec.name for spec in b.inputs]),
        ("outputs", [spec.name for spec in a.outputs], [spec.name for spec in b.outputs]),
        ("KV cache", a.cached, b.cached),
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
    return None if text is None else f"{text.eos_ids} {digests[text.tokenizer]}"
