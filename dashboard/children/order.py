"""What a page asks of `stageline bench`: one object gives the command shown, the checks and the process."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from stageline.dashboard.addresses import service_address
from stageline.dashboard.settings import as_typed
from stageline.models.errors import RequestError, StagelineError
from stageline.models.user_cache import user_cache
from stageline.runtime.bench import options
from stageline.runtime.bench.records import OURS, Load
from stageline.runtime.bench.sweep import Sweep
from stageline.runtime.bundle.folder import MANIFEST, file_sha256, read_manifest
from stageline.runtime.bundle.recut import recut_copy
from stageline.runtime.options import PipelineOptions

_WARM_UP_S, _OPEN_S = 2.0, 4.0  # of each contender: stageline bench's default, and about what opening takes
_TORCH = ("torch", "torch-compile")
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class Order:
    """What to measure. Empty texts and tuples leave an option out; `stages`: their number, or the blocks of each; None:
    the bundle's own. Numbers are as the visitor typed them, None where nothing is. A `sweep` chooses its loads itself;
    `check`: measure quality, too."""

    bundle: Path
    stages: int | tuple[int, ...] | None = None
    scenarios: tuple[str, ...] = ()
    concurrency: str = ""
    rates: str = ""
    seconds: float | None = 5.0
    repeats: int | None = 3
    new_tokens: int | None = None
    slo: str = ""
    baselines: tuple[str, ...] = ()
    checkpoint: str = ""
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)
    sweep: bool = False
    check: bool = False

    def problems(self, allowed: Collection[str] = ()) -> list[str]:
        """What `stageline bench` would refuse, a line each; and baselines at addresses that are neither on this machine
        nor `allowed`."""
        return list(self._problems(allowed))

    def _problems(self, allowed: Collection[str]) -> Iterator[str]:
        if self.seconds is None or not 0.1 <= self.seconds <= 3600:
            yield f"seconds per repeat: {_typed(self.seconds)}, give 0.1 to 3600"
        if self.repeats is None or not 1 <= self.repeats <= 100:
            yield f"repeats: {_typed(self.repeats)}, give 1 to 100"
        if self.pipeline.threads is not None and self.pipeline.threads < 1:
            yield f"threads: {self.pipeline.threads}, give 1 or more, or nothing for all"
        if self.new_tokens is not None and not 1 <= self.new_tokens <= 4096:
            yield f"new tokens per request: {self.new_tokens}, give 1 to 4096"
        given = bool(self.scenarios or self.concurrency.strip() or self.rates.strip())
        if not given and not self.sweep:
            yield "no load is chosen: pick a scenario, or enter concurrencies or rates"
        if given and self.sweep:
            yield "a sweep chooses its loads: leave scenarios, concurrencies and rates empty"
        if self.pipeline.quantise and self.pipeline.engine == "tensorrt":
            yield "the engine tensorrt has the precision that it was built in: do not quantise"
        try:
            self.loads()
        except RequestError as error:
            yield str(error)
        try:
            options.slo(self.slo)
        except RequestError as error:
            yield f"SLO: {error}"
        for name in self.baselines:
            if name in _TORCH and not self.checkpoint:
                yield f"baseline {name} needs the checkpoint, for torch"
            if "://" in name:
                parts = urlsplit(name)
                try:
                    service_address(f"{parts.scheme}://{parts.netloc}", allowed)
                except StagelineError as error:
                    yield f"baseline {name}: {error}"
        # A name of the Hub would make this machine fetch it, with its owner's token.
        if self.checkpoint and not Path(self.checkpoint).exists():
            yield f"checkpoint {self.checkpoint}: there is no such file or folder"

    def loads(self) -> tuple[Load, ...]:
        """The loads that are chosen, none for a sweep. RequestError for one that is none."""
        if self.sweep:
            return ()
        concurrencies = _numbers("concurrency", self.concurrency, int, "1,4,16")
        rates = _numbers("rate", self.rates, float, "5,10,20")
        return options.loads(self.scenarios, None, concurrencies, rates, False, Load("Rate"))

    def seconds_in_all(self) -> float:
        """About how long it takes, in seconds, if nothing is wrong with it, without the check of quality. Of a sweep:
        what its own progress begins with."""
        contenders, each_s = (OURS, *self.baselines), self.seconds or 0.0
        repeats = len(self.loads()) * (self.repeats or 0)
        if self.sweep:
            slo = options.slo(self.slo)
            repeats = Sweep(contenders, Load("Rate"), slo, self.repeats or 0, each_s).expected
        return len(contenders) * (_OPEN_S + _WARM_UP_S + repeats * each_s)

    @property
    def measured(self) -> Path:
        """The bundle, or the folder of its copy with other stages."""
        now = tuple(read_manifest(self.bundle).layers)
        if self.stages is None or self.stages in (now, len(now)):
            return self.bundle
        stages = f"{self.stages}-stages" if isinstance(self.stages, int) else "-".join(map(str, self.stages))
        # With the bundle's digest: a copy of a bundle that has changed is another.
        digest = file_sha256(self.bundle / MANIFEST)[:8]
        return user_cache() / "cuts" / digest / f"{self.bundle.name}-{stages}"

    def arguments(self) -> list[str]:
        """The arguments of `stageline bench`."""
        name = [] if self.measured == self.bundle else ["--name", self.bundle.name]
        return [as_typed(self.measured), *self._options(), *name]

    def commands(self) -> list[list[str]]:
        """What to type for the same, one `stageline` command after the other."""
        bench = ["stageline", "bench", *self.arguments()]
        if self.measured == self.bundle:
            return [bench]
        assert self.stages is not None
        cut = ["--stages", str(self.stages)] if isinstance(self.stages, int) else ["--layers", _joined(self.stages)]
        recut = ["stageline", "recut", as_typed(self.bundle), *cut, "--output", as_typed(self.measured)]
        return [bench] if self.measured.exists() else [recut, bench]

    def check_ready(self) -> None:
        """StagelineError if the bundle is not there any more."""
        if not (self.bundle / MANIFEST).is_file():
            raise StagelineError(f"the bundle {as_typed(self.bundle)} is gone; choose another")

    def cut(self) -> None:
        """Make the copy with other stages, where there is none yet. StagelineError if the stages do not fit the model;
        OSError if the cache cannot be written."""
        folder = self.measured
        if folder == self.bundle or folder.exists():
            return
        assert self.stages is not None
        recut_copy(self.bundle, folder, self.stages)

    def _options(self) -> list[str]:
        found = ["--sweep"] if self.sweep else []
        found += ["--seconds", f"{self.seconds:g}", "--repeats", str(self.repeats)]
        given = {
            "--scenario": ",".join(self.scenarios),
            "--concurrency": self.concurrency.replace(" ", ""),
            "--rate": self.rates.replace(" ", ""),
            "--new-tokens": self.new_tokens,
            "--slo": self.slo.replace(" ", ""),
            "--checkpoint": self.checkpoint if set(_TORCH) & set(self.baselines) else "",
            "--engine": self.pipeline.engine if self.pipeline.engine != PipelineOptions.engine else "",
            "--threads": self.pipeline.threads,
            "--quantise": self.pipeline.quantise,
        }
        found += [word for name, value in given.items() if value for word in (name, str(value))]
        found += ["--check"] if self.check else []
        return found + [word for name in self.baselines for word in ("--baseline", name)]


def _numbers(what: str, text: str, kind: Callable[[str], _Number], example: str) -> list[_Number]:
    try:
        return [kind(number) for number in text.split(",")] if text.strip() else []
    except ValueError:
        raise RequestError(f"{what} {text.strip()!r} is not a list of numbers; give some like {example}") from None


def _joined(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def _typed(value: float | None) -> str:
    return "nothing" if value is None else f"{value:g}"
