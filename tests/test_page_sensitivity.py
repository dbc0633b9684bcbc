"""The parts of a page that tell what quantization does to the output of the model: table, overview, map, exclusions."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from math import inf, isnan, log10, nan
from pathlib import Path
from random import Random
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

import qvis
from qvis.adapters.digits import load_digits_model
from qvis.excluding import TITLES, TOOLS
from qvis.layers import Analysis
from qvis.report.document import Document, summarize
from qvis.report.html import render_html
from qvis.words import visible
from tests.browser import (
    EVIL,
    LONG,
    assert_shows,
    number,
    opened,
    part,
    resize,
    selected,
    shown_rows,
    unfold,
    wait_for_layer,
    wait_until_ready,
)

pytestmark = pytest.mark.browser
Open = Callable[[str], Page]

NAN = [nan] * 5


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    """The digits model, in which one layer is a problem."""
    import numpy as np

    inputs = np.random.default_rng(0).random((16, 1, 8, 8)).astype(np.float32)
    return qvis.analyze(load_digits_model(), inputs=inputs, measure="top")


@pytest.fixture(scope="module")
def documents(analysis: Analysis) -> Callable[[str], Document]:
    @cache
    def make(name: str) -> Document:
        document = summarize(analysis, "sensitivity")
        return {"digits": lambda d: d, "awkward": awkward, "many": many}[name](copy.deepcopy(document))

    return make


def awkward(document: Document) -> Document:
    """Names that do harm, and layers that were not run, are not known, do no damage, or more than a prediction can."""
    layers = document["layers"] = document["layers"][:6]
    for name, layer in zip((LONG, EVIL, "__proto__"), layers, strict=False):
        for setting in document["exclusions"]:
            setting["items"][name] = setting["items"].pop(layer["name"], [repr(name)])
        layer["name"] = name
    layers[3]["sensitivity"], layers[3]["severity"] = None, "ok"
    figures(layers[4], nan)
    layers[4]["sensitivity"]["inputs"], layers[4]["sensitivity"]["damage_inputs"] = None, nan
    figures(layers[5], 0.0)
    figures(layers[1], 5.0)
    layers[1]["severity"], layers[2]["severity"] = "problem", "ok"
    document["folding"]["refused"] = [{"name": "norm" + EVIL, "reason": "two layers use it"}]
    document["folding"]["no_graph"] = "it was not traced"
    for rank, layer in enumerate(layers, 1):
        layer["rank"] = rank
    return document


def figures(layer: dict[str, Any], damage: float) -> None:
    """Give a layer one predicted damage at all widths."""
    known = layer["sensitivity"]
    confidence = "low" if not damage < 0.3 else "high"
    for one in known["weights"].values():
        one.update(
            value=[damage] * 5, predicted=[damage] * 5, measured=NAN, spread=[0.1] * 5, confidence=[confidence] * 5
        )
    db = nan if isnan(damage) else inf if damage == 0 else -10 * log10(damage)
    known.update(damage=damage, damage_db=db, spread=0.1, confidence=confidence)


def many(document: Document) -> Document:
    """A thousand layers."""
    random, layers = Random(0), []
    for i in range(1000):
        layer = copy.deepcopy(document["layers"][i % len(document["layers"])])
        figures(layer, 10 ** random.uniform(-8, 0.5))
        layers.append({**layer, "name": f"backbone.stages.{i // 100}.blocks.{i // 10}.conv{i % 10}"})
    for rank, layer in enumerate(sorted(layers, key=lambda one: -one["sensitivity"]["damage"]), 1):
        layer["rank"] = rank
        layer["severity"] = "problem" if layer["sensitivity"]["damage"] > 0.01 else "ok"
    document["layers"] = layers
    for setting in document["exclusions"]:
        setting["items"] = {layer["name"]: [f"'^{layer['name']}/'"] for layer in layers} if setting["usable"] else {}
    return document


@pytest.fixture(scope="module")
def file(documents: Callable[[str], Document], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def write(name: str) -> Path:
        path = tmp_path_factory.mktemp("page") / f"{name}.html"
        path.write_text(render_html(documents(name)), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def shared(browser: Browser, file: Callable[[str], Path]) -> Iterator[Open]:
    """Pages that tests read and leave as they were."""
    with ExitStack() as stack:
        yield cache(lambda name: stack.enter_context(opened(browser, file(name))))


@pytest.fixture
def fresh(browser: Browser, file: Callable[[str], Path]) -> Iterator[Open]:
    """Pages that a test may change."""
    with ExitStack() as stack:
        yield lambda name: stack.enter_context(opened(browser, file(name)))


def by_name(document: Document) -> dict[str, dict[str, Any]]:
    return {visible(layer["name"]): layer for layer in document["layers"]}


def ranked(document: Document) -> list[dict[str, Any]]:
    return sorted(document["layers"], key=lambda layer: layer["rank"])


def at_eight(document: Document, layer: dict[str, Any]) -> dict[str, float]:
    """What the columns of the table show."""
    known = layer["sensitivity"]
    noise = {"share": layer["noise_share"], "rel": layer["largest_relative_range"]}
    if known is None:
        return {"damage": nan, "damage-channel": nan, "damage-inputs": nan, "operations": nan, **noise}
    at = document["sensitivity"]["bits"].index(document["bits"])
    return {
        "damage": known["weights"]["tensor"]["value"][at],
        "damage-channel": known["weights"]["channel"]["value"][at],
        "damage-inputs": known["inputs"]["value"][at] if known["inputs"] else nan,
        "operations": known["share_of_operations"],
        **noise,
    }


def column(page: Page, name: str) -> list[tuple[str, str]]:
    """What a column of the table sorts by, and what it shows, from top to bottom."""
    found: list[list[str]] = page.evaluate(
        "(name) => { const at = document.querySelector('.layers > thead th.' + name).cellIndex;"
        " return [...document.querySelectorAll('[data-test=layer-row]')].map(r => "
        "[r.cells[at].dataset.v, r.cells[at].textContent.trim()]); }",
        name,
    )
    return [(value, text) for value, text in found]


# ---------------------------------------------------------------------------------------------- table and verdict


@pytest.mark.parametrize("name", ["digits", "awkward"])
def test_the_cells_of_the_table_are_the_figures_of_the_document(
    shared: Open, documents: Callable[[str], Document], name: str
) -> None:
    page, document = shared(name), documents(name)
    rows = [by_name(document)[one] for one in shown_rows(page)]
    assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
    for key in at_eight(document, rows[0]):
        for row, (value, text) in zip(rows, column(page, key), strict=True):
            expected = at_eight(document, row)[key]
            assert float(value or "nan") == pytest.approx(expected, rel=1e-5, nan_ok=True), (key, row["name"])
            if "<" in text:
                assert 0 < expected < 1e-6
            else:
                assert_shows(text, expected, digits=3 if key == "rel" else 2)


def test_each_column_sorts_both_ways_with_the_unknown_last(fresh: Open) -> None:
    page = fresh("awkward")
    for key in ("damage", "damage-channel", "damage-inputs", "operations", "share", "rel"):
        for direction in ("descending", "ascending"):
            page.locator(f".layers > thead th.{key}").get_by_role("button").click()
            assert page.locator(f".layers > thead th.{key}").get_attribute("aria-sort") == direction
            values = [float(value) if value else nan for value, _ in column(page, key)]
            known = [value for value in values if not isnan(value)]
            assert known == sorted(known, reverse=direction == "descending"), key
            assert all(map(isnan, values[len(known) :]))


def test_a_sign_tells_what_each_damage_rests_on(shared: Open, documents: Callable[[str], Document]) -> None:
    page, document = shared("digits"), documents("digits")
    signs = {"measured": "measured", "high": "predicted", "fair": "predicted", "low": "low"}
    for name, row in zip(shown_rows(page), part(page, "layer-row").all(), strict=True):
        sign = row.locator(".how-sure")
        confidence = by_name(document)[name]["sensitivity"]["confidence"]
        assert sign.get_attribute("class") == f"how-sure {signs[confidence]}"
        assert "predicted" in (sign.get_attribute("title") or "") or confidence == "measured"
    contents = page.locator(".how-sure").evaluate_all("all => all.map(e => getComputedStyle(e, '::after').content)")
    assert len(set(contents)) >= 2


def test_without_a_run_the_page_has_none_of_this(browser: Browser, tmp_path: Path) -> None:
    path = qvis.visualize_weight_ranges(load_digits_model(), tmp_path).path
    assert path is not None
    with opened(browser, path) as page:
        for name in ("heatmap", "exclusions", "how"):
            assert part(page, name).count() == 0
        assert page.locator("th.damage").count() == 0
        assert page.locator("#overview-title").inner_text().startswith("Rounding noise")
        page.keyboard.press("x")
        assert "the model was not run" in part(page, "footer").inner_text()


def test_the_verdict_is_short_and_the_rest_is_folded(fresh: Open, documents: Callable[[str], Document]) -> None:
    page, details = fresh("awkward"), documents("awkward")["verdict"]["details"]
    text = part(page, "verdict-details").inner_text().replace("\u00a0", " ")
    assert text == " ".join(details[:3])
    how = part(page, "how")
    expect(how.locator("p").first).to_be_hidden()
    unfold(page, "how")
    lines = [line.replace("\u00a0", " ") for line in how.locator("> p").all_inner_texts()]
    assert lines[: len(details) - 3] == details[3:]
    assert "it was not traced" in part(page, "no-graph").inner_text()
    expect(how.locator("dd")).to_be_hidden()
    unfold(page, "refused")
    assert how.locator("dt").inner_text() == "norm" + EVIL
    assert how.locator("dd").inner_text() == "two layers use it"


# ---------------------------------------------------------------------------------------------- overview


def test_stems_are_as_high_as_their_damage(shared: Open, documents: Callable[[str], Document]) -> None:
    page, document = shared("digits"), documents("digits")
    damages = [layer["sensitivity"]["damage"] for layer in document["layers"]]
    heights = page.locator(".stems i").evaluate_all("all => all.map(e => parseFloat(e.style.getPropertyValue('--h')))")
    labels = page.locator(".scale span").evaluate_all(
        "all => all.map(e => [e.textContent, parseFloat(e.style.getPropertyValue('--y'))])"
    )
    (low, bottom), (high, top) = ((log10(number(text)), y) for text, y in (labels[0], labels[-1]))
    for damage, height in zip(damages, heights, strict=True):
        expected = bottom + (log10(damage) - low) / (high - low) * (top - bottom)
        assert height == pytest.approx(max(0.0, expected), abs=0.06)
    assert page.locator("#overview-title").inner_text().startswith("Damage by layer")
    limits = page.locator(".limits span").all_inner_texts()
    assert [limit.replace("\u00a0", " ").strip() for limit in limits] == ["problem 1 %", "watch 0.1 %"]


def test_pointing_at_a_stem_tells_its_damage(fresh: Open, documents: Callable[[str], Document]) -> None:
    page, document = fresh("awkward"), documents("awkward")
    box = page.locator(".field").bounding_box()
    assert box is not None
    for index, expected in ((1, 5.0), (3, nan), (5, 0.0)):
        page.mouse.move(box["x"] + (index + 0.5) / 6 * box["width"], box["y"] + box["height"] / 2)
        hover = page.locator(".field .hover")
        expect(hover).to_have_text(re.compile("^" + re.escape(visible(document["layers"][index]["name"])[:20])))
        text = (hover.text_content() or "").replace("\u00a0", " ")
        assert_shows(text.split("  ")[1], expected, digits=2)


# ---------------------------------------------------------------------------------------------- map of all widths


def cells(page: Page) -> dict[str, list[list[str]]]:
    """Texts and classes of the cells of each row, by the row's name."""
    found: dict[str, list[list[str]]] = page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('[data-test=heatmap-table] tr')].slice(1).map(row => "
        "['=' + row.cells[0].textContent, [...row.cells].slice(1).map(c => [c.textContent, c.className])]))"
    )
    return {name[1:]: row for name, row in found.items()}


