"""The pipeline: a bundle's stages open and running, for batches and for generation.

with Pipeline.open("bundles/minilm") as pipeline:
    outputs = pipeline.run({"input_ids": ids})  # ids: int64 [batch, length]

with Pipeline.open("bundles/smollm2") as pipeline:
    for piece in pipeline.generate("The capital of France is", max_tokens=8):
        print(piece, end="")
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack, overload

import numpy as np
from numpy.typing import NDArray
from stageline.models.errors import RequestError
from stageline.models.tokenizer import TextEncoder
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.cluster.addresses import is_remote
from stageline.runtime.devices import spread
from stageline.runtime.engines import Array, default_device, engine_factory
from stageline.runtime.executor import ChangeoverTimes, Executor
from stageline.runtime.generation.generator import Generator
from stageline.runtime.generation.meter import GenerationStats
from stageline.runtime.generation.request import Completion, GenerationRequest, Sampling
from stageline.runtime.generation.spelling import Spelling
from stageline.runtime.generation.stream import Generation
from stageline.runtime.generation.text_model import TextModel, open_encoder
from stageline.runtime.images import Picture, pixel_values
from stageline.runtime.options import OpenKeywords, PipelineOptions
from stageline.runtime.scores import scores
from stageline.runtime.stages.lanes import PipelineStage, StageStats
from stageline.runtime.stages.opening import Opener, StageSet
from stageline.runtime.stages.recorder import Recorder
from stageline.runtime.times import Histogram

if TYPE_CHECKING:
    from stageline.runtime.generation.chat_template import ChatTemplate
    from stageline.runtime.rebalance.rebalancer import Rebalancer, RebalanceStats

__all__ = ["Pipeline", "PipelineOptions", "PipelineStage", "PipelineStats", "StageStats"]


@dataclass(frozen=True)
class PipelineStats:
    """What a pipeline did since it opened. `in_flight` counts unfinished batches, those `queued` (no stage has started
    on them) included; `latency` are the times of those that are done, from submission; `generation` is None for a model
    that does not generate.

    `layers` are the blocks of each stage of the current cut, `last_changeover` is the last of `changeovers` to other
    stages; `rebalance` is None if nobody watches the stages.
    """

    open_s: float
    stages: tuple[StageStats, ...]
    done: int
    failed: int
    cancelled: int
    in_flight: int
    queued: int
    latency: Histogram
    generation: GenerationStats | None = None
    layers: tuple[int, ...] = ()
    changeovers: int = 0
    last_changeover: ChangeoverTimes | None = None
    rebalance: "RebalanceStats | None" = None
    recoveries: int = 0
    """How often lost stages were opened again."""


class Pipeline:
    """A model running as stages. Thread-safe; owns its threads, engines and caches until `close()`.

    A batch is cut into micro-batches; rows padded on the right lose their padding on the way, and outputs are zero
    there.
    """

    def __init__(self, executor: Executor, rebalancer: "Rebalancer | None" = None) -> None:
        """Made of its parts, which it owns from now on, by `open` and `of_stages`."""
        self._executor, self._rebalancer = executor, rebalancer
        self._template: ChatTemplate | None = None
        self._template_lock = threading.Lock()  # guards the template

    @classmethod
    def open(cls, bundle: str | Path, options: PipelineOptions | None = None, **keywords: Unpack[OpenKeywords]) -> Self:
        """Open a bundle with `options`; keywords, named like its fields, replace some of them.

        RequestError if an option is out of its range, BundleError if the bundle is missing or broken, EngineError if
        the engine is not there or refuses.
        """
        options = replace(options or PipelineOptions(), **keywords)
        outside = options.isolate or any(map(is_remote, options.devices or ()))
        if outside and options.rebalance != "off":
            raise RequestError("rebalance is for stages in this process; leave it off where devices are elsewhere")
        opener = Opener(Bundle.open(Path(bundle)), options)
        manifest, cache = opener.bundle.manifest, opener.cache
        engine_factory(options.engine)  # EngineError for a name that is not known, before all else
        spread(options.devices or [default_device(options.engine)], len(manifest.stages))  # the same: RequestError
        text_model = TextModel.of(opener.bundle) if cache else None
        executor = Executor.open(Signature.of(manifest), opener.on_disk(), options, text_model, cache)
        if options.rebalance == "off":
            return cls(executor)
        try:
            from stageline.runtime.rebalance.rebalancer import Rebalancer  # imports the planner

            return cls(executor, Rebalancer(executor, options.rebalance))
        except BaseException:
            executor.close()
            raise

    @classmethod
    def of_stages(cls, signature: Signature, stages: Sequence[PipelineStage], **keywords: Unpack[OpenKeywords]) -> Self:
        """Open stages that are not of a bundle, for batches only, with the keywords `threads`, `queue`, `micro_batch`
        and `devices`, one for each stage. BundleError if the stages do not compute the outputs of `signature`."""
        options = PipelineOptions(**keywords)
        return cls(Executor.open(signature, StageSet(tuple(stages), options.threads, options.devices), options))

    # Batches.

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """The named outputs (None: all) for these inputs, each of the shape and dtype the signature says.

        RequestError if they do not fit the signature, EngineError if a stage fails.
        """
        return self.submit(inputs, outputs).result()

    async def arun(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """`run` for coroutines: waits for a free place and for the result without blocking the event loop.

        Cancelling the awaiting task cancels the request.
        """
        return await self._executor.batches.arun(inputs, outputs)

    def classify(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> NDArray[np.float64]:
        """A text classifier's scores of texts, or of each text with its pair (a reranker's question and text).

        float64 [texts, labels], by the manifest's `activation`, in the order of its `labels`. RequestError if this
        bundle does not classify texts, or a text does not fit.
        """
        manifest = self.bundle.manifest
        if manifest.task != "text-classification" or self.encoder is None:
            raise RequestError(f"this bundle does not classify texts: its task is {manifest.task}; use Pipeline.run")
        encoded = self.encoder.encode(texts, pairs)
        given = {spec.name: encoded[spec.name] for spec in self.signature.inputs}
        return scores(self.run(given, ["logits"])["logits"], manifest.activation)

    def classify_images(self, images: Sequence[Picture]) -> NDArray[np.float64]:
        """An image classifier's scores of images: paths, or Pillow's. float64 [images, labels], as `classify` gives
        them. RequestError if this bundle classifies no image files, or one cannot be read."""
        manifest = self.bundle.manifest
        if manifest.task != "image-classification" or manifest.image is None:
            raise RequestError(
                f"this bundle classifies no image files: its task is {manifest.task}"
                + ("; give pixel_values to Pipeline.run" if manifest.task == "image-classification" else "")
            )
        given = {"pixel_values": pixel_values(images, manifest.image)}
        return scores(self.run(given, ["logits"])["logits"], manifest.activation)

    @overload
    def submit(
        self,
        request: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        wait: bool = True,
        timeout: float | None = None,
    ) -> "Future[dict[str, Array]]": ...
    @overload
    def submit(
        self, request: GenerationRequest, *, wait: bool = True, timeout: float | None = None
    ) -> "Future[Completion]": ...
    def submit(
        self,
        request: Mapping[str, Array] | GenerationRequest,
        outputs: Sequence[str] | None = None,
        *,
        wait: bool = True,
        timeout: float | None = None,
    ) -> "Future[dict[str, Array]] | Future[Completion]":
        """Queue a request. The future of a batch gives what `run` returns; do not change its arrays before it is done.

        Where the queue is full it waits, at most `timeout` seconds; QueueFullError after them, or at once without
        `wait`. RequestError is raised here, before anything is queued. Cancelling the future works until it is done.
        Its callbacks run on one of the pipeline's threads: keep them short.
        """
        if isinstance(request, GenerationRequest):
            return self.start(request, wait=wait, timeout=timeout).future
        return self._executor.batches.submit(request, outputs, wait, timeout)

    # Generation.

    def start(self, request: GenerationRequest, *, wait: bool = True, timeout: float | None = None) -> Generation:
        """Queue a request that generates; `wait` and `timeout` as in `submit`. Iterate over what it returns."""
        return self._generator.submit(request, wait, timeout)

    def prepare(self, request: GenerationRequest) -> None:
        """Compile the structure that a request's texts must have, which may take a second the first time; `start` does
        it otherwise. RequestError where it cannot be followed."""
        self._generator.prepare(request)

    async def astart(self, request: GenerationRequest) -> Generation:
        """`start` for coroutines: waits for a free place without blocking the event loop."""
        return await self._generator.submit_async(request)

    def generate(
        self, prompt: str | Sequence[int], *, deadline_s: float | None = None, priority: int = 0, **sampling: Any
    ) -> Generation:
        """Continue a prompt; keywords as in `Sampling`. Iterate over it (`for`, `async for`), or take its `.result()`.

        Greedy unless a `temperature` is given; what else is not given is as the checkpoint says. RequestError for what
        cannot be run; waits while the queue is full.
        """
        return self.start(self.request(prompt, deadline_s=deadline_s, priority=priority, **sampling))

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], *, deadline_s: float | None = None, **sampling: Any
    ) -> Completion:
        """The reply to `messages` ({"role": ..., "content": ...}), by the checkpoint's own chat template."""
        request = self.request(self.chat_prompt(messages), deadline_s=deadline_s, **sampling)
        return await (await self.astart(request))

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> tuple[int, ...]:
        """The token ids that the chat template makes of messages; `variables` (`tools`, ...) are given to it. What
        they spell is text: only the template's own special tokens become such tokens.

        BundleError where the bundle has no chat template.
        """
        generator = self._generator
        ids = self.chat_ids(messages, **variables)
        return tuple(generator.text_model.prompt_ids(ids, generator.capacity))

    def chat_ids(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """The token ids of `chat_prompt`, however many they are. RequestError where they are plainly more than fit."""
        spelling = self._spelling
        if spelling is None:
            raise RequestError("this bundle has no tokenizer; give the prompt as token ids")
        text = self.chat_text(spelling.broken(messages), **spelling.broken(variables))
        assert self.encoder is not None
        if self.capacity is not None and (least := self.encoder.least(text)) > self.capacity:
            raise RequestError(f"the chat has {least} tokens at least, {self.capacity} fit; shorten it")
        return spelling.ids(text)

    def chat_text(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt of `chat_prompt` as a text, its special tokens included."""
        return self.chat_template.render(messages, **variables)

    @property
    def chat_template(self) -> "ChatTemplate":
        """The bundle's, owned by the pipeline. BundleError where it has none."""
        from stageline.runtime.generation.chat_template import ChatTemplate  # imports jinja2

        with self._template_lock:
            self._executor.check_open()
            if self._template is None:
                self._template = ChatTemplate.open(self.bundle.path / "tokenizer")
            return self._template

    def request(
        self, prompt: str | Sequence[int], *, deadline_s: float | None = None, priority: int = 0, **sampling: Any
    ) -> GenerationRequest:
        """A request to be submitted; keywords as in `Sampling`, lists allowed. RequestError where one is wrong."""
        text = prompt if isinstance(prompt, str) else tuple(prompt)
        return GenerationRequest(text, Sampling.of(sampling), deadline_s, priority)

    @cached_property
    def encoder(self) -> TextEncoder | None:
        """The bundle's tokenizer, if it has one."""
        generator, bundle = self._executor.generator, self._executor.cut.bundle
        if generator is not None:
            return generator.text_model.encoder
        return open_encoder(bundle) if bundle is not None else None

    @cached_property
    def _spelling(self) -> Spelling | None:
        return None if self.encoder is None else Spelling(self.encoder)

    @property
    def bundle(self) -> Bundle:
        """What was opened, or swapped in since."""
        return self._executor.opener.bundle

    @property
    def signature(self) -> Signature:
        """The inputs that a batch has, and the outputs that it may ask for."""
        return self._executor.batches.signature

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks of each stage, of the current cut; empty for a pipeline that was made of stages."""
        return self._executor.cut.layers

    @property
    def capacity(self) -> int | None:
        """Tokens that a prompt and its continuation may have together; None for a model that does not generate."""
        return self._executor.generator.capacity if self._executor.generator else None

    # Other stages while it serves.

    def recut(
        self, stages: int | Sequence[int], *, threads: int | None = None, devices: Sequence[str] | None = None
    ) -> ChangeoverTimes:
        """Switch to another cut of the model: `stages` of even cost, or stages of these numbers of blocks, on `threads`
        cores in all, on `devices` in turn (None: as before). The bundle on disk does not change.

        The new stages are opened beside the old ones, so that for a moment their weights are in memory twice; then
        generation switches between two steps and hands its caches on, and batches that were queued before finish where
        they are. Requests notice a pause at most. Returns when the old stages are closed. Calls at the same time take
        turns.

        If anything fails the old stages continue: StagelineError if the cut does not fit, EngineError if a stage
        does not open or cannot take a cache (GPUs keep caches in another precision), RequestError if a device
        is unknown, the pipeline is closed, or a callback on its threads calls this.
        """
        return self._executor.recut(stages, threads, devices)

    def swap_weights(self, bundle: str | Path) -> ChangeoverTimes:
        """Switch to the weights of another bundle of the same model, with the current cut.

        Batches that were queued and requests that had begun to generate finish with the old weights; those that come
        later, or still wait for a slot, start with the new ones when those have ended. What the caches hold is
        forgotten. Errors as in `recut`, and BundleError for a bundle that is broken or of another model.
        """
        return self._executor.swap_weights(Bundle.open(Path(bundle)))

    # All of it.

    @property
    def broken(self) -> str | None:
        """Why it answers nothing any more, if a bug has ended one of its threads; else None, also once it is closed."""
        return self._executor.broken

    @property
    def recovering(self) -> str | None:
        """Why nothing is computed for the moment, while lost stages are opened again; requests wait."""
        recovery = self._executor.recovery
        return None if recovery is None else recovery.reason

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._executor.closed

    def stats(self) -> PipelineStats:
        """A snapshot of the counters since the pipeline opened; those of stages count since these stages opened."""
        executor = self._executor
        batches, lanes = executor.batches.stats(), executor.lanes
        stages_open_s = lanes.open_s
        stages = lanes.stats(stages_open_s)
        return PipelineStats(
            executor.earlier_s + stages_open_s,
            stages,
            batches.done,
            batches.failed,
            batches.cancelled,
            batches.in_flight,
            batches.queued,
            batches.latency,
            executor.generator.stats(stages) if executor.generator else None,
            executor.cut.layers,
            executor.changeovers,
            executor.last_changeover,
            self._rebalancer.stats() if self._rebalancer else None,
            executor.recovery.recovered if executor.recovery else 0,
        )

    def record(self, recorder: Recorder | None) -> None:
        """Report to `recorder`, which is borrowed, what stages and requests do from now on (None: to nobody)."""
        self._executor.record(recorder)

    def close(self) -> None:
        """Fail what is unfinished with RequestError, let each stage finish what it runs, and free engines and threads.

        May be called again, and from any thread; returns when the workers have ended (where a future's callback calls
        it on one of them, without waiting for them).
        """
        if self._rebalancer is not None:
            self._rebalancer.stop()
        own_thread = self._executor.is_own_thread()
        self._executor.close()
        if self._rebalancer is not None and not own_thread:
            self._rebalancer.join()
        with self._template_lock:
            if self._template is not None:
                self._template.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _generator(self) -> Generator:
        if self._executor.generator is None:
            reason = self.bundle.manifest.no_generation_reason
            raise RequestError(f"this bundle does not generate: {reason}; run batches with Pipeline.run")
        return self._executor.generator
