"""Complete a file of prompts, one per line: python examples/batch.py bundles/smollm2 prompts.txt out.jsonl"""

import json
import sys
from pathlib import Path

from stageline.runtime import Pipeline, StagelineError


def main(bundle: Path, prompts: Path, output: Path) -> None:
    """Complete the prompts, 16 at a time; the output keeps their order."""
    with Pipeline.open(bundle, slots=16) as pipeline, output.open("w") as file:
        lines = [line for line in prompts.read_text().splitlines() if line]
        # submit waits while the queue is full
        futures = [pipeline.submit(pipeline.request(line, max_tokens=64)) for line in lines]
        for line, future in zip(lines, futures, strict=True):
            try:
                answer = future.result()
                row = {
                    "text": answer.text,
                    "tokens": answer.completion_tokens,
                    "finish_reason": answer.choices[0].finish_reason,
                }
            except StagelineError as error:
                row = {"error": str(error)}
            print(json.dumps({"prompt": line, **row}), file=file)
        stats = pipeline.stats().generation
        assert stats is not None
        print(f"{len(lines)} prompts, {stats.generated_tokens} tokens in {stats.active_s:.1f} s")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
