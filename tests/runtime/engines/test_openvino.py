"""OpenVINO through the real pipeline, against ONNX Runtime on the same bundles."""

import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llamas import THREE_BLOCKS, TIED
from stageline.models.errors import EngineError
from stageline.runtime import engines
from stageline.runtime.engines import WeightDtype
from stageline.runtime.engines.lowering.openvino import GROUP, quantise_groups
from stageline.runtime.generation.request import Completion, GenerationRequest, Sampling
from stageline.runtime.pipeline import Pipeline

SECONDS = 60
RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(3, 99, length).tolist() for length in (3, 41, 1, 17, 64, 33, 32, 2)]


@pytest.fixture(scope="module")
def decoder(export_once: Callable[..., Path]) -> Path:
    return export_once(THREE_BLOCKS)


@pytest.fixture(scope="module")
def wanted(decoder: Path) -> list[tuple[int, ...]]:
    with Pipeline.open(decoder, slots=3, prefill_chunk=16) as pipeline:
        return tokens_of(submitted(pipeline))


def submitted(pipeline: Pipeline) -> "list[Future[Completion]]":
    return [pipeline.submit(GenerationRequest(tuple(prompt), Sampling(max_tokens=40))) for prompt in PROMPTS]


def tokens_of(futures: "list[Future[Completion]]") -> list[tuple[int, ...]]:
    return [future.result(SECONDS).choices[0].token_ids for future in futures]


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_tokens_are_those_of_onnxruntime(stages: int, decoder: Path, wanted: list[tuple[int, ...]]) -> None:
    """Prompts in chunks, rows of all lengths, in slots that others had before, and cut anew while they are under
    way."""
    with Pipeline.open(decoder, engine="openvino", slots=3, prefill_chunk=16) as pipeline:
        pipeline.recut(stages)
        assert tokens_of(submitted(pipeline)) == wanted
        running = submitted(pipeline)
        pipeline.recut(stages % 3 + 1)
        assert tokens_of(running) == wanted


def test_steps_mix_prompts_with_decoding_and_compute_no_padding(decoder: Path, wanted: list[tuple[int, ...]]) -> None:
    with Pipeline.open(decoder, engine="openvino", slots=3, prefill_chunk=16) as pipeline:
        assert tokens_of(submitted(pipeline)) == wanted
        amounts = [stage.amounts for stage in pipeline.stats().stages]
    for amount in amounts:
        assert min(amount[kind].runs for kind in ("prefill", "decode", "mixed")) > 0
        assert sum(one.tokens for one in amount.values()) == sum(map(len, PROMPTS)) + sum(
            len(row) - 1 for row in wanted
        )


def test_shared_beginnings_are_copied(decoder: Path, wanted: list[tuple[int, ...]]) -> None:
    with Pipeline.open(decoder, engine="openvino", slots=3) as pipeline:
        twins = pipeline.submit(GenerationRequest(tuple(PROMPTS[1]), Sampling(max_tokens=40, n=3)))
        assert {choice.token_ids for choice in twins.result(SECONDS).choices} == {wanted[1]}


def test_whole_rows_give_their_logits(decoder: Path) -> None:
    ids = np.random.default_rng(0).integers(3, 99, (5, 40))
    mask = (np.arange(40) < np.array([40, 1, 33, 32, 7])[:, None]).astype(np.int64)
    inputs = {"input_ids": ids, "attention_mask": mask}
    with Pipeline.open(decoder) as one, Pipeline.open(decoder, engine="openvino") as other:
        expected, got = (pipeline.run(inputs)["logits"][mask != 0] for pipeline in (one, other))
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_an_encoder_runs(tiny_bundle: Path) -> None:
    inputs = {"input_ids": np.random.default_rng(0).integers(5, 12, (4, 7))}
    with Pipeline.open(tiny_bundle) as one, Pipeline.open(tiny_bundle, engine="openvino") as other:
        expected, got = (pipeline.run(inputs)["logits"] for pipeline in (one, other))
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(("quantise", "most"), [("int8", 2e-2), ("int4", 0.3)])
def test_quantised_weights_are_close(quantise: WeightDtype, most: float, export_once: Callable[..., Path]) -> None:
    bundle = export_once(TIED, stages=2)
    inputs = {"input_ids": np.random.default_rng(1).integers(5, 300, (2, 20))}
    with Pipeline.open(bundle) as one, Pipeline.open(bundle, engine="openvino", quantise=quantise) as other:
        expected, got = (pipeline.run(inputs)["logits"] for pipeline in (one, other))
    error = np.sqrt(np.square(got - expected).mean() / np.square(expected).mean())
    assert 1e-4 < error < most


@given(rows=st.integers(1, 5), groups=st.integers(1, 4), seed=st.integers(0, 999))
def test_a_checkpoint_of_four_bits_keeps_its_weights(rows: int, groups: int, seed: int) -> None:
    """Those of the kind d * q + m, as Q4_1 has them, up to the rounding of m / d to float16."""
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 16, (rows, groups, GROUP))
    q[:, :, 0], q[:, :, 1] = 0, 15  # else the group spans less
    d = rng.uniform(0.001, 0.1, (rows, groups, 1)).astype(np.float16).astype(np.float32)
    m = rng.uniform(-1, 0, (rows, groups, 1)).astype(np.float32) * d * 15
    weight = (d * q + m).astype(np.float32)
    values, scales, zeros = (array.astype(np.float32) for array in quantise_groups(weight.reshape(rows, -1), "int4"))
    np.testing.assert_allclose((values - zeros) * scales, weight, atol=float(d.max()) * 1e-2)
    assert np.array_equal(values, q)


def test_a_row_that_is_no_multiple_of_a_group_is_one_group() -> None:
    weight = np.random.default_rng(2).standard_normal((3, GROUP + 7)).astype(np.float32)
    values, scales, zeros = quantise_groups(weight, "int8")
    assert values.shape == (3, 1, GROUP + 7)
    found = (values.astype(np.float32) - zeros) * scales
    np.testing.assert_allclose(found[:, 0], weight, atol=float(scales.max()))


def test_the_caller_s_cores_stay_what_they_are(decoder: Path) -> None:
    """OpenVINO lets the thread that compiles run anywhere; it must not stay so, nor reach the caller."""
    before = os.sched_getaffinity(0)
    with Pipeline.open(decoder, engine="openvino") as pipeline:
        pipeline.recut(2)
        cores = pipeline._executor.lanes.ask(0, lambda engine: os.sched_getaffinity(0)).result(SECONDS)
        assert cores == set(pipeline.stats().stages[0].cores)
    assert os.sched_getaffinity(0) == before


def test_without_openvino_it_says_what_to_install(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"openvino is not installed: pip install \"stageline\[openvino\]\""):
        Pipeline.open(decoder, engine="openvino")
