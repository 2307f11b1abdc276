"""The shapes an engine is built for, from the workload that the pipeline was planned for."""

from collections.abc import Iterable

from stageline.models.errors import EngineError
from stageline.runtime.bundle.manifest import BATCH, LENGTH, PICKS, Manifest, TensorSpec
from stageline.runtime.engines.tensorrt.records import OptimizationProfile, SizeRange
from stageline.runtime.workload import Workload


def profiles_of(manifest: Manifest, workload: Workload) -> tuple[OptimizationProfile, ...]:
    """The optimisation profiles of a bundle's engines.

    A model without caches has one, `rows`: up to `workload.micro_batch` rows of any length that the model accepts,
    tuned for full batches of `workload.length` tokens. A model with caches has three: `decode`, one token for each of
    up to `workload.slots` rows; `prefill`, chunks of up to `workload.length` tokens, with the logits of one token per
    row; and `rows`, the same with all logits. Only `rows` needs memory for them.
    """
    if not manifest.cached:
        max_length = max(workload.length, (manifest.text and manifest.text.max_length) or 0)
        max_length = min(max_length, manifest.max_positions or max_length)
        length = SizeRange(min=1, opt=min(workload.length, max_length), max=max_length)
        return (OptimizationProfile(name="rows", sizes={BATCH: _up_to(workload.micro_batch), LENGTH: length}),)
    batch, chunk = _up_to(workload.slots), _up_to(min(workload.length, workload.capacity))
    one, at_most_one = SizeRange(min=1, opt=1, max=1), SizeRange(min=0, opt=1, max=1)
    return (
        OptimizationProfile(name="decode", sizes={BATCH: batch, LENGTH: one, PICKS: at_most_one}),
        OptimizationProfile(name="prefill", sizes={BATCH: batch, LENGTH: chunk, PICKS: at_most_one}),
        OptimizationProfile(name="rows", sizes={BATCH: batch, LENGTH: chunk, PICKS: chunk}),
    )


def narrowed(profiles: Iterable[OptimizationProfile], inputs: Iterable[TensorSpec]) -> tuple[OptimizationProfile, ...]:
    """The profiles with only the free dimensions of a stage's inputs; equal ones become one."""
    free = {size for spec in inputs for size in spec.shape if isinstance(size, str)}
    result: dict[str, OptimizationProfile] = {}
    for profile in profiles:
        for name in free - set(profile.sizes):
            raise EngineError(
                f"inputs have the free dimension {name!r}; engines are built for {', '.join(profile.sizes)}"
            )
        kept = {name: sizes for name, sizes in profile.sizes.items() if name in free}
        result.setdefault(
            str(sorted((n, s.min, s.opt, s.max) for n, s in kept.items())),
            profile.model_copy(update={"sizes": kept}),
        )
    return tuple(result.values())


def shapes(spec: TensorSpec, profile: OptimizationProfile) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The minimum, optimum and maximum shape of an input in a profile."""
    sizes = [profile.sizes[s] if isinstance(s, str) else SizeRange(min=s, opt=s, max=max(s, 1)) for s in spec.shape]
    return tuple(s.min for s in sizes), tuple(s.opt for s in sizes), tuple(s.max for s in sizes)


def _up_to(size: int) -> SizeRange:
    return SizeRange(min=1, opt=size, max=size)
