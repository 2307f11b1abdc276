"""The Overview page: whether the latest run of each model is good, against its baselines and the run before."""

import time
from contextlib import suppress

import streamlit as st
from stageline.dashboard.figures import runs as results
from stageline.dashboard.settings import as_typed
from stageline.dashboard.views.common import code, draw, page, plain
from stageline.dashboard.views.launching import turn
from stageline.dashboard.views.recorded import RECENT, differences_caption, lines, named_runs, no_runs, run_of, store
from stageline.models.errors import StagelineError
from stageline.runtime import words
from stageline.runtime.bench.compare import MARGIN, compare, incomparable, overall
from stageline.runtime.bench.records import OURS, Measurement, Run, RunLine
from stageline.runtime.report import charts, rows, sentences, statements, wording

_PILLS = 6  # models or loads offered side by side; more are in a list
_TIMES = {"latency": "Latency", "ttft": "TTFT", "tpot": "TPOT"}


@page("Overview", "What each model's pipeline achieves, against its baselines and the run before.")
def show() -> None:
    """Draw the page."""
    found = lines()
    _running(found)
    measured = [line for line in found if line.headlines]
    if not measured:
        no_runs()
        return
    line = _chosen(measured)
    run = run_of(line.id)
    before = _before(measured, line)
    _answer(run)
    left, right = st.columns([3, 2], gap="large")
    with left:
        _curve(run, before, _cuts(measured, line, run))
    with right:
        measurement = _load(run)
        if measurement is not None:
            _cards(run, measurement)
    if measurement is not None:
        left, right = st.columns(2, gap="large")
        with left:
            _baselines(run, str(measurement.load))
        with right:
            _stages(run, measurement)
    _loads(run)
    _pareto(run)
    _changes(run, before)
    _head(run)
    _all_runs(found)


def _running(found: list[RunLine]) -> None:
    if _runs(found):
        _follow()


def _runs(found: list[RunLine]) -> list[RunLine]:
    ids = turn().runs(store())
    return [line for line in found if line.id in ids]


@st.fragment(run_every=2.0)
def _follow() -> None:
    """The runs that are running now; the whole page is drawn again once they have ended."""
    now = _runs(lines())
    if not now:
        st.rerun()
    for line in now:
        share, step = words.share(line.progress.share), line.progress.step
        st.info(f"A benchmark of {plain(results.short(line.bundle))} is running: {share}, {step}.",
                icon=":material/hourglass_top:")  # fmt: skip
        st.page_link(st.session_state["pages"]["run"], label="Follow it", icon=":material/play_circle:")


def _chosen(measured: list[RunLine]) -> RunLine:
    """The run named by the query parameter `run`, else the newest of the chosen model; the address follows."""
    models = results.by_model(measured)
    wanted = named_runs("run")
    start = next((line for line in measured if line.id in wanted), measured[0])
    mine = next(name for name, group in models.items() if start in group)
    if len(models) > 1:
        key = f"model of {start.id}"
        chosen = _one_of("Model", list(models), mine, key)
        if chosen != mine:
            st.query_params["run"] = models[str(chosen)][0].id
            st.rerun()
    return start


def _before(measured: list[RunLine], line: RunLine) -> Run | None:
    """The earlier run to compare with, if it can be read."""
    earlier = results.earlier(measured, line)
    try:
        return run_of(earlier.id) if earlier else None
    except StagelineError:
        return None


def _answer(run: Run) -> None:
    """The first line: is it good, against what, what holds it back, what to do."""
    answer = statements.answer(run)
    stages = words.counted(len(run.plan.blocks), "stage")
    endings = {"done": "", "running": " Still running.", "cancelled": " Cancelled before its end."}
    ending = endings.get(run.status, f" Failed: {plain(str(run.error))}.")
    name = f"{plain(results.short(run.bundle))}, {stages}"
    if answer is None:
        st.markdown(f"**{name}:** the pipeline itself has no figures in this run.{ending}")
        return
    with st.container(border=True, key="answer"):
        st.markdown(f"**{name}: {answer.achieved}**{ending} {answer.rest} {code(answer.command)}")
        limits = statements.capacity_lines(run)
        if limits:
            st.caption(" ".join(limits))


