"""The examples of services and batches do what they say."""

import asyncio
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import httpx
import numpy as np
import pytest
from stageline.runtime.pipeline import Pipeline

EXAMPLES = Path(__file__).parents[3] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_service_of_ones_own_streams_and_embeds(bundles: dict[str, Path]) -> None:
    module = example("service")
    with Pipeline.open(bundles["llama"]) as generator, Pipeline.open(bundles["bert"]) as embedder:
        module.generator, module.embedder = generator, embedder  # type: ignore[attr-defined]

        async def ask() -> list[httpx.Response]:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(module.app), base_url="http://own") as client:
                asked = (
                    "/continue?prompt=a+cat&max_tokens=9",
                    "/alike?one=a+cat&other=a+dog",
                    "/continue?prompt=a&max_tokens=-1",
                )
                return [await client.get(path) for path in asked]

        continued, alike, refused = asyncio.run(ask())
        assert continued.text == generator.generate("a cat", max_tokens=9).result().text
        assert embedder.encoder is not None
        vectors = embedder.run(embedder.encoder.encode(["a cat", "a dog"]))["sentence_embedding"]
        assert alike.json() == pytest.approx(float(np.dot(vectors[0], vectors[1])), rel=1e-4)
        assert refused.status_code == 400


def test_a_file_of_prompts_becomes_json_lines(bundles: dict[str, Path], tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("a cat\n\ndog sat on\n")
    command = [sys.executable, EXAMPLES / "batch.py", bundles["llama"], prompts, output]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("2 prompts, ")
    with Pipeline.open(bundles["llama"]) as pipeline:
        want = [pipeline.generate(prompt, max_tokens=64).result() for prompt in ("a cat", "dog sat on")]
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["text"] for line in lines] == [completion.text for completion in want]
    assert [line["tokens"] for line in lines] == [completion.completion_tokens for completion in want]