def rows_of_map(page: Page) -> list[str]:
    return list(cells(page))[1:]


@pytest.mark.parametrize("name", ["digits", "awkward"])
def test_the_cells_of_the_map_are_the_figures_of_the_document(
    fresh: Open, documents: Callable[[str], Document], name: str
) -> None:
    page = fresh(name)
    for what in ("channel", "inputs", "tensor"):
        part(page, "heatmap-what").get_by_text("inputs" if what == "inputs" else f"grid per {what}").click()
        assert_map_shows(page, documents(name), what)


def assert_map_shows(page: Page, document: Document, what: str) -> None:
    known = document["sensitivity"]
    heads = part(page, "heatmap-table").locator("thead tr").first.locator("th").all_inner_texts()
    assert heads == ["Layer", *(f"{bits} bits" for bits in known["bits"])]
    shown = cells(page)
    totals = known["total_inputs"] if what == "inputs" else known["total"][what]
    wanted = {"All layers": [(total, "measured") for total in totals]}
    for layer in document["layers"]:
        result = layer["sensitivity"]
        one = result and (result["inputs"] if what == "inputs" else result["weights"][what])
        wanted[visible(layer["name"])] = (
            list(zip(one["value"], one["confidence"], strict=True)) if one else [(nan, "")] * 5
        )
    assert list(shown) == list(wanted)
    for layer_name, row in wanted.items():
        for (text, sign), (damage, confidence) in zip(shown[layer_name], row, strict=True):
            db = nan if isnan(damage) else inf if damage == 0 else -10 * log10(damage)
            assert_shows(text, db, decimals=1)
            off = confidence != "measured" and damage > 0.3
            assert sign == ("unknown" if isnan(damage) else "low off" if off else confidence)


