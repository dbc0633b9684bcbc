"""Opening a report: offline, in silence, under its own policy, without JavaScript, the same bytes each time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from qvis.report import Report
from qvis.words import visible
from tests.browser import AWKWARD_NAMES, ESCAPED, EVIL, TURNED, go_to, link, opened, part, selected, shown_rows

pytestmark = pytest.mark.browser
Reports = Callable[[str], Report]
Shared = Callable[[str], Page]
Visit = Callable[..., Page]

ALL = ("relative", "ranges", "awkward", "one", "three", "digits", "changes", "awkward changes", "nothing in common")


def marked_row(page: Page) -> str | None:
    return page.locator("tr[aria-current=true] td.name a").get_attribute("title")


def ranked_names(report: Report) -> list[str]:
    layers = sorted(report.to_dict()["layers"], key=lambda layer: layer["rank"])
    return [visible(layer["name"]) for layer in layers]


@pytest.mark.parametrize("name", ALL)
def test_a_page_opens_offline_from_its_file_in_silence(shared_page: Shared, report: Reports, name: str) -> None:
    page = shared_page(name)
    assert page.watch.messages == []
    downloads = [url for url in page.watch.requests if url.startswith("blob:")]  # of tests that had the page before
    assert [url for url in page.watch.requests if url not in downloads] == [report(name).path.as_uri()]
    assert part(page, "verdict").inner_text().replace("\u00a0", " ") == visible(report(name).verdict)
    assert int(page.evaluate("document.documentElement.dataset.ready")) > 0
    if report(name).layers:
        assert page.evaluate("Bokeh.version").split("-")[0] == re.match(r"\d+\.\d+\.\d+", version("bokeh"))[0]
        assert page.locator("[data-test=figure-ranges] canvas").count() > 0


@pytest.mark.parametrize("name", ["relative", "awkward", "changes"])
def test_a_page_refers_to_nothing_outside_itself(visit: Visit, report: Reports, name: str) -> None:
    references = visit(name).evaluate(
        "[...document.querySelectorAll('*')].flatMap(e => ['src', 'srcset', 'href', 'data', 'action', 'poster']"
        ".map(a => e.getAttribute(a)).filter(Boolean)).filter(r => !r.startsWith('#') && !r.startsWith('data:'))"
    )
    assert references == []
    styles = "".join(re.findall(r"<style>(.*?)</style>", report(name).path.read_text(encoding="utf-8"), re.DOTALL))
    assert styles
    assert "url(" not in styles
    assert "@import" not in styles


def test_the_policy_of_a_page_stops_what_is_not_its_own(browser: Browser, report: Reports) -> None:
    with opened(browser, report("one").path) as page:
        page.evaluate(
            """() => {
                window.ran = [];
                window.stopped = [];
                addEventListener("securitypolicyviolation", (e) => window.stopped.push(e.violatedDirective));
                const script = document.createElement("script");
                script.textContent = "window.ran.push('script')";
                document.body.append(script);
                document.body.insertAdjacentHTML("beforeend", "<img src='data:,' onerror='window.ran.push(1)'>");
                setTimeout(() => { try { (0, eval)("window.ran.push('eval')"); } finally { window.tried = true; } });
            }"""
        )
        reached = page.evaluate("fetch('https://example.com/').then(() => true, () => false)")
        assert page.evaluate("new Promise(done => setTimeout(() => done(window.tried)))")
        page.wait_for_function(
            "['script-src-elem', 'script-src-attr', 'script-src', 'connect-src'].every(d => window.stopped.includes(d))"
        )
        assert page.evaluate("window.ran") == []
        assert not reached
        assert any("script-src" in message for message in page.watch.messages)
        page.watch.messages.clear()
        page.watch.requests.clear()


def test_names_and_titles_that_look_like_markup_stay_text(visit: Visit) -> None:
    page = visit("awkward", EVIL)
    assert page.title().startswith(EVIL)
    assert EVIL in part(page, "identity").inner_text()
    assert page.locator("img").count() == 0
    assert set(shown_rows(page)) == {visible(name) for name in AWKWARD_NAMES}


@pytest.mark.parametrize("name", ["relative", "awkward", "many", "changes"])
def test_a_page_reads_without_javascript(browser: Browser, report: Reports, name: str) -> None:
    with opened(browser, report(name).path, java_script_enabled=False) as page:
        rows = part(page, "layer-row")
        names = ranked_names(report(name))
        assert rows.count() == len(names)
        assert rows.locator("td.name").all_inner_texts() == names
        expect(rows.last).to_be_visible()
        expect(part(page, "verdict")).to_be_visible()
        expect(part(page, "overview")).to_be_visible()
        assert page.locator(".stems i").count() == len(names)
        part(page, "glossary").locator("summary").click()
        expect(page.get_by_text("Linear interpolation between the sorted weights")).to_be_visible()
        for script_only in ("filter", "copy-markdown", "download-csv", "download-json", "theme", "help", "detail"):
            expect(part(page, script_only)).to_be_hidden()


def test_a_link_to_a_layer_leads_to_its_row_without_javascript(browser: Browser, report: Reports) -> None:
    path = report("awkward").path
    with opened(browser, path, java_script_enabled=False) as page:
        for layer in AWKWARD_NAMES:
            page.goto(link(path, layer))
            expect(page.locator("tr:target td.name a")).to_have_attribute("title", visible(layer))


@pytest.mark.parametrize("layer", [EVIL, TURNED, ESCAPED])
def test_a_link_to_a_layer_opens_it(browser: Browser, report: Reports, layer: str) -> None:
    with opened(browser, report("awkward").path, layer=layer) as page:
        assert selected(page) == visible(layer)
        assert marked_row(page) == visible(layer)
        assert part(page, "figure-ranges").get_attribute("aria-label").count(visible(layer)) == 1


@pytest.mark.parametrize("layer", AWKWARD_NAMES)
def test_a_changed_address_shows_its_layer(visit: Visit, layer: str) -> None:
    page = visit("awkward", layer)
    assert selected(page) == visible(layer)
    assert marked_row(page) == visible(layer)
    assert page.evaluate("decodeURIComponent(location.hash)") == f"#layer={layer}"


@pytest.mark.parametrize("address", ["#layer=no%20such%20layer", "#layer=%E0%A4%A", "#layer=", "#glossary"])
def test_a_link_that_names_no_layer_changes_nothing(visit: Visit, address: str) -> None:
    page = visit("relative", "tokens")
    go_to(page, address.removeprefix("#"))
    assert selected(page) == "tokens"


def test_a_page_opened_with_a_broken_link_shows_the_worst_layer(browser: Browser, report: Reports) -> None:
    with opened(browser, report("relative").path, layer="no such layer") as page:
        assert selected(page) == ranked_names(report("relative"))[0]


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.browser import make_report\n"
        "for name in ('relative', 'ranges', 'changes'):\n"
        "    make_report(name, Path(sys.argv[1]))\n"
    )
    folders = [tmp_path / "first", tmp_path / "second"]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script, folder],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        for folder, seed in zip(folders, ("1", "2"), strict=True)
    ]
    assert [run.wait() for run in runs] == [0, 0]
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert set(first) == {"relative_weight_ranges.html", "weight_ranges.html", "changes_after_optimization.html"}
    assert first == second
