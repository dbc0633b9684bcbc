"""Theme, printing, and what a reader takes away: CSV, JSON, Markdown."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from qvis.report import Report
from qvis.words import visible
from tests.browser import (
    AWKWARD_NAMES,
    FORMULA,
    QUOTES,
    WIDE,
    opened,
    part,
    plot,
    settle,
    shown_rows,
    wait_until_ready,
)

pytestmark = pytest.mark.browser
Reports = Callable[[str], Report]
Visit = Callable[..., Page]


# ---------------------------------------------------------------------------------------------- theme


def paper(page: Page) -> str:
    colour: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return colour


def theme(page: Page) -> str | None:
    return page.locator("html").get_attribute("data-theme")


def label_colours(page: Page) -> set[str]:
    """The colour of the numbers at the axes of all figures."""
    return {plot(page, name)["label_colour"] for name in ("ranges", "relative", "levels", "histogram", "min_max")}


def set_system_theme(page: Page, scheme: Literal["dark", "light"]) -> None:
    page.emulate_media(color_scheme=scheme)
    page.wait_for_function("(scheme) => matchMedia(`(prefers-color-scheme: ${scheme})`).matches", arg=scheme)
    settle(page)


def test_the_theme_follows_the_system_until_one_is_chosen_and_is_kept(browser: Browser, report: Reports) -> None:
    with opened(browser, report("three").path, color_scheme="light") as page:
        button = part(page, "theme")
        light, light_labels = paper(page), label_colours(page)
        assert theme(page) == "auto"
        assert button.inner_text() == "Auto"
        set_system_theme(page, "dark")
        dark, dark_labels = paper(page), label_colours(page)
        assert light != dark
        assert len(light_labels) == len(dark_labels) == 1
        assert light_labels != dark_labels

        button.click()
        assert (theme(page), button.inner_text(), paper(page)) == ("light", "Light", light)
        assert label_colours(page) == light_labels
        assert button.get_attribute("aria-label") == "Colour theme: light"
        page.keyboard.press("t")
        set_system_theme(page, "light")
        assert (theme(page), button.inner_text(), paper(page)) == ("dark", "Dark", dark)
        assert label_colours(page) == dark_labels

        page.reload()
        wait_until_ready(page)
        assert (theme(page), button.inner_text(), paper(page)) == ("dark", "Dark", dark)
        assert label_colours(page) == dark_labels
        button.click()
        assert (theme(page), paper(page)) == ("auto", light)


def test_a_page_works_where_nothing_may_be_stored(browser: Browser, report: Reports) -> None:
    with opened(browser, report("three").path) as page:
        page.add_init_script(
            "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no'); }});"
        )
        page.reload()
        wait_until_ready(page)
        part(page, "theme").click()
        assert theme(page) == "light"


# ---------------------------------------------------------------------------------------------- print


@pytest.mark.parametrize("name", ["many", "changes"])
def test_in_print_all_rows_stand_and_the_tools_are_gone(visit: Visit, report: Reports, name: str) -> None:
    page = visit(name)
    page.emulate_media(media="print")
    page.wait_for_function("matchMedia('print').matches")
    settle(page)
    try:
        assert len(shown_rows(page)) == len(report(name).layers)
        for tool in ("filter", "problems-only", "copy-markdown", "download-csv", "theme", "help", "channels", "ready"):
            expect(part(page, tool)).to_be_hidden()
        for kept in ("verdict", "overview", "detail", "figure-ranges", "statistics", "rounding"):
            expect(part(page, kept)).to_be_visible()
        expect(page.get_by_text("Linear interpolation between the sorted weights")).to_be_visible()
    finally:
        page.emulate_media(media="screen")
        page.wait_for_function("matchMedia('screen').matches")
        settle(page)


def test_a_printed_report_has_several_pages_and_leaves_the_theme(browser: Browser, report: Reports) -> None:
    with opened(browser, report("many").path, color_scheme="dark") as page:
        dark, labels = paper(page), label_colours(page)
        pdf = page.pdf()
        pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
        assert 2 <= pages <= 12
        expect(page.locator("html")).to_have_attribute("data-theme", "auto")
        assert paper(page) == dark
        assert label_colours(page) == labels


# ---------------------------------------------------------------------------------------------- downloads


def download(page: Page, button: str) -> tuple[str, str]:
    with page.expect_download() as started:
        part(page, button).click()
    return started.value.suggested_filename, Path(started.value.path()).read_bytes().decode("utf-8")


def in_order(report: Report) -> list[dict[str, Any]]:
    return sorted(report.to_dict()["layers"], key=lambda layer: layer["rank"])


@pytest.mark.parametrize("name", ["relative", "awkward", "digits"])
def test_the_csv_has_a_row_for_each_layer_worst_first(visit: Visit, report: Reports, name: str) -> None:
    file, text = download(visit(name), "download-csv")
    assert file == report(name).path.with_suffix(".csv").name
    rows = list(csv.DictReader(text.splitlines(keepends=True)))
    layers = in_order(report(name))
    assert [row["rank"] for row in rows] == [str(rank) for rank in range(1, len(layers) + 1)]
    assert [row["layer"].removeprefix("'") for row in rows] == [layer["name"] for layer in layers]
    for row, layer in zip(rows, layers, strict=True):
        assert row["op"] == layer["op"]
        assert row["severity"] == layer["severity"]
        assert row["shape"] == "x".join(map(str, layer["shape"]))
        for field in ("noise_share", "sqnr_tensor_db", "largest_relative_range", "median_levels"):
            assert (float(row[field]) if row[field] else None) == layer[field]
        assert int(row["starved"]) == len(layer["flags"]["starved"])
        assert int(row["nonfinite"]) == len(layer["flags"]["nonfinite"])


def test_a_name_like_a_formula_stays_text_in_a_spreadsheet(visit: Visit) -> None:
    _, text = download(visit("awkward"), "download-csv")
    names = [row["layer"] for row in csv.DictReader(text.splitlines(keepends=True))]
    assert f"'{FORMULA}" in names
    assert FORMULA not in names
    assert not [name for name in names if name[0] in "=+-@"]


def test_the_csv_of_a_comparison_has_both_sides(visit: Visit, report: Reports) -> None:
    _, text = download(visit("changes"), "download-csv")
    rows = list(csv.DictReader(text.splitlines(keepends=True)))
    for row, layer in zip(rows, in_order(report("changes")), strict=True):
        assert (row["layer"], row["verdict"]) == (layer["name"], layer["verdict"])
        assert float(row["gain_db"]) == layer["gain_db"]
        assert float(row["noise_share_before"]) == layer["before"]["noise_share"]
        assert float(row["noise_share_after"]) == layer["after"]["noise_share"]


@pytest.mark.parametrize("name", ["relative", "awkward", "changes"])
def test_the_json_is_the_summary_of_the_report(visit: Visit, report: Reports, name: str) -> None:
    file, text = download(visit(name), "download-json")
    assert file == report(name).path.with_suffix(".json").name
    found, expected = json.loads(text, parse_constant=pytest.fail), report(name).to_dict()
    assert found["schema_version"] == 1
    assert set(found) == set(expected)
    for key in set(expected) - {"layers"}:
        assert found[key] == expected[key]
    for layer, original in zip(found["layers"], expected["layers"], strict=True):
        for side, other in (
            [(layer["before"], original["before"]), (layer["after"], original["after"])]
            if name == "changes"
            else [(layer, original)]
        ):
            drop = {"statistics", "levels"}
            assert {k: v for k, v in side.items() if k not in drop} == {k: v for k, v in other.items() if k not in drop}
            if "statistics" in side:
                for field, values in side["statistics"].items():
                    numbers, others = (np.array(x, dtype=float) for x in (values, other["statistics"][field]))
                    np.testing.assert_allclose(numbers, others, rtol=1e-6, atol=1e-12)
            else:
                assert side["channels"] > 512


# ---------------------------------------------------------------------------------------------- Markdown


def split_cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def unescaped(text: str) -> str:
    return re.sub(r"\\([|\\`*_<>[\]~#&])", r"\1", text)


def clipboard(page: Page, other_than: str = "") -> str:
    """The text that was copied, once it is there."""
    found = page.wait_for_function(
        "async (old) => { const text = await navigator.clipboard.readText(); return text !== old && text; }",
        arg=other_than,
    )
    text: str = found.json_value()
    return text


def test_the_table_is_copied_as_markdown(browser: Browser, report: Reports) -> None:
    with opened(
        browser, report("awkward").path, permissions=["clipboard-read", "clipboard-write"], viewport=WIDE
    ) as page:
        part(page, "copy-markdown").click()
        expect(part(page, "toast")).to_have_text("Copied as Markdown")
        text = clipboard(page)
        verdict, empty, *lines = text.splitlines()
        assert unescaped(verdict) == f"**{visible(report('awkward').verdict)}**"
        assert empty == ""
        table = [split_cells(line) for line in lines]
        assert table[0] == ["#", "layer", "op", "severity", "rounding noise"]
        assert [unescaped(row[1]) for row in table[2:]] == [visible(x["name"]) for x in in_order(report("awkward"))]
        assert {len(row) for row in table} == {5}
        name = next(row[1] for row in table[2:] if unescaped(row[1]) == QUOTES)
        assert r"\`ticked\` \| piped" in name
        assert not re.search(r"(?<!\\)[<`]", text)

        page.keyboard.press("/")
        page.keyboard.type("hyper")
        part(page, "copy-markdown").click()
        text = clipboard(page, other_than=text)
        assert len(text.splitlines()) == 5
        assert FORMULA in text


def test_without_a_clipboard_the_page_copies_as_pages_used_to(visit: Visit) -> None:
    page = visit("relative")
    page.evaluate(
        """() => {
            Object.defineProperty(navigator, "clipboard", {value: undefined, configurable: true});
            document.addEventListener("copy", () => { window.copied = document.activeElement.value; }, {once: true});
        }"""
    )
    part(page, "copy-markdown").click()
    expect(part(page, "toast")).to_have_text("Copied as Markdown")
    copied = page.evaluate("window.copied")
    page.evaluate("delete navigator.clipboard")
    assert copied.splitlines()[4].startswith("| 1 | nothing | Linear | unusable |")
    assert page.locator("textarea").count() == 0


def test_awkward_names_include_all_that_tables_must_escape() -> None:
    assert {"|", "`", "<", "_", "=", "#", '"'} <= set("".join(AWKWARD_NAMES))