def test_the_map_is_ordered_as_the_model_or_worst_first(fresh: Open, documents: Callable[[str], Document]) -> None:
    page, document = fresh("digits"), documents("digits")
    assert rows_of_map(page) == [layer["name"] for layer in document["layers"]]
    part(page, "heatmap-order").get_by_text("worst first").click()
    assert rows_of_map(page) == [layer["name"] for layer in ranked(document)]
    part(page, "heatmap-order").locator("input").last.focus()
    page.keyboard.press("ArrowLeft")
    assert rows_of_map(page) == [layer["name"] for layer in document["layers"]]


def test_a_cell_tells_percent_and_confidence_and_what_lies_beyond_the_model(fresh: Open) -> None:
    page = fresh("awkward")
    cell = part(page, "heatmap-table").locator("tr", has_text=EVIL).locator("td").nth(2)
    cell.hover()
    expect(cell).to_have_attribute("title", f"{EVIL}, 4 bits: 500\u00a0%, beyond the model: unreliable")
    whole = part(page, "heatmap-table").locator("thead td").first
    whole.hover()
    expect(whole).to_have_attribute("title", re.compile("^All layers, 8 bits: .*, measured"))


def test_a_tap_or_enter_on_a_row_of_the_map_shows_its_layer(fresh: Open, documents: Callable[[str], Document]) -> None:
    page, document = fresh("awkward"), documents("awkward")
    names = [visible(layer["name"]) for layer in document["layers"]]
    part(page, "filter").fill("no such layer")
    body = part(page, "heatmap-table").locator("tbody tr")
    body.nth(1).locator("td").nth(3).click()
    wait_for_layer(page, names[1])
    assert page.evaluate("decodeURIComponent(location.hash)") == f"#layer={EVIL}"
    assert len(shown_rows(page)) == 6
    body.nth(5).locator("a").focus()
    page.keyboard.press("Enter")
    wait_for_layer(page, names[5])
    assert part(page, "heatmap-table").locator("tr[aria-current=true] a").inner_text() == names[5]


