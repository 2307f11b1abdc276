"""Eject a bundle's stages into a folder: models, samples, and the command lines that use them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from polygraphy.comparator import IterationResult, RunResults
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER
from stageline.exporter.eject.lines import Lines, lines_of, readme
from stageline.exporter.eject.model import write_model
from stageline.exporter.eject.samples import Sample, Sampler
from stageline.models.new_folder import new_folder
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.engines import StageFile
from stageline.runtime.engines.tensorrt.lower import Precision, float32_nodes, lower

CAPACITY = 64
_SEED = 0


@dataclass(frozen=True)
class EjectedStage:
    """A stage's files in the folder, and the command lines that use them there."""

    stage: int
    model: str
    weights: str
    weight_bytes: int
    inputs: str
    outputs: str
    lines: Lines


def eject(
    bundle: Bundle, target: Path, precision: Precision, capacity: int, progress: Callable[[str], None]
) -> list[EjectedStage]:
    """Write every stage of `bundle` into the new folder `target`, which appears complete or not at all.

    A stage is the graph that TensorRT gets for `precision`, with caches of `capacity` tokens. Its samples' outputs are
    computed in float32. StagelineError if a stage cannot be lowered, or the folder cannot be written.
    """
    sampler = Sampler(bundle, capacity, _SEED)
    count = len(bundle.manifest.stages)
    ejected = []
    with new_folder(target) as folder:
        for number, stage in enumerate(bundle.manifest.stages):
            progress(f"stage {number + 1} of {count}: weights")
            name = f"stage{number}"
            file = StageFile(number, bundle.path / stage.file, bundle.path, stage.caches)
            wide = float32_nodes(bundle.manifest, precision)
            lowered = lower(file, precision, capacity, stripped=False, wide=wide)
            write_model(lowered, folder, name)
            progress(f"stage {number + 1} of {count}: samples")
            samples = sampler.samples(number)
            _write_samples(folder, name, samples)
            ejected.append(
                EjectedStage(
                    number,
                    f"{name}.onnx",
                    f"{name}.weights",
                    (folder / f"{name}.weights").stat().st_size,
                    f"{name}.inputs.json",
                    f"{name}.outputs.json",
                    lines_of(name, lowered, samples, precision),
                )
            )
        (folder / "README.md").write_text(readme(bundle, precision, [stage.lines for stage in ejected]))
    return ejected


def _write_samples(folder: Path, name: str, samples: list[Sample]) -> None:
    """Write what `polygraphy run` takes for --load-inputs and --load-outputs."""
    with G_LOGGER.verbosity(G_LOGGER.ERROR):
        save_json([dict(sample.inputs) for sample in samples], str(folder / f"{name}.inputs.json"))
        results = [IterationResult(dict(sample.outputs), runner_name="stageline") for sample in samples]
        RunResults([("stageline", results)]).save(str(folder / f"{name}.outputs.json"))
