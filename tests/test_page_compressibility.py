"""The page of compressibility: readable without scripts, watched while it is written, and safe with any name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

import qvis
from qvis.adapters.digits import load_digits_model, load_digits_samples
from qvis.analysis.sizes import Compressibility, kept_db
from qvis.report.compressibility import render_html, summarize
from qvis.report.document import jsonable
from qvis.words import size, visible
from tests.browser import AWKWARD_NAMES, WIDE, opened, part

pytestmark = pytest.mark.browser
NARROW = {"width": 400, "height": 800}


@pytest.fixture(scope="module")
def measured() -> Compressibility:
    """The shipped model, partly measured."""
    inputs, labels = load_digits_samples()
    made = qvis.compressibility(load_digits_model(), inputs, labels=labels, samples=8, probes=2)
    list(islice(made.measure(), 40))
    return made


@pytest.fixture(scope="module")
def page_of(measured: Compressibility, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a page of the document, changed by a function."""

    def make(change: Callable[[Any], object] = lambda _: None) -> Path:
        document = copy.deepcopy(summarize(measured))
        change(document)
        path = tmp_path_factory.mktemp("page") / "compressibility.html"
        path.write_text(render_html(document), encoding="utf-8")
        return path

    return make


def select(page: Page, name: str) -> None:
    page.locator("[data-test=layer-row] td.name").get_by_text(visible(name), exact=True).click()
    expect(part(page, "detail-name")).to_have_text(visible(name))


def test_a_layer_is_told_of_in_words_and_curves(
    browser: Browser, page_of: Callable[..., Path], measured: Compressibility
) -> None:
    with opened(browser, page_of()) as page:
        rows = part(page, "layer-row")
        expect(rows).to_have_count(len(measured.layers))
        expect(part(page, "detail-name")).to_have_text(measured.ranked[0].name)
        expect(part(page, "state")).to_contain_text("Interrupted: 40 of")
        expect(part(page, "verdict")).to_contain_text("could be saved")
        layer = next(one for one in measured.layers if one.spectrum is not None and one.weights > 1000)
        select(page, layer.name)
        curves = part(page, "curves")
        expect(curves.locator("svg")).to_be_visible()
        assert len(layer.curves) == 6
        expect(curves.locator(".chart-keys span")).to_have_count(6)
        expect(part(page, "ranks")).to_contain_text(f"of {len(layer.spectrum.values)}")
        expect(part(page, "spectrum").locator("svg")).to_be_visible()
        expect(part(page, "entropies").locator("rect.bar")).to_have_count(5)
        assert page.url.endswith(f"#layer={layer.name}")
        depthwise = next(one for one in measured.layers if one.spectrum is None)
        select(page, depthwise.name)
        expect(part(page, "ranks")).to_contain_text("groups")
        expect(part(page, "spectrum")).to_be_hidden()
        expect(part(page, "offers")).to_contain_text("groups")


def test_a_link_and_keys_choose_the_layer(
    browser: Browser, page_of: Callable[..., Path], measured: Compressibility
) -> None:
    order = [layer.name for layer in measured.ranked]
    with opened(browser, page_of(), layer=order[3]) as page:
        expect(part(page, "detail-name")).to_have_text(order[3])
        page.keyboard.press("j")
        expect(part(page, "detail-name")).to_have_text(order[4])
        page.keyboard.press("k")
        page.keyboard.press("k")
        expect(part(page, "detail-name")).to_have_text(order[2])
        page.keyboard.press("/")
        page.keyboard.type("depthwise")
        expect(part(page, "layer-row").filter(visible=True)).to_have_count(sum("depthwise" in one for one in order))
        part(page, "filter").fill("no such layer")
        expect(part(page, "count")).to_have_text(f"0 of {len(order)}")
        part(page, "empty").get_by_role("button").click()
        expect(part(page, "count")).to_have_text(f"{len(order)} layers")


def test_the_tables_can_be_sorted(browser: Browser, page_of: Callable[..., Path], measured: Compressibility) -> None:
    with opened(browser, page_of()) as page:
        page.locator(".layers thead button", has_text="Now").click()
        largest = max(measured.layers, key=lambda layer: layer.bytes).bytes
        first = part(page, "layer-row").first.locator("td.now")
        expect(first).to_have_attribute("data-v", str(largest))
        page.locator("#scores thead button", has_text="Measured dB").click()
        most = page.locator("#scores tbody tr").first.locator("td").nth(5)
        kept = [kept_db(one.damage) for one in measured.scores if not one.trial.all_layers]
        expect(most).to_have_text(f"{max(kept):.1f}")


def test_the_curves_come_as_numbers(browser: Browser, page_of: Callable[..., Path], measured: Compressibility) -> None:
    with opened(browser, page_of()) as page:
        with page.expect_download() as download:
            part(page, "download-csv").click()
        lines = Path(download.value.path()).read_text().splitlines()
        points = sum(len(curve.points) for layer in measured.layers for curve in layer.curves.values())
        assert lines[0] == "layer,method,setting,bytes,of bytes,predicted dB,measured dB"
        assert len(lines) == 1 + points