def _load(run: Run) -> Measurement | None:
    """The load that cards and panels are about: the address's, else the one of the first line."""
    by_name = {str(one.load): one for one in run.measurements if one.contender == OURS}
    ours = {load: by_name[load] for load in statements.loads(run, OURS)}
    answer = statements.answer(run)
    if answer is None:
        return None
    asked = st.query_params.get("load", "")
    start = asked if asked in ours else str(answer.best.load)
    if len(ours) == 1:
        return ours[start]
    key = f"load of {run.id}"
    chosen = _one_of("Load", list(ours), start, key)
    st.query_params["load"] = str(chosen)
    return ours[str(chosen)]


def _cards(run: Run, measurement: Measurement) -> None:
    repeats = max((len(figure.values) for figure in measurement.figures.values()), default=0)
    st.caption(
        f"At {measurement.load}: {words.counted(measurement.requests, 'request')} in "
        f"{words.counted(repeats, 'repeat')}. ± is the 95 % confidence interval over the repeats."
    )
    with st.grid(min_column_width=130, row_height="content"):
        for card in results.cards(run, measurement):
            st.metric(card.label, card.value, card.doubt, delta_color="off", delta_arrow="off", help=card.about,
                      border=True, height="stretch")  # fmt: skip


def _cuts(measured: list[RunLine], line: RunLine, run: Run) -> list[Run]:
    """Runs of the model's other cuts under loads like these, as far as they can be read."""
    found = []
    for other in results.other_cuts(measured, line):
        with suppress(StagelineError):
            found.append(run_of(other.id))
    return [cut for cut in found if cut.plan != run.plan and incomparable(cut, run) is None]


def _curve(run: Run, before: Run | None, cuts: list[Run]) -> None:
    st.subheader("Throughput and latency", anchor=False)
    known = [name for name in _TIMES if any(f"{name}_p50_s" in one.figures for one in run.measurements)]
    if not known:
        st.caption("No latency was measured in this run.")
        return
    with st.container(horizontal=True):
        what = str(_pick("Time", known, "latency", _TIMES)) if len(known) > 1 else known[0]
        percentile = str(_pick("Percentile", rows.PERCENTILES, "p50"))
    drawn_before = before if before is not None and incomparable(before, run) is None and before not in cuts else None
    drawn = rows.curve_rows(run, f"{what}_{percentile}", drawn_before, cuts)
    unit = statements.throughput_unit(run)
    for reason in rows.left_out(run, f"{what}_{percentile}"):
        st.caption(f"Not drawn: {plain(reason)}.")
    if not drawn:
        return
    slo, named = run.settings.slo, f"{_TIMES[what]} {percentile}"
    bound = {"latency": slo.latency_s, "ttft": slo.ttft_s, "tpot": slo.tpot_s}[what]
    draw(charts.curve(drawn, unit, named, bound), "chart-curve", sentences.of_curve(drawn, unit, named))
    hollow = " Hollow and dashed: the run before." if drawn_before else ""
    st.caption(
        "Labels are loads; lines through points are 95 % intervals up to ±100 %. Further right and "
        f"lower is better.{hollow}"
    )


def _one_of(label: str, options: list[str], default: str, key: str) -> str | None:
    """A choice of one: side by side, or in a list where there are many."""
    if len(options) > _PILLS:
        return st.selectbox(label, options, options.index(default), key=key)
    return st.segmented_control(label, options, default=default, required=True, key=key, label_visibility="collapsed")


def _pick(label: str, options: list[str] | tuple[str, ...], default: str, named: dict[str, str] | None = None) -> str:
    """A choice that the address keeps."""
    key = label.lower()
    asked = st.query_params.get(key, default)
    chosen = st.segmented_control(
        label, options, default=asked if asked in options else default, required=True, key=key,
        format_func=lambda one: (named or {}).get(one, one), label_visibility="collapsed",
    )  # fmt: skip
    st.query_params[key] = str(chosen)
    return str(chosen)