def test_a_thousand_layers_open_closed_and_small(browser: Browser, file: Callable[[str], Path]) -> None:
    path = file("many")
    assert path.stat().st_size <= 3_000_000
    with opened(browser, path) as page:
        heatmap = part(page, "heatmap")
        assert not heatmap.evaluate("e => e.open")
        assert page.locator("[data-test=heatmap-table] tr").count() == 0
        unfold(page, "heatmap")
        expect(page.locator("[data-test=heatmap-table] tr")).to_have_count(1002)
        assert page.evaluate(
            "[...document.querySelectorAll('[data-test=heatmap-table] tbody')].every((e) => "
            "getComputedStyle(e).contentVisibility === 'auto')"
        )
        chosen = part(page, "heatmap-table").locator("tr[aria-current=true]")
        expect(chosen).to_have_count(1)
        assert chosen.locator("a").inner_text() == selected(page)
        inside = chosen.evaluate(
            "e => { const box = e.closest('.sheet').getBoundingClientRect(), row = e.getBoundingClientRect();"
            " return row.top >= box.top && row.bottom <= box.bottom + 1; }"
        )
        assert inside


# ---------------------------------------------------------------------------------------------- layers left in float


def marked(page: Page) -> list[str]:
    return part(page, "excluded").locator("tbody th").all_inner_texts()


