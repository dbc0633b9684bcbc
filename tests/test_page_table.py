"""The table of layers: its order, sorting, filtering, the keyboard, and the overview above it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import inf, isnan, nan

import pytest
from playwright.sync_api import Locator, Page, expect

from qvis.report import Report
from qvis.words import visible
from tests.browser import assert_shows, part, selected, show, shown_rows, wait_for_layer

pytestmark = pytest.mark.browser
Reports = Callable[[str], Report]
Visit = Callable[..., Page]

FIELDS = {
    "noise": "noise_share",
    "sqnr": "sqnr_tensor_db",
    "sqnr-channel": "sqnr_channel_db",
    "rel": "largest_relative_range",
    "lev": "median_levels",
}
"""Columns of numbers, and what they show of the document."""
WORST_FIRST = ("sev", "noise", "rel", "starved")
"""Columns whose largest value comes first at the first click."""
SEVERITIES = ["ok", "watch", "problem", "unusable"]


def head(page: Page, column: str) -> Locator:
    return page.locator(f".layers > thead th.{column}")


def column_values(page: Page, column: str) -> list[float]:
    """What a column sorts by, from top to bottom; NaN for n/a."""
    texts = page.evaluate(
        "(column) => { const at = document.querySelector('.layers > thead th.' + column).cellIndex;"
        " return [...document.querySelectorAll('[data-test=layer-row]')].map(r => r.cells[at].dataset.v); }",
        column,
    )
    return [float(text) if text else nan for text in texts]


def column_texts(page: Page, column: str) -> list[str]:
    texts: list[str] = page.evaluate(
        "(column) => { const at = document.querySelector('.layers > thead th.' + column).cellIndex;"
        " return [...document.querySelectorAll('[data-test=layer-row]')].map(r => r.cells[at].innerText.trim()); }",
        column,
    )
    return texts


def by_rank(report: Report) -> list[str]:
    layers = sorted(report.to_dict()["layers"], key=lambda layer: layer["rank"])
    return [visible(layer["name"]) for layer in layers]


@pytest.mark.parametrize("name", ["relative", "ranges", "awkward", "digits", "changes"])
def test_every_layer_is_a_row_worst_first(visit: Visit, report: Reports, name: str) -> None:
    page = visit(name)
    assert shown_rows(page) == by_rank(report(name))
    assert column_values(page, "rank") == list(range(1, len(report(name).layers) + 1))
    levels = column_texts(page, "sev")
    by_name = {visible(layer.name): str(layer.severity) for layer in report(name).layers}
    assert [text.split()[-1] for text in levels] == [by_name[layer] for layer in shown_rows(page)]
    ranks = [SEVERITIES.index(text.split()[-1]) for text in levels]
    assert ranks == sorted(ranks, reverse=True)
    assert part(page, "layers").locator("caption").inner_text().endswith("worst first")


@pytest.mark.parametrize("name", ["relative", "digits"])
def test_the_cells_of_a_row_are_the_numbers_of_its_layer(visit: Visit, report: Reports, name: str) -> None:
    page = visit(name)
    layers = {visible(layer["name"]): layer for layer in report(name).to_dict()["layers"]}
    order = shown_rows(page)
    for column, field in FIELDS.items():
        values = [nan if layers[layer][field] is None else layers[layer][field] for layer in order]
        sorts_by = column_values(page, column)
        if column in ("sqnr", "sqnr-channel"):
            # a layer without any noise has endless dB; the document, which is JSON, cannot hold that
            values = [key if key == inf else value for value, key in zip(values, sorts_by, strict=True)]
        assert sorts_by == pytest.approx(values, rel=1e-5, nan_ok=True)
        for text, value in zip(column_texts(page, column), values, strict=True):
            decimals = 1 if column.startswith("sqnr") else None
            assert_shows(text, value, digits=2 if column == "noise" else 3, decimals=decimals)
    assert column_values(page, "starved") == [len(layers[layer]["flags"]["starved"]) for layer in order]
    shapes = ["×".join(map(str, layers[layer]["shape"])) for layer in order]
    assert column_texts(page, "op") == [f"{layers[o]['op']} {s}" for o, s in zip(order, shapes, strict=True)]


def click_and_read(page: Page, column: str) -> tuple[str | None, list[float]]:
    head(page, column).get_by_role("button").click()
    marked = page.locator(".layers > thead th[aria-sort]")
    assert marked.count() == 1
    return head(page, column).get_attribute("aria-sort"), column_values(page, column)


@pytest.mark.parametrize("name", ["relative", "changes"])
def test_each_column_of_numbers_sorts_both_ways_with_the_unknown_last(visit: Visit, report: Reports, name: str) -> None:
    page = visit(name)
    columns = ("rank", "sev", *FIELDS, "starved")
    if name == "changes":
        columns = ("rank", "sev", "gain", "noise-before", "noise-after", "rel-before", "rel")
    unknown = 0
    for column in columns:
        head(page, "name").get_by_role("button").click()
        first, values = click_and_read(page, column)
        second, again = click_and_read(page, column)
        if name == "relative":
            assert first == ("descending" if column in WORST_FIRST else "ascending"), column
        assert {first, second} == {"ascending", "descending"}
        for direction, column_now in ((first, values), (second, again)):
            known = [value for value in column_now if not isnan(value)]
            assert known == sorted(known, reverse=direction == "descending"), column
            assert all(map(isnan, column_now[len(known) :])), column
            unknown += len(column_now) - len(known)
    assert unknown > 0 or name == "changes"
    assert sorted(shown_rows(page)) == sorted(by_rank(report(name)))


@pytest.mark.parametrize("column", ["name", "op"])
def test_columns_of_words_sort_both_ways(visit: Visit, column: str) -> None:
    page = visit("relative")
    head(page, column).get_by_role("button").click()
    assert head(page, column).get_attribute("aria-sort") == "ascending"
    texts = column_texts(page, column)
    assert texts == sorted(texts)
    head(page, column).get_by_role("button").click()
    assert head(page, column).get_attribute("aria-sort") == "descending"
    assert column_texts(page, column) == sorted(texts, reverse=True)


def test_the_heading_says_how_the_table_is_ordered(visit: Visit) -> None:
    page = visit("relative")
    title = page.locator("#layers-title")
    assert title.inner_text() == "Layers, worst first"
    head(page, "rank").get_by_role("button").click()
    assert title.inner_text() == "Layers, best first"
    head(page, "name").get_by_role("button").click()
    assert title.inner_text() == "Layers"


def test_a_column_sorts_by_the_keyboard(visit: Visit) -> None:
    page = visit("relative")
    head(page, "name").get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert head(page, "name").get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Space")
    assert head(page, "name").get_attribute("aria-sort") == "descending"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("STAR", ["starving"]),
        ("embedding", ["tokens"]),
        ("1300×5", ["wide"]),
        (" dead ", ["partly_dead"]),
        ("linear", ["nothing", "broken", "wide", "partly_dead", "single"]),
    ],
)
def test_the_filter_finds_names_kinds_and_shapes(visit: Visit, text: str, found: list[str]) -> None:
    page = visit("relative")
    part(page, "filter").fill(text)
    assert shown_rows(page) == found
    assert part(page, "count").inner_text() == f"{len(found)} of 10"
    part(page, "filter").fill("")
    assert part(page, "count").inner_text() == "10 layers"
    assert len(shown_rows(page)) == 10


def test_one_layer_is_counted_in_the_singular(visit: Visit) -> None:
    page = visit("one")
    assert part(page, "count").inner_text() == "1 layer"
    page.keyboard.press("j")
    page.keyboard.press("k")
    assert selected(page) == "layer0"


def test_a_filter_that_finds_nothing_says_so_and_can_be_cleared(visit: Visit) -> None:
    page = visit("relative")
    part(page, "filter").fill("no such layer")
    assert shown_rows(page) == []
    assert part(page, "count").inner_text() == "0 of 10"
    expect(part(page, "empty")).to_be_visible()
    expect(page.locator(".layers > thead")).to_be_hidden()
    part(page, "empty").get_by_role("button").click()
    expect(part(page, "empty")).to_be_hidden()
    expect(part(page, "filter")).to_be_focused()
    assert len(shown_rows(page)) == 10


def test_problems_only_leaves_problems_and_unusable_layers(visit: Visit, report: Reports) -> None:
    page = visit("relative")
    problems = [layer.name for layer in report("relative").problematic_layers]
    part(page, "problems-only").check()
    assert shown_rows(page) == problems == ["nothing", "broken", "starving"]
    assert part(page, "count").inner_text() == "3 of 10"
    part(page, "filter").fill("linear")
    assert shown_rows(page) == ["nothing", "broken"]
    part(page, "filter").fill("")
    part(page, "problems-only").uncheck()
    assert len(shown_rows(page)) == 10


def test_a_model_without_problems_has_none_to_show(visit: Visit) -> None:
    page = visit("three")
    part(page, "problems-only").check()
    assert shown_rows(page) == []
    expect(part(page, "empty")).to_be_visible()


def test_filter_and_sort_work_together(visit: Visit) -> None:
    page = visit("relative")
    part(page, "filter").fill("conv")
    head(page, "name").get_by_role("button").click()
    assert shown_rows(page) == ["depthwise", "starving", "stem", "up"]


def test_j_and_k_go_through_the_rows_that_are_shown(visit: Visit) -> None:
    page = visit("relative")
    page.keyboard.press("j")
    wait_for_layer(page, "broken")
    assert page.evaluate("location.hash") == "#layer=broken"
    page.keyboard.press("k")
    page.keyboard.press("k")
    wait_for_layer(page, "nothing")
    part(page, "filter").fill("conv")
    part(page, "filter").evaluate("e => e.blur()")
    for expected in ("starving", "depthwise", "up", "stem", "stem"):
        page.keyboard.press("j")
        wait_for_layer(page, expected)
    page.keyboard.press("k")
    wait_for_layer(page, "up")


def test_the_keys_of_the_filter(visit: Visit) -> None:
    page = visit("relative")
    page.keyboard.press("/")
    expect(part(page, "filter")).to_be_focused()
    page.keyboard.type("jk?pt/")
    expect(part(page, "filter")).to_have_value("jk?pt/")
    assert selected(page) == "nothing"
    page.keyboard.press("Escape")
    expect(part(page, "filter")).to_have_value("")
    expect(part(page, "filter")).not_to_be_focused()
    assert len(shown_rows(page)) == 10
    page.keyboard.press("/")
    page.keyboard.type("conv")
    page.keyboard.press("Enter")
    wait_for_layer(page, "starving")
    expect(part(page, "filter")).not_to_be_focused()
    page.keyboard.press("Escape")
    assert len(shown_rows(page)) == 10


def test_p_shows_problems_only(visit: Visit) -> None:
    page = visit("relative")
    page.keyboard.press("p")
    expect(part(page, "problems-only")).to_be_checked()
    assert len(shown_rows(page)) == 3
    page.keyboard.press("p")
    assert len(shown_rows(page)) == 10


def test_keys_with_a_modifier_are_left_to_the_browser(visit: Visit) -> None:
    page = visit("relative")
    page.keyboard.press("Control+j")
    page.keyboard.press("Alt+p")
    expect(part(page, "problems-only")).not_to_be_checked()
    assert selected(page) == "nothing"


def test_the_help_opens_by_key_and_button_and_takes_the_keyboard(visit: Visit) -> None:
    page = visit("relative")
    page.keyboard.press("?")
    expect(part(page, "help-dialog")).to_be_visible()
    page.keyboard.press("j")
    assert selected(page) == "nothing"
    page.keyboard.press("Escape")
    expect(part(page, "help-dialog")).to_be_hidden()
    part(page, "help").click()
    expect(part(page, "help-dialog")).to_be_visible()
    part(page, "help-dialog").get_by_role("button", name="Close").click()
    expect(part(page, "help-dialog")).to_be_hidden()


def test_a_click_on_a_row_or_enter_on_its_name_shows_its_layer(visit: Visit) -> None:
    page = visit("relative")
    row = part(page, "layer-row").filter(has_text="tokens")
    row.locator("td.op").click()
    wait_for_layer(page, "tokens")
    assert row.get_attribute("aria-current") == "true"
    assert page.locator("tr[aria-current]").count() == 1
    assert page.evaluate("location.hash") == "#layer=tokens"
    part(page, "layer-row").filter(has_text="single").locator("a").focus()
    page.keyboard.press("Enter")
    wait_for_layer(page, "single")
    assert page.evaluate("location.hash") == "#layer=single"


def test_the_arrows_of_the_panel_step_through_the_rows(visit: Visit) -> None:
    page = visit("relative")
    page.get_by_role("button", name="Next layer").click()
    wait_for_layer(page, "broken")
    page.get_by_role("button", name="Previous layer").click()
    wait_for_layer(page, "nothing")


def stem_position(page: Page, index: int, layers: int) -> tuple[float, float]:
    box = page.locator(".field").bounding_box()
    assert box is not None
    return box["x"] + (index + 0.5) / layers * box["width"], box["y"] + box["height"] / 2


@pytest.mark.parametrize("name", ["relative", "digits", "changes"])
def test_a_tap_on_a_stem_shows_its_layer(visit: Visit, report: Reports, name: str) -> None:
    page = visit(name)
    layers = [layer.name for layer in report(name).layers]
    for index in (len(layers) - 1, 0):
        show(page)
        page.mouse.click(*stem_position(page, index, len(layers)))
        wait_for_layer(page, layers[index])
        assert page.locator(".stems i.on").count() == 1
        assert page.locator(".stems i").nth(index).get_attribute("class").split()[-1] == "on"


def test_a_tap_on_the_stem_of_a_filtered_layer_clears_the_filter(visit: Visit) -> None:
    page = visit("relative")
    part(page, "filter").fill("conv")
    page.mouse.click(*stem_position(page, 6, 10))
    wait_for_layer(page, "tokens")
    assert len(shown_rows(page)) == 10


def test_pointing_at_a_stem_names_its_layer_and_its_noise(visit: Visit) -> None:
    page = visit("relative")
    row = part(page, "layer-row").filter(has_text="starving")
    page.mouse.move(*stem_position(page, 1, 10))
    hover = page.locator(".field .hover")
    expect(hover).to_be_visible()
    noise = row.locator("td.noise").inner_text()
    expect(hover).to_have_text(f"starving {noise} problem")
    page.mouse.move(*stem_position(page, 3, 10))
    expect(hover).to_have_text("broken 0.0016 % unusable")
    page.mouse.move(0, 0)
    expect(hover).to_be_hidden()


def test_stems_are_as_high_as_their_noise(visit: Visit, report: Reports) -> None:
    page = visit("relative")
    heights = page.locator(".stems i").evaluate_all("all => all.map(e => parseFloat(e.style.getPropertyValue('--h')))")
    shares = [layer.noise_share for layer in report("relative").layers]
    known = sorted((share, height) for share, height in zip(shares, heights, strict=True) if not isnan(share))
    assert all(low[1] <= high[1] for low, high in pairwise(known))
    assert len({height for _, height in known}) > 5


def test_the_scale_of_the_overview_ends_at_all_of_the_power(visit: Visit) -> None:
    page = visit("relative")
    assert page.locator(".scale span").last.inner_text() == "100 %"
    assert part(page, "layer-row").filter(has_text="starving").locator("td.noise").inner_text() == "100\u00a0%"