def test_what_is_saved_holds_what_was_found(
    browser: Browser, page_of: Callable[..., Path], measured: Compressibility
) -> None:
    with opened(browser, page_of()) as page:
        with page.expect_download() as download:
            part(page, "download-json").click()
        assert json.loads(Path(download.value.path()).read_text()) == jsonable(summarize(measured))


def test_layers_are_copied_as_markdown(
    browser: Browser, page_of: Callable[..., Path], measured: Compressibility
) -> None:
    with opened(browser, page_of(), permissions=["clipboard-read", "clipboard-write"]) as page:
        part(page, "copy-markdown").click()
        expect(part(page, "toast")).to_have_text("Copied as Markdown")
        lines = page.evaluate("navigator.clipboard.readText()").splitlines()
    assert lines[0] == f"**{measured.verdict}**"
    assert lines[2] == "| layer | op | now | best way within 30 dB | then | keeps | per dB |"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert [row[0].replace("\\", "") for row in rows] == [layer.name for layer in measured.ranked]
    assert [row[2] for row in rows] == [size(layer.bytes) for layer in measured.ranked]


def test_on_a_phone_the_panel_opens_below_its_row(
    browser: Browser, page_of: Callable[..., Path], measured: Compressibility
) -> None:
    name = measured.ranked[2].name
    with opened(browser, page_of(), viewport=NARROW) as page:
        expect(part(page, "ways")).to_be_hidden()
        select(page, name)
        expect(page.locator("tr.on + tr.inline [data-test=ways]")).to_be_visible()
        expect(part(page, "detail-name")).to_be_in_viewport()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("location.hash") == f"#layer={name}"
        page.locator("tr.on td.name").click()
        expect(part(page, "ways")).to_be_hidden()
        assert page.evaluate("location.hash") == ""


def test_it_reads_without_scripts(browser: Browser, page_of: Callable[..., Path], measured: Compressibility) -> None:
    with opened(browser, page_of(), java_script_enabled=False) as page:
        expect(part(page, "layer-row")).to_have_count(len(measured.layers))
        assert part(page, "score").count() == sum(not one.trial.all_layers for one in measured.scores)
        expect(part(page, "plan").first).to_contain_text("%")
        expect(part(page, "ways")).to_be_hidden()


def test_a_page_that_is_written_meanwhile_loads_itself_anew(browser: Browser, page_of: Callable[..., Path]) -> None:
    def running(document: Any) -> None:
        document["progress"] |= {"state": "running", "done": 1, "remaining_seconds": 90.0}

    path = page_of(running)
    final = page_of().read_text()
    with opened(browser, path) as page:
        expect(part(page, "state")).to_contain_text("1 of")
        expect(part(page, "state")).to_contain_text("about 90 s to go")
        chosen = part(page, "layer-row").nth(2).locator("td.name a").inner_text()
        select(page, chosen)
        path.write_text(final)
        expect(part(page, "progress")).to_have_attribute("data-state", "interrupted")
        expect(part(page, "detail-name")).to_have_text(chosen)
        assert page.evaluate("document.querySelector('meta[http-equiv=refresh]')") is None


def test_names_do_no_harm(browser: Browser, page_of: Callable[..., Path]) -> None:
    def rename(document: Any) -> None:
        new = dict(zip((one["name"] for one in document["layers"]), AWKWARD_NAMES, strict=False))
        for one in document["layers"]:
            one["name"] = new.get(one["name"], one["name"])
        for one in document["scores"]:
            one["layer"] = new.get(one["layer"], one["layer"])

    with opened(browser, page_of(rename), viewport=NARROW) as page:
        for name in AWKWARD_NAMES:
            page.evaluate("name => { location.hash = `layer=${encodeURIComponent(name)}`; }", name)
            expect(part(page, "detail-name")).to_have_text(visible(name))
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_any_number_of_layers_fits(browser: Browser, page_of: Callable[..., Path], count: int) -> None:
    def repeat(document: Any) -> None:
        layers = document["layers"]
        document["layers"] = [
            {**layers[i % len(layers)], "name": f"block.{i}.linear", "rank": i + 1} for i in range(count)
        ]
        document["scores"] = []

    with opened(browser, page_of(repeat), viewport=WIDE) as page:
        expect(part(page, "layer-row")).to_have_count(count)
        expect(part(page, "detail-name")).to_have_text("block.0.linear")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_model_of_which_nothing_is_left_is_told_in_words(browser: Browser, page_of: Callable[..., Path]) -> None:
    def empty(document: Any) -> None:
        document.update(
            layers=[], scores=[], together=[], skipped=[{"name": "a", "reason": "all its weights are zero"}]
        )

    with opened(browser, page_of(empty)) as page:
        expect(part(page, "not-read")).to_contain_text("all its weights are zero")


def test_what_is_not_predicted_is_not_drawn(browser: Browser, page_of: Callable[..., Path]) -> None:
    def forget(document: Any) -> None:
        for layer in document["layers"]:
            for curve in layer["curves"].values():
                curve["predicted_db"] = [None] * len(curve["predicted_db"])
                curve["measured_db"] = [None] * len(curve["measured_db"])

    with opened(browser, page_of(forget)) as page:
        expect(part(page, "curves").locator("path.line")).to_have_count(0)
