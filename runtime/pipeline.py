"""The pipeline: a bundle's stages open and running, for batches and for generation.

with Pipeline.open("bundles/minilm") as pipeline:
    outputs = pipeline.run({"input_ids": ids})  # ids: int64 [batch, length]

with Pipeline.open("bundles/smollm2") as pipeline:
    for piece in pipeline.generate("The capital of France is", max_tokens=8):
        print(piece, end="")
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack, overload

from stageline.models.errors import BundleError, RequestError
from stageline.models.tokenizer import TextEncoder
from stageline.runtime.admission import Admission
from stageline.runtime.batching.batches import Batches
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.devices import spread
from stageline.runtime.engines import Array, default_device, engine_factory
from stageline.runtime.executor import Executor, Switched, generation_hops
from stageline.runtime.generation.generator import Generator
from stageline.runtime.generation.meter import GenerationStats
from stageline.runtime.generation.request import Completion, GenerationRequest, Sampling
from stageline.runtime.generation.stream import Generation
from stageline.runtime.generation.text_model import TextModel
from stageline.runtime.options import OpenKeywords, PipelineOptions
from stageline.runtime.stages.lanes import Lanes, PipelineStage, StageStats
from stageline.runtime.stages.opening import Opener, StageSet, check_same_model
from stageline.runtime.stages.recorder import Recorder
from stageline.runtime.stages.route import route

if TYPE_CHECKING:
    from stageline.runtime.generation.chat import ChatTemplate
    from stageline.runtime.rebalance.rebalancer import Rebalancer, RebalanceStats

__all__ = ["Pipeline", "PipelineOptions", "PipelineStage", "PipelineStats", "StageStats"]


@dataclass(frozen=True)
class PipelineStats:
    """What a pipeline did since it opened. `in_flight` counts unfinished batches, those `queued` (no stage has started
    on them) included; `generation` is None for a model that does not generate.

    `layers` are the blocks of each stage as they are cut now, `switch` the last of `switches` to other stages;
    `rebalance` is None where nobody watches the stages.
    """

    open_s: float
    stages: tuple[StageStats, ...]
    done: int
    failed: int
    cancelled: int
    in_flight: int
    queued: int
    generation: GenerationStats | None = None
    layers: tuple[int, ...] = ()
    switches: int = 0
    switch: Switched | None = None
    rebalance: "RebalanceStats | None" = None


class Pipeline:
    """A model running as stages. Thread-safe; owns its threads, engines and caches until `close()`.

    A batch is cut into micro-batches of at most `micro_batch` rows (None: chosen from the batch and the number of
    stages); rows padded on the right lose their padding on the way, and outputs are zero there. `queue` bounds the
    requests that are not finished, batches and generation each: with fewer than two a stage, stages idle.
    """

    def __init__(
        self,
        signature: Signature,
        stages: Sequence[PipelineStage],
        *,
        threads: int | None = None,
        queue: int = 64,
        micro_batch: int | None = None,
        devices: Sequence[str] | None = None,
    ) -> None:
        """Open all stages, each on its own thread, on `threads` processors in all (None: all this process may use), or
        each on its own one of `devices`.

        EngineError if an engine does not open, BundleError if the stages do not give the outputs of `signature`.
        """
        PipelineOptions(threads=threads, queue=queue, micro_batch=micro_batch)  # RequestError
        self.signature = signature
        names = [(stage.inputs, stage.outputs) for stage in stages]
        route(names, [spec.name for spec in signature.graph_inputs], signature.check_outputs(None))
        lanes = Lanes(stages, threads, devices)
        self._batches = Batches(signature, stages, lanes, queue, micro_batch)
        self._serving = Executor(
            lanes, StageSet(tuple(stages), threads, None if devices is None else tuple(devices)), self._batches
        )
        self._generator: Generator | None = None
        self._generator_slots = Admission(queue)
        self._opener: Opener | None = None
        self._rebalancer: Rebalancer | None = None

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        options: PipelineOptions | None = None,
        **keywords: Unpack[OpenKeywords],
    ) -> Self:
        """Open a bundle with `options`; keywords, named like its fields, replace some of them.

        RequestError if an option is out of its range, BundleError if the bundle is missing or broken, EngineError if
        the engine is not there or refuses.
        """
        options = replace(options or PipelineOptions(), **keywords)
        opened = Bundle.open(Path(bundle))
        manifest, engine, threads = opened.manifest, options.engine, options.threads
        cache = options.cache_size(manifest)
        engine_factory(engine)  # EngineError for a name that is not known, before all else
        names = options.devices or [default_device(engine)]
        spread(names, len(manifest.stages))  # the same: RequestError
        opener = Opener(engine, tuple(names), cache, options.quantise)
        stages = opener.as_cut(opened, threads)
        pipeline = cls(
            Signature.of(manifest),
            stages.stages,
            threads=threads,
            queue=options.queue,
            micro_batch=options.micro_batch,
            devices=stages.devices,
        )
        pipeline._serving.cut, pipeline._opener = stages, opener
        if cache is not None:
            hops = generation_hops(stages)
            ends = manifest.text.eos_ids if manifest.text else ()
            logits = next(spec for spec in manifest.outputs if spec.name == "logits")
            try:
                decoder = TextModel(int(logits.shape[-1]), ends, pipeline.encoder)
            except BaseException:  # a broken tokenizer
                pipeline.close()
                raise
            lanes = pipeline._serving.lanes
            pipeline._generator = Generator(lanes, hops, decoder, cache.slots, cache.capacity, options.prefill_chunk)
            pipeline._serving.generator = pipeline._generator
        if options.rebalance != "off":
            from stageline.runtime.rebalance.rebalancer import Rebalancer  # imports the planner

            past = cache.capacity // 4 if cache is not None else 0
            recut = pipeline.recut if options.rebalance == "auto" else None
            pipeline._rebalancer = Rebalancer(pipeline._serving, past, recut, quantise=options.quantise)
        return pipeline

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
        return await self._batches.arun(inputs, outputs)

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
        return self._batches.submit(request, outputs, wait, timeout)

    # Generation.

    def start(self, request: GenerationRequest, *, wait: bool = True, timeout: float | None = None) -> Generation:
        """Queue a request that generates; `wait` and `timeout` as in `submit`. Iterate over what it returns."""
        generator, prompt = self._checked(request)
        self._generator_slots.take(wait, timeout)
        return generator.submit(request, prompt, self._generator_slots.give_back)

    async def astart(self, request: GenerationRequest) -> Generation:
        """`start` for coroutines: waits for a free place without blocking the event loop."""
        generator, prompt = self._checked(request)
        await self._generator_slots.take_async()
        return generator.submit(request, prompt, self._generator_slots.give_back)

    def generate(self, prompt: str | Sequence[int], *, deadline_s: float | None = None, **sampling: Any) -> Generation:
        """Continue a prompt; keywords as in `Sampling`. Iterate over it (`for`, `async for`), or take its `.result()`.

        Greedy unless a `temperature` is given. RequestError for what cannot be run; waits while the queue is full.
        """
        return self.start(self.request(prompt, deadline_s=deadline_s, **sampling))

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], *, deadline_s: float | None = None, **sampling: Any
    ) -> Completion:
        """The reply to `messages` ({"role": ..., "content": ...}), by the checkpoint's own chat template."""
        request = self.request(self.chat_prompt(messages), deadline_s=deadline_s, **sampling)
        return await (await self.astart(request))

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> tuple[int, ...]:
        """The token ids that the chat template makes of messages; `variables` (`tools`, ...) are given to it.

        BundleError where the bundle has no chat template.
        """
        generator = self._generating()
        text = self.chat_text(messages, **variables)
        return tuple(generator.decoder.prompt_ids(text, generator.capacity, special=False))

    def chat_text(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt of `chat_prompt` as a text, its special tokens included."""
        return self._template.render(messages, **variables)

    def request(
        self, prompt: str | Sequence[int], *, deadline_s: float | None = None, **sampling: Any
    ) -> GenerationRequest:
        """A request to be submitted; keywords as in `Sampling`, lists allowed. RequestError where one is wrong."""
        text = prompt if isinstance(prompt, str) else tuple(prompt)
        return GenerationRequest(text, Sampling.of(sampling), deadline_s)

    @cached_property
    def encoder(self) -> TextEncoder | None:
        """The bundle's tokenizer, if it has one."""
        bundle = self._serving.cut.bundle
        if bundle is None or bundle.manifest.text is None:
            return None
        text = bundle.manifest.text
        return TextEncoder.open(bundle.path / text.tokenizer, text.max_length, text.pad_id)

    @property
    def bundle(self) -> Bundle:
        """What was opened, or swapped in since."""
        bundle = self._serving.cut.bundle
        if bundle is None:
            raise BundleError("this pipeline was made of stages, not opened from a bundle; use Pipeline.open")
        return bundle

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks of each stage, as it is cut now; empty for a pipeline that was made of stages."""
        return self._serving.cut.layers

    @property
    def capacity(self) -> int | None:
        """Tokens that a prompt and its continuation may have together; None for a model that does not generate."""
        return self._generator.capacity if self._generator else None

    # Other stages while it serves.

    def recut(
        self, stages: int | Sequence[int], *, threads: int | None = None, devices: Sequence[str] | None = None
    ) -> Switched:
        """Go on with another cut of the model: so many stages, even by their costs, or stages of these numbers of
        blocks, on `threads` processors in all, on `devices` in turn (None: as before). The bundle on disk stays as it
        is.

        The new stages are opened beside the old ones, so that for a moment their weights are in memory twice; then
        generation changes over between two steps, its caches are handed on, and batches that were queued before finish
        where they are. No request notices but by a pause. Returns when the old stages are closed. Calls at the same
        time take turns.

        What fails leaves the stages of before serving: StagelineError where the cut does not fit, EngineError where a
        stage does not open or cannot take a cache as it is (GPUs keep them in another precision), RequestError where
        a device is unknown, the pipeline is closed, or a callback on its threads calls this.
        """
        if threads is not None and threads < 1:
            raise RequestError(f"threads is {threads}; it must be at least 1")
        with self._serving.turn():
            opener = self._reopening()
            if devices is not None:
                spread(devices, stages if isinstance(stages, int) else len(stages))  # RequestError
                opener = replace(opener, devices=tuple(devices))
            with opener.recut(self.bundle, stages, threads or self._serving.cut.threads) as cut:
                switched = self._serving.switch(cut, keep_caches=True)
            self._opener = opener
            return switched

    def swap_weights(self, bundle: str | Path) -> Switched:
        """Go on with the weights of another bundle of the same model, cut as it is now.

        Batches that were queued and requests that had begun to generate are finished with the weights of before; those
        that come later, or still wait for a slot, start with the new ones, when those before them have ended. What the
        caches hold is forgotten. Errors as in `recut`, and BundleError for a bundle that is broken or of another model.
        """
        opener, new = self._reopening(), Bundle.open(Path(bundle))
        check_same_model(self.bundle, new)
        with self._serving.turn():
            now = self._serving.cut
            with opener.recut(new, now.layers, now.threads) as cut:
                return self._serving.switch(cut, keep_caches=False)

    def _reopening(self) -> Opener:
        if self._opener is None:
            raise BundleError("this pipeline was made of stages, not opened from a bundle; it cannot be cut anew")
        return self._opener

    # All of it.

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._serving.closed

    def stats(self) -> PipelineStats:
        """A snapshot of the counters since the pipeline opened; those of stages count since these stages opened."""
        batches, lanes = self._batches.stats(), self._serving.lanes
        stages_open_s = lanes.open_s
        stages = lanes.stats(stages_open_s)
        return PipelineStats(
            self._serving.earlier_s + stages_open_s,
            stages,
            batches.done,
            batches.failed,
            batches.cancelled,
            batches.in_flight,
            batches.queued,
            self._generator.stats(stages) if self._generator else None,
            self._serving.cut.layers,
            self._serving.switches,
            self._serving.last,
            self._rebalancer.stats() if self._rebalancer else None,
        )

    def record(self, recorder: Recorder | None) -> None:
        """From now on tell `recorder`, which is borrowed, what stages and requests do (None: nobody)."""
        self._serving.record(recorder)

    def close(self) -> None:
        """Fail what is unfinished with RequestError, let each stage finish what it runs, and free engines and threads.

        May be called again, and from any thread; returns when the workers have ended (where a future's callback calls
        it on one of them, without waiting for them).
        """
        if "_template" in vars(self):
            self._template.close()
        self._generator_slots.close("the pipeline is closed")
        if self._rebalancer is not None:
            self._rebalancer.stop()
        own_thread = self._serving.is_own_thread()
        self._serving.close()
        if self._rebalancer is not None and not own_thread:
            self._rebalancer.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @cached_property
    def _template(self) -> "ChatTemplate":
        from stageline.runtime.generation.chat import ChatTemplate  # imports jinja2

        return ChatTemplate.open(self.bundle.path / "tokenizer")

    def _generating(self) -> Generator:
        if self._generator is None:
            manifest = self.bundle.manifest
            why = manifest.trace.partition("no KV cache, since ")[2] or f"its task is {manifest.task}"
            raise RequestError(f"this bundle does not generate: {why}; run batches with Pipeline.run")
        return self._generator

    def _checked(self, request: GenerationRequest) -> tuple[Generator, list[int]]:
        generator = self._generating()
        return generator, generator.decoder.prompt_ids(request.prompt, generator.capacity)
