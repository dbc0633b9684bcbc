"""The panel of a layer after the model was run, against the document that the page is made from."""

from __future__ import annotations

import base64
import copy
import json
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

import qvis
from qvis.adapters.digits import load_digits_model
from qvis.report.document import Document, summarize
from qvis.report.html import render_html
from tests.browser import assert_shows, fold, number, opened, part, plot, points, show, unfold

pytestmark = pytest.mark.browser
NAN = float("nan")
WORST, MEASURED, LOOKED_UP, UNRUN, PREDICTED = (
    "blocks.0.depthwise", "blocks.0.expand", "blocks.0.project", "blocks.1.expand", "stem.conv"
)  # fmt: skip
"""Layers of the shipped model, some of which are made to be what their names here say."""


def edit(document: Document) -> Document:
    """Layers of which less is known: measured but not predicted, the other way round, nothing entering, not run."""
    document = copy.deepcopy(document)
    layers = {layer["name"]: layer for layer in document["layers"]}
    for layer in document["layers"]:
        known = layer["sensitivity"]
        for figures in (*known["weights"].values(), known["inputs"]):
            figures["value"] = figures["measured"] = [1.23 * value for value in figures["predicted"]]
            figures["confidence"] = ["measured"] * 5
        known["without"] = {one: 1.23 * value for one, value in known["predicted_without"].items()}
    known = layers[MEASURED]["sensitivity"]
    for figures in (*known["weights"].values(), known["inputs"]):
        figures |= {"predicted": [NAN] * 5, "spread": [NAN] * 5}
    for side in ("weight_grids", "entering"):
        known[side]["importance"] = np.zeros(64)
        known[side]["grids"] = [grid | {"damage": NAN} for grid in known[side]["grids"] if grid["method"] != "damage"]
    known = layers[PREDICTED]["sensitivity"]
    for figures in (*known["weights"].values(), known["inputs"]):
        figures |= {"value": figures["predicted"], "measured": [NAN] * 5, "confidence": ["high"] * 5}
    known["without"] = {"tensor": NAN, "channel": NAN}
    known = layers[LOOKED_UP]["sensitivity"]
    known |= {"inputs": None, "entering": None, "damage_inputs": NAN}
    layers[UNRUN] |= {"sensitivity": None, "stored": None, "remedies": []}
    return document


@pytest.fixture(scope="module")
def document() -> Document:
    inputs = np.random.default_rng(0).random((4, 1, 8, 8), dtype=np.float32)
    return edit(summarize(qvis.analyze(load_digits_model(), inputs=inputs, measure="none"), "sensitivity"))


