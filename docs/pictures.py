"""Makes docs/images from the real dashboard, in Chromium: every page of a store, wide and narrow, light and dark.

    python docs/pictures.py --store bench.sqlite --bundles bundles [--page overview --page compare]

Needs the extras dashboard and dev, and /usr/bin/chromium. Look at what it made.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))
from chromium import READY, launched, served  # noqa: E402

IMAGES = ROOT / "docs" / "images"
PAGES = {
    "overview": "/",
    "timeline": "/timeline",
    "compare": "/compare",
    "run": "/run",
    "live": "/live",
    "plan": "/plan",
    "engines": "/engines",
    "environment": "/environment",
}
WIDE, NARROW = (1280, 800), (390, 844)
SHAPES = {"": (WIDE, "light"), "-dark": (WIDE, "dark"), "-phone": (NARROW, "light"), "-dark-phone": (NARROW, "dark")}
TALLEST = {WIDE: 1200, NARROW: 2600}
"""Pictures end here, in pixels."""


def main() -> None:
    """See the module."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--bundles", type=Path, required=True)
    parser.add_argument("--page", action="append", choices=PAGES, help="only this page (repeatable)")
    given = parser.parse_args()
    from playwright.sync_api import sync_playwright

    command = [str(Path(sys.executable).with_name("stageline")), "dashboard",
               "--store", str(given.store), "--bundles", str(given.bundles)]  # fmt: skip
    with served(command) as (url, _), sync_playwright() as playwright:
        browser = launched(playwright)
        for name in given.page or PAGES:
            for suffix, (size, theme) in SHAPES.items():
                print(photograph(browser, url + PAGES[name], IMAGES / f"{name}{suffix}.png", size, theme))
        browser.close()


def photograph(browser: Any, address: str, file: Path, size: tuple[int, int], theme: str) -> Path:
    """A page from its head down to its end, or to TALLEST."""
    width, height = size
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
    page.goto(address)
    page.wait_for_function(READY, timeout=60_000)
    whole = int(page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight"))
    page.set_viewport_size({"width": width, "height": max(height, min(TALLEST[size], whole))})
    page.wait_for_timeout(1500)  # charts follow the window
    page.evaluate("document.querySelector('[data-testid=stMain]').scrollTop = 0")
    page.screenshot(path=str(file))
    page.close()
    return file


if __name__ == "__main__":
    main()