def test_problem_layers_are_marked_to_begin_with(shared: Open, documents: Callable[[str], Document]) -> None:
    page, document = shared("digits"), documents("digits")
    problems = [layer["name"] for layer in ranked(document) if layer["severity"] == "problem"]
    assert problems
    assert marked(page) == problems
    assert page.locator("tr.float td.name a").all_inner_texts() == problems
    for name, row in zip(problems, part(page, "excluded").locator("tbody tr").all(), strict=True):
        known = by_name(document)[name]["sensitivity"]
        damage, operations = row.locator("td").all_inner_texts()[:2]
        assert_shows(damage, known["damage"], digits=2)
        assert_shows(operations, known["share_of_operations"], digits=2)
    rest = sum(one["sensitivity"]["damage"] for one in document["layers"] if one["severity"] != "problem")
    text = part(page, "remains").inner_text().replace("\u00a0", " ")
    assert_shows(text.split("add up to ")[1].split(" of ")[0], rest, digits=2)


def test_the_page_writes_what_python_writes(
    fresh: Open, analysis: Analysis, documents: Callable[[str], Document]
) -> None:
    page, layers = fresh("digits"), [layer["name"] for layer in ranked(documents("digits"))]
    chosen = [layer["name"] for layer in ranked(documents("digits")) if layer["severity"] == "problem"]
    for more in (None, 3, 7):
        if more is not None:
            part(page, "layer-row").nth(more).locator("td.name").click()
            page.keyboard.press("x")
            chosen.append(layers[more])
        assert marked(page) == chosen
        for tool in TITLES.keys() - {"nncf"}:
            part(page, "exclusion-tool").select_option(tool)
            made = qvis.exclusions(analysis, tool, chosen)
            assert part(page, "exclusion-text").text_content() == made.text
            note = part(page, "exclusion-note").inner_text()
            assert note == made.note if made.text else made.note.endswith(note)
            assert TITLES[tool] in part(page, "exclusion-tool").locator("option:checked").inner_text()
    assert TITLES.keys() == TOOLS.keys()