def _baselines(run: Run, load: str) -> None:
    drawn = rows.baseline_rows(run, load)
    st.subheader(f"Against the baselines, {load}", anchor=False)
    if len(drawn) < 2:
        st.caption("None was measured at this load. To measure one alongside the pipeline:")
        st.code(f"stageline bench {as_typed(run.bundle)} --baseline onnxruntime", language="bash", wrap_lines=True)
        return
    figure = statements.compared_figure(run, load)
    draw(charts.baselines(drawn, figure), "chart-baselines", sentences.of_bars(drawn, figure))
    st.caption(" ".join(one.text for one in statements.against(run, load)))


def _stages(run: Run, measurement: Measurement) -> None:
    if not measurement.stages:
        return
    st.subheader(f"Where the time goes, {measurement.load}", anchor=False)
    drawn = rows.stage_rows(measurement)
    draw(charts.stages(drawn), "chart-stages", sentences.of_stages(drawn))
    st.page_link(
        st.session_state["pages"]["timeline"],
        label="See its timeline",
        icon=":material/view_timeline:",
        query_params={"run": run.id},
    )


def _loads(run: Run) -> None:
    st.subheader("Every load", anchor=False)
    st.dataframe(rows.load_rows(run), hide_index=True, key="loads", height="content")
    if statements.generates(run):
        st.caption("Prefill: tokens read/s, TTFT. Decode: tokens drawn/s, TPOT. A dash: too few requests for it.")


def _pareto(run: Run) -> None:
    drawn = rows.pareto_rows(run)
    if len(drawn) < 2:
        return
    st.subheader("Speed for one user against speed of the device", anchor=False)
    draw(charts.pareto(drawn), "chart-pareto", sentences.of_pareto(drawn))
    st.caption("Labels are loads, and the cost of a million drawn tokens where the device has a price.")


def _changes(run: Run, before: Run | None) -> None:
    if before is None:
        return
    st.subheader("What changed since the run before", anchor=False)
    reason = incomparable(before, run)
    if reason is not None:
        st.caption(f"Not compared: {plain(reason)}.")
        return
    found = compare(before, run)
    verdict, when = wording.VERDICTS[overall(found)], words.ago(before.created, time.time())
    st.markdown(f"{verdict}, margin {wording.percent(MARGIN)}. The pipeline against {plain(before.id)}, {when}:")
    st.dataframe(results.matrix(found), hide_index=True, key="changes", height="content")
    differences_caption(before, run)
    st.page_link(
        st.session_state["pages"]["compare"],
        label="Compare the two",
        icon=":material/compare_arrows:",
        query_params={"runs": f"{before.id},{run.id}"},
    )


def _head(run: Run) -> None:
    """How and where the run was made."""
    machine = f"{run.environment.machine}, {words.counted(run.environment.cores, 'CPU core')}"
    st.caption(
        f"Run `{run.id}` of {' + '.join(map(str, run.plan.blocks))} blocks, measured "
        f"{words.ago(run.created, time.time())} ({words.clock(run.created)}), {run.settings.pipeline.engine}, "
        f"{run.dtype}, {run.settings.inputs}. {machine}."
    )


def _all_runs(found: list[RunLine]) -> None:
    with st.expander(
        f"All runs ({len(found):,})" if len(found) <= RECENT else f"The newest {RECENT} of {len(found):,} runs"
    ):
        now_s = time.time()
        st.dataframe(
            [
                {
                    "open": f"?run={line.id}",
                    "bundle": results.short(line.bundle),
                    "name": line.name,
                    "when": words.ago(line.created, now_s),
                    "status": line.status,
                    "loads": len(line.headlines),
                    "best requests/s": max(
                        (h.requests_per_s or 0.0 for h in line.headlines if h.contender == OURS), default=None
                    ),
                }
                for line in found[:RECENT]
            ],
            hide_index=True,
            column_config={
                "open": st.column_config.LinkColumn("open", display_text=r"run=(.*)"),
                "best requests/s": st.column_config.NumberColumn(format="%.1f"),
            },
            key="all runs",
        )
