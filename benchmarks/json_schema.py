"""Which schemas of the official JSON-Schema-Test-Suite texts can follow, and whether they do.

The suite is in the source archive of `jsonschema` (`pip download --no-deps --no-binary :all: jsonschema`), as
`json/tests/draft2020-12`. The bundle says how many stages there are.

python benchmarks/json_schema.py SUITE BUNDLE
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
from stageline.models.errors import RequestError, StagelineError
from stageline.runtime.generation.structure import Structure
from stageline.runtime.pipeline import Pipeline

BATCH, TEMPERATURE, MAX_TOKENS = 8, 1.5, 200


def schemas(suite: Path) -> list[tuple[str, Any]]:
    """Name and schema of each case, those for optional features not."""
    found = []
    for file in sorted(suite.glob("*.json")):
        found += [(f"{file.stem}: {case['description']}", case["schema"]) for case in json.loads(file.read_bytes())]
    return found


def main() -> None:
    """Compile all, generate a text of each that compiles, check it, and print a summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", type=Path)
    parser.add_argument("bundle", type=Path)
    arguments = parser.parse_args()
    cases, outcomes, invalid, compile_s = schemas(arguments.suite), Counter[str](), [], []
    with Pipeline.open(arguments.bundle, slots=BATCH) as pipeline:
        running, stages = [], len(pipeline.layers)
        began = time.perf_counter()
        for number, (name, schema) in enumerate(cases):
            start = time.perf_counter()
            try:
                request = pipeline.request(
                    "JSON: ", structure=Structure.json_schema(schema), temperature=TEMPERATURE, seed=number,
                    max_tokens=MAX_TOKENS,
                )  # fmt: skip
                pipeline.prepare(request)
            except RequestError:
                outcomes["refused"] += 1
                continue
            compile_s.append(time.perf_counter() - start)
            running.append((name, schema, pipeline.start(request)))
        for name, schema, generation in running:
            try:
                (choice,) = generation.result().choices
            except StagelineError as error:
                outcomes["failed"] += 1
                invalid.append(f"{name}: {error}")
                continue
            if choice.finish_reason == "length":
                outcomes["cut by max_tokens"] += 1
                continue
            try:
                jsonschema.Draft202012Validator(schema).validate(json.loads(choice.text))
                outcomes["valid"] += 1
            except (jsonschema.ValidationError, ValueError) as error:
                outcomes["invalid"] += 1
                invalid.append(f"{name}: {choice.text!r}: {str(error).splitlines()[0]}")
        wall_s = time.perf_counter() - began
    print(f"{stages} stages; {len(cases)} schemas, {len(running)} followed; {dict(outcomes)}; {wall_s:.0f} s")
    print(f"compiling: median {1e3 * np.median(compile_s):.1f} ms, longest {1e3 * max(compile_s):.1f} ms")
    for line in invalid:
        print("  ", line)


if __name__ == "__main__":
    main()
