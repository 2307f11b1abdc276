"""The dashboard in a real browser: Debian's Chromium, driven by Playwright, on a store with real runs."""

import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import CHROMIUM, READY, launched, served
from stageline.dashboard.children.command import stageline
from stageline.runtime.bench.store import Store

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"no Chromium at {CHROMIUM}: apt-get install chromium"),
]
WIDE, NARROW = (1280, 900), (390, 844)
PAGES = {
    "Overview": "/",
    "Timeline": "/timeline",
    "Compare": "/compare",
    "Run a benchmark": "/run",
    "Live": "/live?url=http://127.0.0.1:9",
    "Plan": "/plan",
    "Engines": "/engines",
    "Environment": "/environment",
}
axe = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
AXE = Path(axe.__file__).with_name("axe.min.js").read_text()
ACCESSIBLE = """() => axe.run({exclude: ['.window_brush', '.window_brush_bg']}, {
  runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa'], rules: {list: {enabled: false}, listitem: {enabled: false}},
})"""
CHART = "[data-testid=stVegaLiteChart] :is(canvas, svg.marks)"
# Where a page's address has a path, Streamlit's page looks for the server there before it looks at the root.
PROBES = re.compile(r"/_stcore/(health|host-config)$")
BUTTONS = "[data-testid=stMain] :is([data-testid=stButton], [data-testid=stDownloadButton]) button"
LABELS = (
    f"""() => [...document.querySelectorAll('{BUTTONS} [data-testid=stMarkdownContainer]')].map(one => one.innerText)"""
)
SEEN: set[tuple[str, str]] = set()
PRESSED: set[tuple[str, str]] = set()
"""Pages and labels of the buttons that the tests of this file saw and pressed."""


class Window:
    """A page of the dashboard, and what went wrong in it."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.troubles: list[str] = []
        page.on("pageerror", lambda error: self.troubles.append(f"error: {error}"))
        page.on("console", self._console)
        page.on("request", self._request)

    def _console(self, message: Any) -> None:
        if message.type == "error" and not PROBES.search(message.location.get("url", "")):
            self.troubles.append(f"console: {message.text} {message.location.get('url')}")

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.troubles.append(f"calls {request.url}")

    def open(self, path: str, head: str) -> None:
        """Open a page and wait until it is drawn; it must have this head."""
        self.page.goto(self.url + path)
        self.settled()
        assert self.page.inner_text("[data-testid=stMain] h1") == head

    def settled(self) -> None:
        """Wait until the page's script has run and its charts are drawn."""
        self.page.wait_for_function(READY, timeout=40_000)
        self._look()

    def press(self, label: str) -> None:
        """Press the first button with this label."""
        named = self.button(label)
        named.wait_for(timeout=40_000)
        self._look()
        PRESSED.add((self._head(), label))
        named.click()

    def button(self, label: str) -> Any:
        """The first button with this label. Narrow windows have another one, hidden, for a button with a tooltip."""
        named = self.page.locator(BUTTONS).filter(has=self.page.get_by_text(label, exact=True))
        return named.filter(visible=True).first

    def _look(self) -> None:
        SEEN.update((self._head(), label) for label in self.page.evaluate(LABELS))

    def _head(self) -> str:
        return str(self.page.inner_text("[data-testid=stMain] h1"))

    def text(self) -> str:
        """All that the page shows."""
        return str(self.page.inner_text("[data-testid=stMain]"))

    def await_text(self, text: str) -> None:
        """Wait until the page shows it, also where it is split into coloured words."""
        shows = "text => document.querySelector('[data-testid=stMain]').textContent.includes(text)"
        self.page.wait_for_function(shows, arg=text, timeout=40_000)

    def check_accessible(self) -> None:
        """Nothing that axe-core finds against WCAG 2.1, levels A and AA, but for two things that are not ours: how
        Streamlit nests its navigation's list, and Vega's names for the two rectangles of a window on a chart."""
        self.page.evaluate(AXE)
        found = self.page.evaluate(ACCESSIBLE)
        wrong = [
            f"{one['id']}: {node['html'][:160]} {node['failureSummary']}"
            for one in found["violations"]
            for node in one["nodes"]
        ]
        assert not wrong, "\n".join(wrong)

    def check(self) -> None:
        """No exception box, nothing wrong in the console, no call to elsewhere, nothing wider than the window."""
        self._look()
        assert not self.page.query_selector_all("[data-testid=stException]"), self.text()
        assert not self.troubles
        wide, room = self.page.evaluate("[document.body.scrollWidth, window.innerWidth]")
        assert wide <= room


