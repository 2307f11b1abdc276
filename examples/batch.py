"""Complete a file of prompts, one a line: python examples/batch.py bundles/smollm2 prompts.txt out.jsonl"""

import json
import sys
from pathlib import Path

from stageline.models.errors import StagelineError
from stageline.runtime.pipeline import Pipeline


def main(bundle: Path, prompts: Path, output: Path) -> None:
    """As many run at a time as there are slots; lines come in the order of the prompts."""
    with Pipeline.open(bundle, slots=16) as pipeline, output.open("w") as file:
        lines = [line for line in prompts.read_text().splitlines() if line]
        # submit waits while the queue is full
        futures = [pipeline.submit(pipeline.request(line, max_tokens=64)) for line in lines]
        for line, future in zip(lines, futures, strict=True):
            try:
                answer = future.result()
                said = {"text": answer.text, "tokens": answer.completion_tokens, "why": answer.choices[0].finish_reason}
            except StagelineError as error:
                said = {"error": str(error)}
            print(json.dumps({"prompt": line, **said}), file=file)
        stats = pipeline.stats().generation
        assert stats is not None
        print(f"{len(lines)} prompts, {stats.generated_tokens} tokens in {stats.active_s:.1f} s")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
