"""Sentence embeddings inside your own program: python examples/embed.py bundles/minilm (which `make demo` makes)."""

import asyncio
import sys
from pathlib import Path

import numpy as np
from stageline.models.tokenizer import TextEncoder
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.pipeline import Pipeline

SENTENCES = ["A cat sits on the mat.", "A kitten rests on a rug.", "Shares fell sharply on Monday."]


async def main(path: Path) -> None:
    """Embed each sentence as a request of its own, all at the same time, and compare them."""
    text = Bundle.open(path).manifest.text
    assert text is not None, "a bundle of sentence embeddings has a tokenizer"
    encoder = TextEncoder.open(path / text.tokenizer, text.max_length, text.pad_id)
    with Pipeline.open(path) as pipeline:
        requests = [pipeline.arun(encoder.encode([sentence]), ["sentence_embedding"]) for sentence in SENTENCES]
        answers = await asyncio.gather(*requests)
        vectors = np.concatenate([answer["sentence_embedding"] for answer in answers])  # float32 [sentences, width]
        stages = pipeline.stats().stages
    for sentence, row in zip(SENTENCES, vectors @ vectors.T, strict=True):
        print("  ".join(f"{cosine:5.2f}" for cosine in row), "", sentence)
    for number, stage in enumerate(stages):
        print(
            f"stage {number} on processors {stage.cores}: {stage.runs} micro-batches, busy {stage.busy_s * 1e3:.1f} ms"
        )


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
