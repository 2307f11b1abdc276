"""Traces in Chrome's trace-event format, for ui.perfetto.dev and chrome://tracing.

Each stage is a process with two threads: `compute` (runs and copies, one after the other) and `queue` (waiting
micro-batches, as async events, because several may wait at once). Requests are async events of a process of their own.
A micro-batch's route is a flow: an arrow from each stage to the next. Times are microseconds.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stageline.models.errors import StagelineError
from stageline.runtime.stages.recorder import RequestSpan, Span

REQUESTS, FIRST_STAGE = 1, 2  # process ids
COMPUTE, QUEUE = 1, 2  # thread ids in a stage
Event = dict[str, Any]


def write(path: Path, spans: Sequence[Span], requests: Sequence[RequestSpan], title: str) -> None:
    """Write the trace aside, then rename it. StagelineError if it cannot be written.

    Numbers identify micro-batches and requests; all times must come from one clock.
    """
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.write_text(document(spans, requests, title), encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise StagelineError(f"trace {path} cannot be written: {error.strerror}; choose another file") from error


def document(spans: Sequence[Span], requests: Sequence[RequestSpan], title: str) -> str:
    """The trace as JSON, as `write` writes it."""
    return json.dumps({"traceEvents": events(spans, requests), "otherData": {"title": title}})


def events(spans: Sequence[Span], requests: Sequence[RequestSpan]) -> list[Event]:
    """All events: names first, then the others by time."""
    stages = sorted({span.stage for span in spans})
    zero_s = min([span.began_s for span in spans] + [request.began_s for request in requests], default=0.0)
    named = list(_names(stages))
    timed = [*_work(spans), *_queues(spans, requests), *_flows(spans), *_requests(requests)]
    for event in timed:
        event["ts"] = round((event["ts"] - zero_s) * 1e6, 3)
        if "dur" in event:
            event["dur"] = round(event["dur"] * 1e6, 3)
    return named + sorted(timed, key=lambda event: event["ts"])


def _names(stages: Sequence[int]) -> Iterator[Event]:
    processes = {REQUESTS: "requests", **{FIRST_STAGE + stage: f"stage {stage}" for stage in stages}}
    for place, (process, name) in enumerate(processes.items()):
        yield {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}}
        yield {"ph": "M", "name": "process_sort_index", "pid": process, "tid": 0, "args": {"sort_index": place}}
        threads = {COMPUTE: "requests"} if process == REQUESTS else {COMPUTE: "compute", QUEUE: "queue"}
        for thread, called in threads.items():
            yield {"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": called}}


def _work(spans: Sequence[Span]) -> Iterator[Event]:
    for span in spans:
        yield {
            "ph": "X", "name": f"{span.kind} {span.micro_batch}", "cat": span.kind,
            "pid": FIRST_STAGE + span.stage, "tid": COMPUTE, "ts": span.began_s, "dur": span.ended_s - span.began_s,
            "args": {"micro-batch": span.micro_batch, "rows": span.rows, "tokens": span.tokens,
                     "requests": list(span.requests)},
        }  # fmt: skip


def _routes(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """The runs of each micro-batch in order, without copies."""
    routes: dict[int, list[Span]] = {}
    for span in spans:
        if span.kind != "copy":
            routes.setdefault(span.micro_batch, []).append(span)
    for route in routes.values():
        yield sorted(route, key=lambda span: span.began_s)


def _flows(spans: Sequence[Span]) -> Iterator[Event]:
    """Start, steps and end of an arrow each bind to the run that encloses their time on their thread."""
    for route in _routes(spans):
        if len(route) == 1:
            continue
        for place, span in enumerate(route):
            phase = "s" if place == 0 else "f" if place == len(route) - 1 else "t"
            event: Event = {
                "ph": phase, "name": "micro-batch", "cat": "flow", "id": span.micro_batch,
                "pid": FIRST_STAGE + span.stage, "tid": COMPUTE, "ts": (span.began_s + span.ended_s) / 2,
            }  # fmt: skip
            if phase == "f":
                event["bp"] = "e"
            yield event


def _queues(spans: Sequence[Span], requests: Sequence[RequestSpan]) -> Iterator[Event]:
    """The time a micro-batch waited for each stage: since the end of the stage before; for the first stage of a batch,
    whose request is known, since that request's submission."""
    submitted = {request.number: request.began_s for request in requests}
    for route in _routes(spans):
        before = submitted.get(route[0].requests[0]) if route[0].kind == "batch" and route[0].requests else None
        for place, span in enumerate(route):
            if before is not None and before < span.began_s:
                name = f"waits {span.micro_batch}"
                head = {"name": name, "cat": "queue", "id": f"{span.micro_batch}.{place}",
                        "pid": FIRST_STAGE + span.stage, "tid": QUEUE}  # fmt: skip
                yield {**head, "ph": "b", "ts": before, "args": {"micro-batch": span.micro_batch}}
                yield {**head, "ph": "e", "ts": span.began_s}
            before = span.ended_s


def _requests(requests: Sequence[RequestSpan]) -> Iterator[Event]:
    for request in requests:
        head = {"name": f"request {request.number}", "cat": "request", "id": f"r{request.number}",
                "pid": REQUESTS, "tid": COMPUTE}  # fmt: skip
        yield {**head, "ph": "b", "ts": request.began_s, "args": {"request": request.number}}
        yield {**head, "ph": "e", "ts": request.ended_s}