def test_harmful_names_are_written_as_python_would(fresh: Open) -> None:
    page = fresh("awkward")
    part(page, "exclusion-tool").select_option("torchao")
    for name in (LONG, "__proto__"):
        page.evaluate("(hash) => { location.hash = hash; }", f"layer={name}")
        wait_for_layer(page, name)
        part(page, "exclude").click()
    text = part(page, "exclusion-text").text_content() or ""
    for name in (LONG, EVIL, "__proto__"):
        assert f"\n    {name!r},\n" in text


def test_layers_are_marked_and_taken_back_by_key_button_and_list(fresh: Open) -> None:
    page = fresh("digits")
    first, button = marked(page), part(page, "exclude")
    assert selected(page) == first[0]
    expect(button).to_have_text(f"Quantize {first[0]} after all")
    page.keyboard.press("x")
    assert marked(page) == []
    expect(part(page, "exclusion-text")).to_be_hidden()
    expect(part(page, "exclusion-copy")).to_be_disabled()
    assert part(page, "remains").inner_text().startswith("No layer is marked")
    button.press("Enter")
    assert marked(page) == first
    page.keyboard.press("j")
    page.keyboard.press("x")
    assert len(marked(page)) == 2
    part(page, "excluded").get_by_role("button").first.press("Enter")
    assert first[0] not in marked(page)
    expect(part(page, "exclude-none")).to_be_focused()
    part(page, "exclude-none").click()
    assert marked(page) == []
    assert page.locator("tr.float").count() == 0


def test_letters_typed_into_the_filter_or_the_list_of_tools_mark_nothing(fresh: Open) -> None:
    page = fresh("digits")
    before, theme = marked(page), page.evaluate("document.documentElement.dataset.theme")
    part(page, "filter").focus()
    page.keyboard.type("xx")
    part(page, "exclusion-tool").focus()
    page.keyboard.type("xt")
    assert marked(page) == before
    assert page.evaluate("document.documentElement.dataset.theme") == theme


def test_the_setting_is_copied(browser: Browser, file: Callable[[str], Path]) -> None:
    with opened(browser, file("digits"), permissions=["clipboard-read", "clipboard-write"]) as page:
        part(page, "exclusion-copy").click()
        expect(part(page, "toast")).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == part(page, "exclusion-text").text_content()


# ---------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("name", ["digits", "awkward", "many"])
def test_nothing_sticks_out_at_any_width(browser: Browser, file: Callable[[str], Path], name: str) -> None:
    with opened(browser, file(name), viewport={"width": 400, "height": 800}) as page:
        unfold(page, "heatmap")
        for width in (400, 1000) if name == "many" else (400, 640, 700, 1000, 1600):
            resize(page, width, 900)
            wait_until_ready(page)
            over = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert over <= 0, width
            cut = page.evaluate(
                """[...document.querySelectorAll(".layers > thead th, [data-test=layer-row] > td:not(.name):not(.op)"
                    + ", .sheet td, .sheet thead th")]
                    .filter((e) => e.checkVisibility({contentVisibilityAuto: true}))
                    .filter((e) => e.scrollWidth > e.clientWidth + 1)
                    .map((e) => `${e.cellIndex}: ${e.textContent.trim()} (${e.scrollWidth} in ${e.clientWidth})`)"""
            )
            assert cut == [], width
            for always in ("sev", "name", "damage"):
                expect(page.locator(f".layers > thead th.{always}")).to_be_visible()


def test_everything_has_a_name_and_a_role(fresh: Open) -> None:
    page = fresh("awkward")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, [role=region], [role=group], summary, a")]
            .filter((e) => !(e.ariaLabel || e.closest("label")?.textContent || e.textContent).trim())
            .map((e) => e.outerHTML.slice(0, 100))"""
    )
    assert nameless == []
    table = page.get_by_role("table", name="rounded")
    expect(table).to_have_count(1)
    assert table.get_by_role("row").count() == 8
    assert table.get_by_role("columnheader").count() == 6
    assert table.get_by_role("rowheader").count() == 7
    assert table.get_by_role("cell").count() == 35