def dashboard(store: Path, bundles: Path) -> AbstractContextManager[tuple[str, int]]:
    """The dashboard on this store and these bundles: its address and its process id."""
    return served(stageline("dashboard", "--store", str(store), "--bundles", str(bundles)))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = launched(started)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def store(filled_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that pages may add runs to."""
    return Path(shutil.copy(filled_store, tmp_path_factory.mktemp("browser") / "bench.sqlite"))


@pytest.fixture(scope="module")
def server(store: Path, bundles: Path) -> Iterator[str]:
    with dashboard(store, bundles) as (url, _):
        yield url


@pytest.fixture
def window(browser: Any, server: str) -> Iterator[Callable[..., Window]]:
    """Opens windows of the filled dashboard, or of another one."""
    contexts = []

    def opened(size: tuple[int, int] = WIDE, theme: str = "light", url: str = server) -> Window:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=theme)
        contexts.append(context)
        return Window(context.new_page(), url)

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize(("size", "theme"), [(WIDE, "light"), (NARROW, "dark")])
def test_every_page_is_whole_with_runs(size: tuple[int, int], theme: str, window: Callable[..., Window]) -> None:
    opened = window(size, theme)
    for head, path in PAGES.items():
        opened.open(path, head)
        opened.check()
        opened.check_accessible()


def test_every_page_says_what_to_do_in_an_empty_store(window: Callable[..., Window], tmp_path: Path) -> None:
    wanted = {
        "Overview": "stageline bench",
        "Timeline": "stageline bench",
        "Compare": "stageline bench",
        "Run a benchmark": "stageline export",
        "Live": "stageline serve",
        "Plan": "stageline export",
        "Engines": "stageline export",
        "Environment": "onnxruntime",
    }
    (tmp_path / "none").mkdir()
    with dashboard(tmp_path / "bench.sqlite", tmp_path / "none") as (url, _):
        opened = window(NARROW, "light", url)
        for head, path in PAGES.items():
            opened.open(path, head)
            opened.await_text(wanted[head])
            opened.check()


def test_overview_opens_a_run_by_its_link(window: Callable[..., Window], store: Path) -> None:
    older = Store(store).find("latest~1")
    opened = window()
    opened.open(f"/?run={older}", "Overview")
    for text in (f"Run {older}", "llama, 2 stages", "Throughput", "tokens/s"):
        opened.await_text(text)
    opened.open("/?run=nonsense", "Overview")
    opened.await_text("has no run nonsense")
    opened.check()


def test_two_runs_are_compared_by_their_link(window: Callable[..., Window], store: Path) -> None:
    found = Store(store)
    opened = window()
    opened.open(f"/compare?runs={found.find('latest~1')},{found.find('latest')}", "Compare")
    for text in ("Percentiles", "Distribution", "Over time"):
        opened.await_text(text)
    opened.page.locator(f"{CHART} >> nth=2").wait_for()
    with opened.page.expect_download() as download:
        opened.press("Download JSON")
    assert json.loads(Path(download.value.path()).read_text())[0]["run"] == found.find("latest~1")
    with opened.page.expect_download() as download:
        opened.press("Download CSV")
    rows = Path(download.value.path()).read_text().splitlines()
    assert rows[0].startswith("run,bundle,created,contender,load,figure,unit,mean")
    assert any("latency_p99_s" in row for row in rows)
    opened.check()


def test_plan_predicts_another_cut(window: Callable[..., Window]) -> None:
    opened = window()
    opened.open("/plan?bundle=llama", "Plan")
    opened.await_text("Predicted throughput")
    before = opened.text()
    slider = opened.page.get_by_role("slider").first
    slider.focus()
    slider.press("ArrowRight" if slider.get_attribute("aria-valuenow") == "1" else "ArrowLeft")
    opened.await_text("stageline recut")
    opened.await_text("against the bundle's cut")
    assert opened.text() != before
    opened.check()


def order(opened: Window, seconds: str) -> None:
    """Ask for a short benchmark of one load: by the address, which holds the whole form."""
    fields = f"seconds={seconds}&repeats=2&concurrency=2&scenarios=&baselines="
    opened.open(f"/run?bundle=llama&{fields}", "Run a benchmark")
    opened.await_text(f"--seconds {seconds} --repeats 2 --concurrency 2 --new-tokens 32 --store")
    opened.press("Start")


def pointed_at(opened: Window) -> str:
    """The tooltip of a micro-batch in the Timeline's chart: points near its middle until it hits one."""
    chart = opened.page.locator("[data-testid=stVegaLiteChart]").first
    tip = opened.page.locator("#vg-tooltip-element")
    shown, end = "", time.monotonic() + 20  # the chart is drawn, and moves, while the page still loads
    for share, height in itertools.cycle(itertools.product(np.linspace(0.35, 0.65, 40), (0.42, 0.5))):
        chart.scroll_into_view_if_needed()
        if (box := chart.bounding_box()) is not None:
            opened.page.mouse.move(box["x"] + box["width"] * share, box["y"] + box["height"] * height)
            opened.page.wait_for_timeout(60)
            shown = str(tip.inner_text()) if tip.count() and tip.is_visible() else ""
        if "micro-batch" in shown or time.monotonic() > end:
            break
    return shown


def test_timeline_shows_shapes_and_times_of_what_is_pointed_at(window: Callable[..., Window]) -> None:
    opened = window()
    opened.open("/timeline", "Timeline")  # the newest run, whichever test made it
    begin, end = map(float, re.findall(r"s of ([0-9.]+) to ([0-9.]+)", opened.text())[0])
    for label in ("Later", "Earlier", "Zoom in", "Longest bubble", "Zoom out", "Whole recording", "Zoom out"):
        opened.press(label)
        opened.page.wait_for_timeout(500)  # the click is on its way
        opened.settled()
        low, high = (float(one) for one in re.findall(r"(?:from|to)=([0-9.]+)", opened.page.url))
        assert begin - 1e-3 <= low < high <= end + 1e-3
    assert (low, high) == pytest.approx((begin, end), abs=1e-3)  # not beyond what was recorded
    with opened.page.expect_download() as download:
        opened.press("Download for Perfetto")
    assert json.loads(Path(download.value.path()).read_text())["traceEvents"]
    opened.open("/timeline", "Timeline")
    shown = pointed_at(opened)
    assert re.search(r"\d+ × \d+ tokens", shown), opened.text()
    assert "took (ms)" in shown
    assert "stage" in shown
    opened.check()


def test_benchmark_runs_to_its_end_whoever_looks(window: Callable[..., Window], store: Path) -> None:
    before = len(Store(store).runs())
    opened, other = window(), window(NARROW, "dark")
    order(opened, "2")
    opened.button("Cancel").wait_for(timeout=40_000)
    other.page.goto(other.url + "/run?bundle=llama")  # a second browser sees it, and cannot start another
    other.button("Cancel").wait_for(timeout=40_000)
    assert other.button("Start").is_disabled()
    opened.await_text("so far")
    opened.page.reload()
    opened.await_text("Done: llama")
    assert "2 at a time" in str(Store(store).runs(1)[0].headlines)
    assert len(Store(store).runs()) == before + 1
    assert Store(store).runs(1)[0].status == "done"
    opened.check()
    other.await_text("Done: llama")
    other.check()


def test_benchmark_is_cancelled_from_the_page(window: Callable[..., Window], store: Path) -> None:
    opened = window()
    order(opened, "40")
    opened.await_text("2 at a time, repeat 1 of 2")
    opened.press("Cancel")
    opened.await_text("Cancelled")
    assert Store(store).runs(1)[0].status == "cancelled"
    opened.check()


def test_form_of_a_benchmark_is_checked_and_never_measures_another_bundle(
    window: Callable[..., Window], bundles: Path, store: Path
) -> None:
    before = len(Store(store).runs())
    opened = window()
    opened.open("/run?bundle=llama", "Run a benchmark")
    opened.await_text("--baseline onnxruntime")
    opened.press("Quick")
    opened.await_text("--seconds 1 --repeats 2 --scenario SingleStream --concurrency 4")
    for label, value, said in (
        ("Seconds per repeat", "0", "Seconds per repeat: 0, give 0.1 to 3600"),
        ("Requests at a time", "abc", "Concurrency 'abc' is not a list of numbers"),
    ):
        field = opened.page.get_by_label(label, exact=True).first
        field.fill(value)
        field.press("Enter")
        opened.await_text(said)
    assert opened.button("Start").is_disabled()
    opened.page.reload()  # the address holds what was typed
    opened.await_text("Concurrency 'abc' is not a list of numbers")
    opened.press("Sweep")
    opened.await_text("--sweep --seconds 5 --repeats 6")
    opened.press("Standard")
    opened.await_text("--seconds 5 --repeats 3 --scenario SingleStream,Offline --concurrency 2,4,8")
    gone = shutil.copytree(bundles / "llama", bundles / "gone")
    opened.open("/run?bundle=gone", "Run a benchmark")
    opened.await_text("gone --seconds")
    shutil.rmtree(gone)
    opened.press("Start")
    opened.await_text("The bundle gone is not in")
    assert len(Store(store).runs()) == before
    opened.check()


def test_live_starts_watches_and_stops_a_service(window: Callable[..., Window], browser: Any) -> None:
    opened, other = window(), window(NARROW, "dark")
    opened.open("/live", "Live")
    opened.press("Start")
    opened.await_text("Tokens/s")
    (address,) = re.findall(r"llama at (http://127.0.0.1:\d+)", opened.text())
    assert opened.page.get_by_label("Service", exact=True).input_value() == address
    opened.press("Send requests for a minute")
    opened.await_text("Sending requests for")
    opened.page.wait_for_function("() => /Tokens\\/s\\s+[0-9,.]*[1-9]/.test(document.body.innerText)", timeout=30_000)
    opened.page.locator(CHART).first.wait_for()
    drawn = opened.page.query_selector_all(CHART)
    opened.page.wait_for_timeout(4500)  # two readings
    assert all(one.evaluate("one => one.isConnected") for one in drawn), "charts are drawn again instead of moved on"
    opened.press("Stop sending")
    opened.button("Send requests for a minute").wait_for()
    opened.page.get_by_text("1 min", exact=True).click()
    opened.page.wait_for_function("() => location.search.includes('range=')")
    opened.page.reload()  # the address holds the service and the range
    opened.await_text("Tokens/s")
    other.open("/live", "Live")  # a second browser sees the service, and can watch it
    other.await_text("No service to watch yet")
    other.press("Watch")
    other.await_text("Tokens/s")
    other.press("Stop llama")
    opened.await_text("Nothing answers at")
    opened.await_text("UTC, and goes on when the service is back")
    assert re.search(r"at \d\d:\d\d:\d\d UTC", opened.text())  # on the cards
    opened.check()
    other.check()


def test_live_says_what_a_service_with_a_key_says(window: Callable[..., Window], bundles: Path) -> None:
    command = stageline("serve", str(bundles / "llama"), "--port", "0", "--api-key", "sekret")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        opened = window()
        opened.open(f"/live?url={address.removeprefix('http://')}", "Live")
        opened.press("Send requests for a minute")
        opened.await_text("The service refused the request with status 401: send the service's API key")
        opened.page.get_by_label("API key", exact=True).fill("sekret")
        opened.page.get_by_label("API key", exact=True).press("Enter")
        opened.press("Send requests for a minute")
        opened.page.wait_for_function(
            "() => /Tokens\\/s\\s+[0-9,.]*[1-9]/.test(document.body.innerText)", timeout=30_000
        )
        assert "sekret" not in opened.page.url
        process.kill()  # while it is watched
        opened.await_text("Nothing answers at")
        opened.await_text("UTC, and goes on when the service is back")
        opened.check()
        opened.open("/live?url=http://10.255.255.1:8000", "Live")
        opened.await_text("http://10.255.255.1:8000 is not on this machine")
        opened.check()
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def own(bundles: Path) -> Iterator[Path]:
    """A bundle among the server's that may be changed."""
    copy = Path(shutil.copytree(bundles / "llama", bundles / "own"))
    yield copy
    shutil.rmtree(copy, ignore_errors=True)


def test_machine_layers_and_cuts_are_measured_from_the_pages(window: Callable[..., Window], own: Path) -> None:
    opened, other = window(), window(NARROW, "dark")
    opened.open("/plan?bundle=own", "Plan")
    opened.await_text("This machine is not measured yet")
    opened.press("Profile")
    opened.await_text("Profiling own")
    other.open("/run?bundle=llama", "Run a benchmark")  # a second browser cannot disturb it
    assert other.button("Start").is_disabled()
    other.open("/engines?bundle=own", "Engines")
    other.await_text("Profiling own")
    opened.button("Profile again").wait_for(timeout=90_000)
    assert "This machine is not measured yet" not in opened.text()
    PRESSED.add(("Plan", "Profile again"))  # the same button
    other.button("Time its layers").wait_for(timeout=40_000)
    other.settled()
    other.press("Time its layers")
    other.await_text("The heaviest layer is")
    other.page.locator(CHART).first.wait_for()
    other.check()
    opened.press("Measure this cut")
    opened.await_text("Measuring own")
    opened.press("Cancel")
    opened.await_text("Cancelled")
    opened.check()
    opened.open("/plan?bundle=own", "Plan")
    opened.button("Measure this cut").wait_for()
    shutil.rmtree(own)
    opened.press("Measure this cut")
    opened.await_text("The bundle own is not in")
    opened.check()


def unprivileged(command: list[str]) -> list[str]:
    """For root, too, a file may be read-only."""
    return ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all", *command] if os.geteuid() == 0 else command


def test_stores_that_fail_under_a_running_dashboard_are_told_and_it_goes_on(
    window: Callable[..., Window], filled_store: Path, bundles: Path, tmp_path: Path
) -> None:
    store, whole = tmp_path / "bench.sqlite", filled_store.read_bytes()

    def put(data: bytes | None) -> None:
        for name in ("bench.sqlite", "bench.sqlite-wal", "bench.sqlite-shm"):
            (tmp_path / name).unlink(missing_ok=True)
        if data is not None:
            store.write_bytes(data)

    command = unprivileged(stageline("dashboard", "--store", str(store), "--bundles", str(bundles)))
    newer = whole[:60] + (99).to_bytes(4, "big") + whole[64:]  # SQLite's user_version
    with served(command) as (url, process):
        opened = window(WIDE, "light", url)
        for data, said in (
            (None, "No benchmark run yet"),
            (whole[:4096] + bytes(len(whole) - 4096), "is damaged"),
            (newer, "install a newer stageline"),
            (whole, "llama, 2 stages"),
        ):
            put(data)
            opened.open("/", "Overview")
            opened.await_text(said)
        store.chmod(0o400)
        order(opened, "1")
        opened.await_text("is read-only; make it writable")
        store.chmod(0o600)
        # Room for what SQLite keeps beside a file that is read, and for no more, as on a full disk.
        resource.prlimit(process, resource.RLIMIT_FSIZE, (32768, resource.RLIM_INFINITY))
        order(opened, "1")
        opened.await_text("everything stored before is kept")
        resource.prlimit(process, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        opened.open("/", "Overview")
        opened.await_text("llama, 2 stages")
        opened.check()


def test_a_read_only_dashboard_starts_nothing(window: Callable[..., Window], filled_store: Path, bundles: Path) -> None:
    command = stageline("dashboard", "--store", str(filled_store), "--bundles", str(bundles), "--read-only")
    with served(command) as (url, _):
        opened = window(NARROW, "dark", url)
        opened.open("/run?bundle=llama", "Run a benchmark")
        opened.await_text("stageline bench")
        assert opened.button("Start").is_disabled()
        for head, path in (("Plan", "/plan"), ("Engines", "/engines"), ("Live", "/live?url=http://127.0.0.1:9")):
            opened.open(path, head)
            assert opened.page.locator(BUTTONS).count() == 0
        opened.check()


def test_every_button_of_every_page_was_pressed(request: pytest.FixtureRequest) -> None:
    here = {item.name for item in request.session.items if item.path == request.path}
    if len(here) < sum(line.startswith("def test_") for line in request.path.read_text().splitlines()):
        pytest.skip("the other tests of this file press them, and not all of them ran")
    assert SEEN
    assert set() == SEEN - PRESSED
