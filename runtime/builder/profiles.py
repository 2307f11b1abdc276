"""The shapes an engine is built for, from the load that the pipeline was planned for."""

from collections.abc import Iterable

from stageline.models.errors import EngineError
from stageline.runtime.bundle.manifest import BATCH, LENGTH, PICKS, Manifest, TensorSpec
from stageline.runtime.engines.tensorrt.records import OptimizationProfile, SizeRange
from stageline.runtime.workload import Workload


def profiles_of(manifest: Manifest, load: Workload) -> tuple[OptimizationProfile, ...]:
    """The profiles of a bundle's engines.

    A model without caches has one, `rows`: up to `load.micro_batch` rows of up to what the model can place, for full
    batches of `load.length` tokens. A model with caches has three: `decode`, a token for each of up to `load.slots`
    rows; `prefill`, chunks of up to `load.length` tokens, of whose logits one a row is wanted; and `rows`, the same
    with all logits, which alone needs memory for them.
    """
    if not manifest.cached:
        longest = max(load.length, (manifest.text and manifest.text.max_length) or 0)
        longest = min(longest, manifest.max_positions or longest)
        length = SizeRange(least=1, best=min(load.length, longest), most=longest)
        return (OptimizationProfile(name="rows", sizes={BATCH: _up_to(load.micro_batch), LENGTH: length}),)
    batch, chunk = _up_to(load.slots), _up_to(min(load.length, load.capacity))
    one, at_most_one = SizeRange(least=1, best=1, most=1), SizeRange(least=0, best=1, most=1)
    return (
        OptimizationProfile(name="decode", sizes={BATCH: batch, LENGTH: one, PICKS: at_most_one}),
        OptimizationProfile(name="prefill", sizes={BATCH: batch, LENGTH: chunk, PICKS: at_most_one}),
        OptimizationProfile(name="rows", sizes={BATCH: batch, LENGTH: chunk, PICKS: chunk}),
    )


def narrowed(profiles: Iterable[OptimizationProfile], inputs: Iterable[TensorSpec]) -> tuple[OptimizationProfile, ...]:
    """The profiles with the dimensions that a stage's inputs have; those that then say the same become one."""
    free = {size for spec in inputs for size in spec.shape if isinstance(size, str)}
    result: dict[str, OptimizationProfile] = {}
    for profile in profiles:
        for name in free - set(profile.sizes):
            raise EngineError(
                f"inputs have the free dimension {name!r}; engines are built for {', '.join(profile.sizes)}"
            )
        kept = {name: span for name, span in profile.sizes.items() if name in free}
        result.setdefault(
            str(sorted((n, s.least, s.best, s.most) for n, s in kept.items())),
            profile.model_copy(update={"sizes": kept}),
        )
    return tuple(result.values())


def shapes(spec: TensorSpec, profile: OptimizationProfile) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The least, best and largest shape of an input in a profile."""
    sizes = [profile.sizes[s] if isinstance(s, str) else SizeRange(least=s, best=s, most=max(s, 1)) for s in spec.shape]
    return tuple(s.least for s in sizes), tuple(s.best for s in sizes), tuple(s.most for s in sizes)


def _up_to(most: int) -> SizeRange:
    return SizeRange(least=1, best=most, most=most)
