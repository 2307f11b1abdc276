"""Options of a pipeline: checked wherever they come from, before anything is opened."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stageline.models.errors import RequestError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.options import OpenKeywords, PipelineOptions
from stageline.runtime.pipeline import Pipeline

WRONG: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: 0}, f"^{name} is 0; it must be at least 1$")
        for name in ("threads", "queue", "micro_batch", "slots", "capacity", "prefill_chunk")
    ),
    ({"quantise": "int3"}, "^quantise is 'int3'; it must be one of int4, int8$"),
    ({"cache_dtype": "int8"}, "^cache_dtype is 'int8'; it must be one of float32, float16$"),
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
