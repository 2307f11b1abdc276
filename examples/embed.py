"""Sentence embeddings inside your own program: python examples/embed.py bundles/minilm (which `make demo` makes)."""

import asyncio
import sys

import numpy as np
from stageline.runtime import Pipeline

SENTENCES = ["A cat sits on the mat.", "A kitten rests on a rug.", "Shares fell sharply on Monday."]


async def main(bundle: str) -> None:
    """Embed each sentence as a request of its own, all at the same time, and compare them."""
    with Pipeline.open(bundle) as pipeline:
        encode = pipeline.encoder.encode if pipeline.encoder else sys.exit(f"{bundle} has no tokenizer")
        requests = [pipeline.arun(encode([sentence]), ["sentence_embedding"]) for sentence in SENTENCES]
        answers = await asyncio.gather(*requests)
        vectors = np.concatenate([answer["sentence_embedding"] for answer in answers])  # float32 [sentences, width]
        stages = pipeline.stats().stages
    for sentence, row in zip(SENTENCES, vectors @ vectors.T, strict=True):
        print("  ".join(f"{cosine:5.2f}" for cosine in row), "", sentence)
    for number, stage in enumerate(stages):
        print(f"stage {number} on cores {stage.cores}: {stage.runs} micro-batches, busy {stage.busy_s * 1e3:.1f} ms")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
