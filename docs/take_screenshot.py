"""Takes the screenshot that the README shows: the report of the shipped model, judged on pictures that come with it.

Run ``make screenshot`` after the look of the page has changed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from qvis import analyze, visualize_relative_weight_ranges
from qvis.adapters.digits import load_digits_model, load_digits_samples

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.browser import launch

TARGET = Path(__file__).parent / "images" / "report.png"


def main() -> None:
    """Write ``docs/images/report.png``."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        analysis = analyze(load_digits_model(), inputs=load_digits_samples()[0], measure="top")
        report = visualize_relative_weight_ranges(analysis, folder)
        assert report.path is not None
        browser = launch(playwright)
        page = browser.new_page(viewport={"width": 1440, "height": 1150}, color_scheme="light")
        page.goto(report.path.as_uri())
        page.wait_for_selector("html[data-drawn]")
        page.wait_for_timeout(500)  # the small figures are drawn when the page is idle
        TARGET.parent.mkdir(exist_ok=True)
        page.screenshot(path=TARGET)
        browser.close()
    print(TARGET)


if __name__ == "__main__":
    main()
