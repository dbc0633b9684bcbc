"""What a page looks like at each width, and whether it can be used without a mouse or by ear."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from qvis.report import Report
from tests.browser import (
    LONG,
    fold,
    opened,
    part,
    resize,
    selected,
    show,
    shown_rows,
    unfold,
    wait_for_layer,
    wait_until_ready,
)

pytestmark = pytest.mark.browser
Reports = Callable[[str], Report]
Visit = Callable[..., Page]

LAYERS = {"relative": "wide", "awkward": LONG, "changes": "improved", "awkward changes": LONG}


def overflow(page: Page) -> int:
    """By how many pixels the document is wider than the window."""
    pixels: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return pixels


def wider_than_panel(page: Page) -> list[str]:
    """Elements that stick out of the detail panel; what scrolls in a frame of its own is left out."""
    found: list[str] = part(page, "detail").evaluate(
        """(panel) => {
            const box = panel.getBoundingClientRect();
            const sticksOut = (e) => {
                const { left, right, width } = e.getBoundingClientRect();
                return width > 0 && (right > box.right + 1 || left < box.left - 1);
            };
            return [...panel.querySelectorAll("*")]
                .filter((e) => e.checkVisibility() && !e.closest(".channels > div table") && sticksOut(e))
                .map((e) => e.outerHTML.slice(0, 80));
        }"""
    )
    return found


def cut_cells(page: Page) -> list[str]:
    """Numbers and headings of the table that do not fit into their cells."""
    found: list[str] = page.evaluate(
        """[...document.querySelectorAll(".layers > thead th, [data-test=layer-row] > td:not(.name):not(.op)")]
            .filter((e) => e.checkVisibility() && e.scrollWidth > e.clientWidth + 1)
            .map((e) => `${e.cellIndex}: ${e.textContent.trim()} (${e.scrollWidth} in ${e.clientWidth})`)"""
    )
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_sticks_out_at_any_width(browser: Browser, report: Reports, name: str) -> None:
    layer = LAYERS[name]
    with opened(browser, report(name).path, layer=layer, viewport={"width": 400, "height": 800}) as page:
        for width in (400, 700, 1000, 1600):
            resize(page, width, 900)
            show(page, layer)
            unfold(page, "channels")
            assert overflow(page) <= 0, width
            assert wider_than_panel(page) == [], width
            assert cut_cells(page) == [], width
            unfold(page, "glossary")
            assert overflow(page) <= 0, width
            fold(page, "glossary")


def test_the_theme_does_not_move_anything(browser: Browser, report: Reports) -> None:
    boxes = (
        "[...document.querySelectorAll('.detail *, .layers td, header *')].map(e => e.getBoundingClientRect())"
        ".map(r => [r.x, r.y, r.width, r.height].map(Math.round).join())"
    )
    with opened(browser, report("relative").path, viewport={"width": 1000, "height": 900}) as page:
        part(page, "theme").evaluate("e => { e.style.width = '90px'; }")
        page.evaluate("document.documentElement.dataset.theme = 'light'")
        light = page.evaluate(boxes)
        page.evaluate("document.documentElement.dataset.theme = 'dark'")
        assert overflow(page) <= 0
        assert page.evaluate(boxes) == light


@pytest.mark.parametrize("name", ["awkward", "changes"])
def test_a_narrow_page_opens_the_panel_under_the_row_that_is_tapped(
    browser: Browser, report: Reports, name: str
) -> None:
    with opened(browser, report(name).path, viewport={"width": 400, "height": 800}, has_touch=True) as page:
        expect(part(page, "detail")).to_be_hidden()
        assert overflow(page) <= 0
        names = shown_rows(page)
        row = part(page, "layer-row").nth(1)
        row.tap()
        wait_for_layer(page, names[1])
        assert row.evaluate("e => e.nextElementSibling.contains(document.querySelector('.detail'))")
        box = part(page, "figure-ranges").bounding_box()
        assert box is not None
        assert 250 < box["width"] <= 400
        expect(page.locator("[data-test=figure-ranges] canvas")).not_to_have_count(0)
        row.tap()
        expect(part(page, "detail")).to_be_hidden()
        resize(page, 1200, 800)
        expect(part(page, "detail")).to_be_visible()
        expect(page.locator("tr.inline")).to_have_count(0)


def test_a_narrow_page_keeps_the_panel_under_its_row_when_sorted_and_filtered(
    browser: Browser, report: Reports
) -> None:
    under = "document.querySelector('tr.on').nextElementSibling.contains(document.querySelector('.detail'))"
    with opened(browser, report("relative").path, layer="stem", viewport={"width": 400, "height": 800}) as page:
        assert page.evaluate(under)
        page.locator(".layers th.name").get_by_role("button").click()
        assert page.evaluate(under)
        part(page, "filter").fill("linear")
        expect(part(page, "detail")).to_be_hidden()
        part(page, "filter").fill("")
        expect(part(page, "detail")).to_be_visible()
        assert selected(page) == "stem"


# ---------------------------------------------------------------------------------------------- without a mouse


@pytest.mark.parametrize("name", ["relative", "awkward", "changes"])
def test_figures_buttons_and_fields_have_names(visit: Visit, name: str) -> None:
    page = visit(name)
    nameless = page.evaluate(
        """() => {
            const kinds = "button, input, [role=img], [role=region], [aria-labelledby], dialog, summary, a";
            return [...document.querySelectorAll(kinds)].filter((e) => {
                const by = document.getElementById(e.getAttribute("aria-labelledby") ?? "");
                const own = e.matches("button, summary, a") ? e.textContent : "";
                return !(e.ariaLabel || by?.textContent || e.closest("label")?.textContent || own).trim();
            }).map((e) => e.outerHTML.slice(0, 100));
        }"""
    )
    assert nameless == []
    labels = page.locator(".fig").evaluate_all("all => all.map(e => e.getAttribute('aria-label'))")
    assert len(labels) == len(set(labels)) == 6


@pytest.mark.parametrize("name", ["relative", "changes"])
def test_headings_and_tables_have_an_order(visit: Visit, name: str) -> None:
    page = visit(name)
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map(e => e.tagName)")
    assert set(levels) == {"H2"}
    assert page.locator("main").count() == 1
    unscoped = page.evaluate(
        "[...document.querySelectorAll('.layers thead th, .facts th')].filter(e => !e.scope).map(e => e.outerHTML)"
    )
    assert unscoped == []
    assert page.locator("table.layers > caption, table.facts > caption").count() == 3
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert page.locator("html").get_attribute("lang") == "en"


def focused(page: Page) -> dict[str, Any]:
    found: dict[str, Any] = page.evaluate(
        """() => {
            const e = document.activeElement, style = getComputedStyle(e);
            return {name: e.dataset.test ?? e.className, tag: e.tagName, outline: style.outlineStyle};
        }"""
    )
    return found


def test_everything_is_reached_by_tab_and_shows_its_focus(browser: Browser, report: Reports) -> None:
    with opened(browser, report("three").path) as page:
        page.keyboard.press("Tab")
        assert focused(page)["name"] == "skip"
        box = page.locator(".skip").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        seen = []
        while len(seen) < 60:
            page.keyboard.press("Tab")
            at = focused(page)
            if at["tag"] == "BODY":
                break
            seen.append(at)
        names = [at["name"] for at in seen]
        assert names[:5] == ["copy-markdown", "download-csv", "download-json", "theme", "help"]
        assert names.index("filter") < names.index("problems-only")
        assert [at["tag"] for at in seen].count("A") == 3  # the names of the layers
        assert [at["tag"] for at in seen].count("SUMMARY") == 2
        unseen = [at for at in seen if at["outline"] == "none" and at["tag"] != "INPUT"]
        assert unseen == []


def test_the_skip_link_leads_to_the_table(visit: Visit) -> None:
    page = visit("three")
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("#layers$"))
    expect(page.locator(":target")).to_have_id("layers")


def luminance(colour: str) -> float:
    """Of ``rgb(1, 2, 3)``, as WCAG 2 defines it."""
    shares = [int(part_of) / 255 for part_of in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(page: Page, selector: str) -> float:
    """The contrast of an element's text with the page's paper, as WCAG 2 computes it."""
    ink: str = page.evaluate("(selector) => getComputedStyle(document.querySelector(selector)).color", selector)
    paper: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
    low, high = sorted(map(luminance, (ink, paper)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_the_paper(visit: Visit, theme: str) -> None:
    page = visit("relative")
    page.evaluate("(theme) => { document.documentElement.dataset.theme = theme; }", theme)
    texts = (".verdict", ".details", ".note", "th", "td.rank", "td.op span", "td.sev.ok", "td.sev.problem")
    for selector in (*texts, "td.sev.unusable", ".evidence", ".detail-meta", "figcaption", "footer", ".tools button"):
        assert contrast(page, selector) >= 4.5, selector
    page.evaluate("document.documentElement.dataset.theme = 'auto'")


def test_a_severity_is_a_shape_and_a_word_not_only_a_colour(visit: Visit) -> None:
    page = visit("relative")
    shapes = {}
    for level in ("ok", "problem", "unusable"):
        sign = page.locator(f"td.sev.{level} .sign").first
        shapes[level] = sign.evaluate("e => getComputedStyle(e).clipPath + getComputedStyle(e).borderRadius")
        assert page.locator(f"td.sev.{level}").first.inner_text().strip() == level
    assert len(set(shapes.values())) == 3


def test_a_page_of_seventy_layers_shows_the_row_of_a_late_one(browser: Browser, report: Reports) -> None:
    layers = sorted(report("many").to_dict()["layers"], key=lambda layer: layer["rank"])
    last = layers[-1]["name"]
    with opened(browser, report("many").path, layer=last) as page:
        wait_until_ready(page)
        row = page.locator("tr[aria-current=true]")
        expect(row).to_be_in_viewport()
        assert row.locator("a").get_attribute("title") == last
