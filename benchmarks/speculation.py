"""What drafts from the text itself, or by a small model, give: time per token with and without them, in turn in one
pipeline.

    python benchmarks/speculation.py bundles/smollm2 --json benchmarks/results/speculation.json

The first three texts repeat themselves, as what is edited, converted or translated does; the fourth is drawn at a
temperature and does not. Streams of a kind differ in a number at their beginning. A row is the median over rounds of
the paired ratios, and their spread.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from stageline.runtime import Pipeline
from stageline.runtime.generation.request import Completion

CODE = '''# File {number}
def area_of_rectangle(width, height):
    """The area of a rectangle of this width and this height."""
    if width < 0 or height < 0:
        raise ValueError("width and height must not be negative")
    area = width * height
    return area

# The same file again, with another name for the function:
def area_of_box(width, height):
'''
JSON = """Table {number}
name: Anna Berg, city: Oslo, year of birth: 1981, member: yes
name: Luis Prado, city: Lima, year of birth: 1975, member: no
name: Mei Chen, city: Taipei, year of birth: 1990, member: yes
name: Omar Said, city: Cairo, year of birth: 1968, member: no

The same table as JSON:
{{"name": "Anna Berg", "city": "Oslo", "year of birth": 1981, "member": true}}
{{"name": "Luis Prado", "city": "Lima", "year of birth": 1975, "member": false}}
"""
MEMORY = """Translation memory {number}
Press the green button to start the machine. = Drücken Sie die grüne Taste, um die Maschine zu starten.
Press the red button to stop the machine. = Drücken Sie die rote Taste, um die Maschine zu stoppen.
Press the green button to start the pump. = Drücken Sie die grüne Taste, um die Pumpe zu starten.
Press the red button to stop the pump. = Drücken Sie die rote Taste, um die Pumpe zu stoppen.
Press the green button to start the fan. = """
PROSE = "Letter {number}. Dear friend, on the first morning after the long winter I walked down to the harbour and"
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "code that is edited": (CODE, {}),
    "a table as JSON": (JSON, {}),
    "translation memory": (MEMORY, {}),
    "prose, temperature 1": (PROSE, {"temperature": 1.0, "seed": 1}),
}


def _run(pipeline: Pipeline, text: str, streams: int, tokens: int, **sampling: Any) -> tuple[float, list[Completion]]:
    """Seconds from the last first token to the end, and what came out."""
    running = [
        pipeline.generate(text.format(number=number + 1), max_tokens=tokens, ignore_eos=True, **sampling)
        for number in range(streams)
    ]
    done = [generation.result() for generation in running]
    tpot = statistics.mean((d.token_times_s[-1] - d.token_times_s[0]) / (tokens - 1) for d in done)
    return tpot, done


def _drafts(pipeline: Pipeline) -> tuple[int, int]:
    """Tokens drafted so far, and those of them that were right."""
    stats = pipeline.stats().generation
    assert stats is not None
    return stats.drafted_tokens, stats.accepted_tokens


def main() -> None:
    """Measure, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--quantise")
    parser.add_argument("--draft", default="lookup", help="or a bundle of a small model (benchmarks/cut_draft.py)")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    counts = [int(count) for count in given.streams.split(",")]
    rows = []
    print(f"{'':24}{'streams':>8}{'ms/token':>10}{'drafts':>8}{'gain':>7}  {'spread':14}{'drafted':>8}{'right':>7}")
    with Pipeline.open(
        given.bundle, engine=given.engine, quantise=given.quantise, slots=max(counts), capacity=1024, draft=given.draft
    ) as pipeline:
        for name, (text, sampling) in TEXTS.items():
            for streams in counts:
                pairs, drafted, accepted = [], 0, 0
                for number in range(given.rounds + 1):
                    times = {}
                    answers = {}
                    for drafts in (True, False) if number % 2 else (False, True):
                        before = _drafts(pipeline)
                        times[drafts], done = _run(
                            pipeline, text, streams, given.tokens, speculation=drafts, **sampling
                        )
                        after = _drafts(pipeline)
                        answers[drafts] = [d.choices[0].token_ids for d in done]
                        if drafts and number:
                            drafted += after[0] - before[0]
                            accepted += after[1] - before[1]
                    if answers[True] != answers[False]:
                        print(f"{name}, {streams} streams: the tokens are not the same", file=sys.stderr)
                    if number:  # the first round warms up
                        pairs.append((times[False], times[True]))
                ratios = [without / with_drafts for without, with_drafts in pairs]
                row = {
                    "text": name,
                    "streams": streams,
                    "ms": 1e3 * statistics.median(without for without, _ in pairs),
                    "ms_drafts": 1e3 * statistics.median(with_drafts for _, with_drafts in pairs),
                    "gain": statistics.median(ratios),
                    "ratios": ratios,
                    "drafted": drafted,
                    "accepted": accepted,
                }
                rows.append(row)
                spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
                right = f"{accepted / drafted:.0%}" if drafted else ""
                print(
                    f"{name:24}{streams:8}{row['ms']:10.1f}{row['ms_drafts']:8.1f}{row['gain']:7.2f}  {spread:14}"
                    f"{drafted:8}{right:>7}",
                    flush=True,
                )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