@pytest.fixture(scope="module")
def path(document: Document, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("damage") / "sensitivity.html"
    path.write_text(render_html(document), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def shared(browser: Browser, path: Path) -> Iterator[Page]:
    with opened(browser, path) as page:
        yield page


@pytest.fixture
def page(shared: Page) -> Page:
    shared.locator("[name=which][value=quantized]").evaluate("e => { if (!e.checked) e.click(); }")
    return shared


def layer_of(document: Document, name: str) -> Document:
    found: Document = next(layer for layer in document["layers"] if layer["name"] == name)
    return found


def rows(page: Page, table: str) -> list[list[list[str]]]:
    """The cells of a table's body, each as its text and what stands small below."""
    found: list[list[list[str]]] = (
        part(page, table)
        .locator("tbody tr")
        .evaluate_all(
            """all => all.map(r => [...r.cells].map(c => [
                [...c.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join("").trim(),
                c.querySelector("small")?.textContent ?? ""]))"""
        )
    )
    return found


def groups(page: Page) -> dict[str, dict[str, list[list[str]]]]:
    """The table of damages: by what is rounded, and by predicted or measured, the cells."""
    found: dict[str, dict[str, list[list[str]]]] = {}
    for (head, *_), *cells in rows(page, "damage-table"):
        if cells:
            list(found.values())[-1][head] = cells
        else:
            found[head] = {}
    return found


HEADS = {"tensor": "Weights, one grid per tensor", "channel": "Weights, a grid per channel", "inputs": "What enters"}


def series(layer: Document) -> dict[str, Document]:
    known = layer["sensitivity"]
    return {HEADS[name]: figures for name, figures in (known["weights"] | {"inputs": known["inputs"]}).items()}


# ---------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", [WORST, MEASURED, PREDICTED, "head"])
def test_the_table_of_damages_shows_the_numbers_of_the_document(page: Page, document: Document, name: str) -> None:
    names = [layer["name"] for layer in document["layers"]]
    layer = layer_of(document, name if name in names else names[-1])
    show(page, layer["name"])
    expected = {head: figures for head, figures in series(layer).items() if figures}
    shown = groups(page)
    assert list(shown) == list(expected)
    for head, figures in expected.items():
        kinds = [kind for kind in ("predicted", "measured") if not np.isnan(figures[kind]).all()]
        assert list(shown[head]) == kinds
        for kind in kinds:
            for (text, small), value, spread in zip(shown[head][kind], figures[kind], figures["spread"], strict=True):
                assert_shows(text.removesuffix(" ?"), value, digits=2)
                assert text.endswith("?") == (kind == "predicted" and value >= 0.3)
                if kind == "predicted":
                    assert_shows(small.removeprefix("×÷ "), math.exp(spread), digits=2)
    rough = any(value >= 0.3 for figures in expected.values() for value in figures["predicted"])
    assert part(page, "unreliable").is_visible() == rough


@pytest.mark.parametrize("name", [WORST, MEASURED, PREDICTED])
def test_the_figure_of_damages_marks_what_was_predicted_and_what_was_measured(
    page: Page, document: Document, name: str
) -> None:
    show(page, name)
    marks = points(page, "damage", type="Scatter")
    words = ("weights, one grid per tensor", "weights, a grid per channel", "what enters")
    for what, figures in zip(words, series(layer_of(document, name)).values(), strict=True):
        for kind in ("predicted", "measured"):
            own = [i for i, w in enumerate(marks["what"]) if w == what and marks["how"][i].startswith(kind)]
            expected = [value for value in figures[kind] if value > 0]
            np.testing.assert_allclose([10 ** marks["y"][i] for i in own], expected, rtol=1e-3)
            assert all((marks["fill"][i] is None) == (kind == "predicted") for i in own)
    segments = points(page, "damage", type="Segment")
    figures = layer_of(document, name)["sensitivity"]["weights"]["tensor"]
    if name != MEASURED:
        assert segments["high"][0] == pytest.approx(
            math.log10(figures["predicted"][0]) + figures["spread"][0] / math.log(10), abs=1e-3
        )
    else:
        assert segments["x"] == []
    label = part(page, "figure-damage").get_attribute("aria-label") or ""
    assert "at 8 bits" in label
    assert "NaN" not in label


def test_the_facts_are_those_of_the_document(page: Page, document: Document) -> None:
    for name in (WORST, PREDICTED, LOOKED_UP):
        show(page, name)
        known = layer_of(document, name)["sensitivity"]
        alone, inputs, without, own, operations = rows(page, "damage-facts")
        for i, one in enumerate(("tensor", "channel"), 1):
            assert_shows(alone[i][0], known["weights"][one]["value"][0], digits=2)
            assert_shows(alone[i][1].split(",")[0], -10 * math.log10(known["weights"][one]["value"][0]), decimals=1)
            measured = name != PREDICTED
            value = (known["without"] if measured else known["predicted_without"])[one]
            assert_shows(without[i][0], value, digits=2)
            assert without[i][1].endswith("measured" if measured else "predicted")
            assert_shows(own[i][0], known["output_sqnr_db"][one], decimals=1)
        if known["inputs"]:
            assert_shows(inputs[1][0], known["inputs"]["value"][0], digits=2)
        else:
            assert inputs[1][0] == "n/a"
        assert operations[1][0] == f"{known['operations']:,}"
        assert_shows(operations[1][1].removesuffix(" of all"), known["share_of_operations"], digits=2)


def test_remedies_tell_what_they_leave_and_the_first_that_suffices_is_recommended(
    page: Page, document: Document
) -> None:
    show(page, WORST)
    remedies = layer_of(document, WORST)["remedies"]
    lines = part(page, "remedies").locator("li")
    assert [line.get_attribute("data-kind") for line in lines.all()] == [one["kind"] for one in remedies]
    first = next(i for i, one in enumerate(remedies) if one["damage"] <= 1e-3)
    for i, (line, remedy) in enumerate(zip(lines.all(), remedies, strict=True)):
        left = line.locator(".left").inner_text()
        if math.isnan(remedy["damage"]):
            assert left == "not known"
        elif remedy["damage"] == 0:
            assert left == "no damage"
        else:
            assert_shows(left, -10 * math.log10(remedy["damage"]), decimals=1)
        assert line.get_by_text("Recommended").count() == (i == first)
    show(page, PREDICTED)
    expect(part(page, "remedies")).to_be_hidden()


# ---------------------------------------------------------------------------------------------- distributions


@pytest.mark.parametrize("name", [WORST, MEASURED, PREDICTED])
@pytest.mark.parametrize(("side", "table"), [("weight_grids", "weight-grids"), ("entering", "entering-grids")])
def test_the_grids_are_those_of_the_document(page: Page, document: Document, name: str, side: str, table: str) -> None:
    show(page, name)
    grids = layer_of(document, name)["sensitivity"][side]["grids"]
    shown = rows(page, table)
    assert [cells[0][0] for cells in shown] == [grid["method"] for grid in grids]
    for (_, step, zero, ends, sqnr, damage), grid in zip(shown, grids, strict=True):
        assert_shows(step[0], grid["step"], digits=4)
        assert int(zero[0]) == grid["zero"]
        for text, end in zip(ends[0].split(" to "), (grid["low"], grid["high"]), strict=True):
            assert number(text) == pytest.approx(end, rel=2e-3, abs=1e-9)
        assert_shows(sqnr[0], grid["sqnr_db"], decimals=1)
        assert_shows(damage[0], grid["damage"], digits=2)
    known = not math.isnan(grids[0]["damage"])
    best = min(grids, key=lambda grid: grid["damage"]) if known else max(grids, key=lambda grid: grid["sqnr_db"])
    assert [cells[0][0] for cells in shown if "best" in cells[0][1]] == [best["method"]]
    summary = part(page, table).locator("summary").inner_text()
    assert summary.endswith(f"best by {'damage' if known else 'SQNR'}: {best['method']}")


@pytest.mark.parametrize(("side", "figure"), [("weight_grids", "weights"), ("entering", "entering")])
def test_the_bars_are_the_counts_and_the_lines_the_importance(
    page: Page, document: Document, side: str, figure: str
) -> None:
    show(page, WORST)
    known = layer_of(document, WORST)["sensitivity"][side]
    bars = points(page, figure, type="Quad")
    assert (bars["left"][0], bars["right"][-1]) == pytest.approx((known["low"], known["high"]), rel=1e-4)
    for column, values in (("counts", known["counts"]), ("importance", known["importance"])):
        heights = np.array(bars[column], dtype=float)
        used = values > 0
        expected = np.maximum(np.log10(values[used] / values.max()), -6)
        assert np.abs(heights[used] - expected).max() < 0.05
        empty = heights[~used]
        assert np.isnan(empty).all() if column == "importance" else (empty == bars["floor"][0]).all()
    (ends,) = [r["data"] for r in plot(page, figure)["renderers"] if "dash" in r["data"]]
    drawn = sorted({end for grid in known["grids"] for end in (grid["low"], grid["high"]) if end})
    np.testing.assert_allclose(sorted(set(ends["x"])), drawn, rtol=1e-3)
    assert sum(dash == "solid" for dash in ends["dash"]) in (1, 2)


def test_the_share_of_zeros_is_named(page: Page, document: Document) -> None:
    show(page, WORST)
    text = page.locator("[data-keys=entering]").inner_text()
    shown = re.search(r"([\d.]+\s%) exact zeros", text)
    assert shown
    assert_shows(shown[1], layer_of(document, WORST)["sensitivity"]["entering"]["zeros"], digits=2)


def test_ranges_of_input_channels_are_drawn_and_tabulated(page: Page, document: Document) -> None:
    show(page, WORST)
    expected = layer_of(document, WORST)["sensitivity"]["entering"]["channel_statistics"]
    drawn = points(page, "inputs", type="Scatter")
    for name in ("min", "mean", "max"):
        np.testing.assert_allclose(drawn[name], expected[name], rtol=1e-4)
    unfold(page, "entering-channels")
    shown = rows(page, "entering-channels")
    assert len(shown) == expected["min"].size
    for i, (channel, *cells) in enumerate(shown):
        assert channel[0] == str(i)
        for cell, name in zip(cells, ("min", "mean", "max"), strict=True):
            assert number(cell[0]) == pytest.approx(expected[name][i], rel=1e-3, abs=1e-9)
    drawn_at = plot(page, "inputs")["inner"]
    assert min(drawn_at) > 50, "a figure in what was closed is drawn when it opens"
    fold(page, "entering-channels")


# ---------------------------------------------------------------------------------------------- as stored


def test_the_switch_shows_the_weights_as_the_model_holds_them(page: Page, document: Document) -> None:
    show(page, WORST)
    layer = layer_of(document, WORST)
    for shown, label in ((layer, "as quantized"), (layer["stored"], "as stored"), (layer, "as quantized")):
        part(page, "which").get_by_text(label, exact=True).click()
        stored = shown is not layer
        note = part(page, "which").locator(".note")
        expect(note).to_contain_text("as the model holds them" if stored else "folded in, which is what gets rounded")
        for field in ("min", "max"):
            values = points(page, "ranges", y="mean", type="Scatter")[field]
            np.testing.assert_allclose(values, shown["statistics"][field], rtol=1e-5)
        _, sqnr, step, levels, _ = rows(page, "rounding")
        assert_shows(sqnr[1][0], shown["sqnr_tensor_db"], decimals=1)
        assert_shows(step[1][0], shown["step"], digits=3)
        assert levels[1][0] == f"{shown['median_levels']:g} of 256"
        largest = rows(page, "statistics")[0][-1][0]
        assert_shows(largest, shown["largest_relative_range"])
        heights = points(page, "histogram", type="Quad")["now"]
        assert sum(heights) == layer["channels"]
        assert part(page, "weights").is_visible() != stored
        assert part(page, "damage-table").is_visible()


def test_a_layer_without_a_normalization_has_no_switch(page: Page, document: Document) -> None:
    for layer in document["layers"]:
        if layer["name"] in (WORST, UNRUN) or layer is document["layers"][-1]:
            show(page, layer["name"])
            assert part(page, "which").is_visible() == (layer["stored"] is not None)


# ---------------------------------------------------------------------------------------------- what is not known


def test_a_layer_of_whose_inputs_nothing_is_known_says_so(page: Page) -> None:
    show(page, LOOKED_UP)
    expect(part(page, "nothing-enters")).to_be_visible()
    expect(part(page, "entering-known")).to_be_hidden()
    assert list(groups(page)) == [HEADS["tensor"], HEADS["channel"]]
    assert set(points(page, "damage", type="Scatter")["what"]) == {
        "weights, one grid per tensor",
        "weights, a grid per channel",
    }
    show(page, WORST)
    expect(part(page, "nothing-enters")).to_be_hidden()
    expect(part(page, "entering-known")).to_be_visible()


def test_a_layer_that_was_not_run_shows_its_weights_alone(page: Page, document: Document) -> None:
    show(page, UNRUN)
    for name in ("damage", "entering", "weights"):
        expect(part(page, name)).to_be_hidden()
    values = points(page, "ranges", y="mean", type="Scatter")["max"]
    np.testing.assert_allclose(values, layer_of(document, UNRUN)["statistics"]["max"], rtol=1e-5)


# ---------------------------------------------------------------------------------------------- payload


def payload(path: Path) -> Any:
    found = re.search(r'id="payload">([^<]*)<', path.read_text(encoding="utf-8"))
    assert found
    return json.loads(zlib.decompress(base64.b64decode(found[1])))


def fields(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(fields, value.values()))
    return set().union(*map(fields, value)) if isinstance(value, list) else set()


def test_the_payload_leaves_arrays_to_the_binary_blocks(path: Path) -> None:
    found = fields(payload(path)["document"]["layers"])
    assert not {"counts", "importance", "channel_statistics", "statistics", "grids"} & found


def test_the_page_reads_the_layers_of_the_document(page: Page, document: Document) -> None:
    with page.expect_download() as download:
        part(page, "download-json").click()
    found = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert [layer["name"] for layer in found["layers"]] == [layer["name"] for layer in document["layers"]]
    for layer, expected in zip(found["layers"], document["layers"], strict=True):
        assert layer["severity"] == expected["severity"]
        assert layer["flags"] == expected["flags"]
        assert (layer["sensitivity"] is None) == (expected["sensitivity"] is None)
        if layer["sensitivity"]:
            shown, known = layer["sensitivity"]["weights"]["tensor"], expected["sensitivity"]["weights"]["tensor"]
            for field in ("value", "measured", "predicted"):
                values = np.array(shown[field], dtype=float)
                np.testing.assert_allclose(values, known[field], rtol=1e-3)


# ---------------------------------------------------------------------------------------------- use


def test_everything_answers_to_the_keyboard(browser: Browser, path: Path) -> None:
    with opened(browser, path, layer=WORST) as page:
        stops = page.evaluate(
            """() => [...document.querySelectorAll(".fig, .fig *")].filter(e => e.tabIndex >= 0).length"""
        )
        assert stops == 0
        regions = page.locator(".detail [role=region]")
        assert all(region.get_attribute("aria-label") for region in regions.all())
        for name in ("entering-grids", "entering-channels", "weight-grids"):
            part(page, name).locator("summary").focus()
            page.keyboard.press("Enter")
            expect(part(page, name).locator("tbody tr").first).to_be_visible()
        page.locator("[name=which][value=quantized]").focus()
        page.keyboard.press("ArrowRight")
        expect(part(page, "which")).to_contain_text("as the model holds them")
        assert page.evaluate("document.activeElement.value") == "stored"
        page.keyboard.press("ArrowLeft")
        expect(part(page, "weights")).to_be_visible()


def test_a_narrow_screen_has_no_overflow(browser: Browser, path: Path) -> None:
    with opened(browser, path, layer=WORST, viewport={"width": 400, "height": 800}) as page:
        for name in ("entering-grids", "entering-channels", "weight-grids"):
            unfold(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        over = page.evaluate(
            """() => [...document.querySelectorAll(".detail *")].filter(e => e.checkVisibility()
                && !e.closest(".scroll") && e.getBoundingClientRect().right > 401).map(e => e.outerHTML.slice(0, 99))"""
        )
        assert over == []
