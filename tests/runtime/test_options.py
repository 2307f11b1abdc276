"""Options of a pipeline: checked wherever they come from, before anything is opened."""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stageline.models.errors import RequestError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.engines import CacheSize
from stageline.runtime.options import OpenKeywords, PipelineOptions
from stageline.runtime.pipeline import Pipeline

WRONG: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: 0}, f"^{name} is 0; it must be at least 1$")
        for name in (
            "threads",
            "queue",
            "micro_batch",
            "slots",
            "capacity",
            "cache_memory",
            "prefix_cache",
            "prefill_chunk",
        )
    ),
    ({"quantise": "int3"}, "^quantise is 'int3'; it must be one of int4, int8, float32$"),
    ({"cache_dtype": "int8"}, "^cache_dtype is 'int8'; it must be one of float32, float16$"),
    *(({"tpot_target": value}, f"^tpot_target is {value}; give seconds above 0$") for value in (0, -1.0, math.inf)),
    ({"rebalance": None}, "^rebalance is None; it must be one of off, advise, auto$"),
]


@pytest.mark.parametrize(("option", "message"), WRONG)
def test_options_out_of_their_range_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        PipelineOptions(**option)
    with pytest.raises(RequestError, match=message):  # before the bundle is looked for
        Pipeline.open("no such bundle", **option)


def test_keywords_of_open_are_the_options_and_replace_them(tiny_bundle: Path) -> None:
    assert set(OpenKeywords.__annotations__) == {field.name for field in fields(PipelineOptions)}
    options = PipelineOptions(threads=1, devices=["cpu"], micro_batch=4)
    assert hash(options) == hash(PipelineOptions(threads=1, devices=("cpu",), micro_batch=4))
    with Pipeline.open(tiny_bundle, options, micro_batch=1) as pipeline:
        pipeline.run({"input_ids": np.array([[3, 4], [5, 6]])})
        stages = pipeline.stats().stages
    assert {(len(stage.cores), stage.runs) for stage in stages} == {(1, 2)}


def test_a_model_with_caches_places_no_more_than_it_can(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    assert PipelineOptions().cache_size(manifest) is None
    generating = manifest.model_copy(update={"max_positions": 100})
    with pytest.raises(RequestError, match=r"^capacity is 101, the model can place 100 tokens; lower it$"):
        PipelineOptions(capacity=101).cache_size(generating)


def test_caches_keep_to_their_memory(tiny_llama: Path) -> None:
    manifest = Bundle.open(tiny_llama).manifest
    specs = [spec for stage in manifest.stages for spec in stage.caches]
    token_bytes = 4 * sum(spec.heads * (spec.key_size + spec.value_size) for spec in specs)
    of_rows = PipelineOptions(slots=2, capacity=16, cache_memory=32 * token_bytes)
    assert of_rows.cache_size(manifest) == CacheSize(2, 16, chunk=16)
    with pytest.raises(RequestError, match=r"; 2 slots of 17 tokens take .*: lower slots or capacity$"):
        replace(of_rows, capacity=17).cache_size(manifest)
    keeping = replace(of_rows, prefix_cache=35 * token_bytes).cache_size(manifest)
    assert keeping == CacheSize(2, 16, chunk=16, kept=35)
    assert keeping is not None
    assert keeping.rows == 4
    with pytest.raises(RequestError, match=r"; the least that onnxruntime keeps, 16 tokens, takes .*: give more$"):
        replace(of_rows, prefix_cache=15 * token_bytes).cache_size(manifest)
    with pytest.raises(RequestError, match=r"^prefix_cache is for engines on CPUs; leave it out for tensorrt$"):
        PipelineOptions("tensorrt", prefix_cache=10**9).cache_size(manifest)
    of_blocks = PipelineOptions("openvino", slots=8, cache_memory=100 * token_bytes)
    found = of_blocks.cache_size(manifest)
    assert found is not None
    assert (found.capacity, found.tokens, found.blocks(32)) == (100, 100, 4)
    halved = replace(of_blocks, cache_dtype="float16").cache_size(manifest)
    assert halved is not None
    assert halved.tokens == 200
    with pytest.raises(RequestError, match=r", which hold 100 tokens; a row of 101 takes "):
        replace(of_blocks, capacity=101).cache_size(manifest)
    with pytest.raises(RequestError, match=r", which hold 2 tokens; a row of 64 takes "):
        replace(of_blocks, cache_memory=2 * token_bytes).cache_size(manifest)
