"""The page of two versions of a model: before and after on common axes, what changed, what could not be compared."""

from __future__ import annotations

from collections.abc import Callable
from math import isclose

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from qvis.report import Report
from tests.browser import changed_models, channel_rows, go_to, part, plot, point_at, points, selected, shown_rows

pytestmark = pytest.mark.browser
Reports = Callable[[str], Report]
Visit = Callable[..., Page]
Shared = Callable[[str], Page]

VERDICTS = {"improved": "better", "spoiled": "worse", "stirred": "same", "untouched": "unchanged", "wide": "worse"}
AXES = (
    ("ranges", "y", ("min", "max")),
    ("relative", "y", ("relative_log",)),
    ("levels", "y", ("levels_log",)),
    ("mean_std", "x", ("mean",)),
    ("mean_std", "y", ("std",)),
    ("min_max", "x", ("min",)),
    ("min_max", "y", ("max",)),
)
"""Axes of values, and the columns drawn along them."""
LAYERS = ("improved", "spoiled", "stirred", "untouched")


def test_before_is_dotted_after_is_solid_and_the_difference_is_shaded(visit: Visit) -> None:
    renderers = plot(visit("changes", "improved"), "ranges")["renderers"]
    lines = {r["y"]: r for r in renderers if r["type"] == "Line"}
    assert set(lines) == {"min", "max", "mean", "before_min", "before_max", "before_mean"}
    for name, line in lines.items():
        assert line["visible"]
        assert bool(line["line_dash"]) == name.startswith("before_")
    areas = {(r["y1"], r["y2"]) for r in renderers if r["type"] == "VArea" and r["visible"]}
    assert areas == {("before_min", "min"), ("before_max", "max"), ("before_mean", "mean")}
    assert all(r["fill_color"] for r in renderers if r["type"] == "VArea")


@pytest.mark.parametrize("layer", LAYERS)
def test_both_versions_are_drawn_from_their_own_weights(visit: Visit, layer: str) -> None:
    columns = points(visit("changes", layer), "ranges", type="Scatter", y="mean")
    for model, prefix in zip(changed_models(), ("before_", ""), strict=True):
        rows = channel_rows(model, layer)
        expected = {"min": rows.min(axis=1), "max": rows.max(axis=1), "mean": rows.mean(axis=1)}
        expected["std"] = rows.std(axis=1, ddof=1)
        expected["q25"], expected["q75"] = np.quantile(rows, (0.25, 0.75), axis=1)
        for name, values in expected.items():
            np.testing.assert_allclose(columns[prefix + name], values, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("layer", [*LAYERS, "wide"])
def test_the_axes_hold_both_versions(visit: Visit, layer: str) -> None:
    page = visit("changes", layer)
    for figure, axis, names in AXES:
        drawn = plot(page, figure)
        low, high = drawn[axis]
        columns = drawn["renderers"][0]["data"]
        values = np.array([columns[prefix + name] for name in names for prefix in ("", "before_")], dtype=float)
        assert np.isfinite(values).all()
        assert low <= values.min(), f"{figure} {axis}"
        assert values.max() <= high, f"{figure} {axis}"


def test_the_histograms_count_each_version_on_the_common_axis(visit: Visit) -> None:
    bins = points(visit("changes", "improved"), "histogram", type="Quad")
    assert len(bins["now"]) == len(bins["before"]) == 75
    edges = 10 ** np.array([0, *(np.array(bins["left"][1:]) + np.array(bins["right"][:-1])) / 2, np.inf])
    for model, name in zip(changed_models(), ("before", "now"), strict=True):
        rows = channel_rows(model, "improved")
        ranges = rows.max(axis=1) - rows.min(axis=1)
        counts, _ = np.histogram(ranges / ranges.min(), bins=edges)
        assert bins[name] == counts.tolist()


def test_each_row_says_what_became_of_its_layer(visit: Visit, report: Reports) -> None:
    page = visit("changes")
    changes = {change.name: change for change in report("changes").layers}
    assert {name: change.verdict for name, change in changes.items()} == VERDICTS
    for name, verdict in VERDICTS.items():
        row = part(page, "layer-row").filter(has=page.locator(f"a[title={name}]"))
        cell = row.locator("td.gain")
        assert verdict in (cell.get_attribute("class") or "")
        if verdict in ("same", "unchanged"):
            assert cell.inner_text() == verdict
        else:
            text = cell.inner_text().replace("−", "-")
            assert text.startswith("+" if verdict == "better" else "-")
            assert isclose(float(text.removesuffix(" dB")), changes[name].gain_db, abs_tol=0.051)
    improved = part(page, "layer-row").filter(has=page.locator("a[title=improved]")).locator("td.sev")
    assert "problem, now" in (improved.text_content() or "")
    assert improved.inner_text().split()[-1] == "ok"


@pytest.mark.parametrize("layer", VERDICTS)
def test_the_panel_begins_with_the_change(visit: Visit, report: Reports, layer: str) -> None:
    page = visit("changes", layer)
    change = next(change for change in report("changes").layers if change.name == layer)
    first, second = part(page, "findings").locator("p").all_inner_texts()[:2]
    words = {"better": "Better.", "worse": "Worse.", "same": "About the same.", "unchanged": "Unchanged."}
    expected = f"{words[VERDICTS[layer]]} {change.text} (from the weights alone)"
    assert first.replace("\u00a0", " ") == expected
    assert second.startswith(f"Now {change.severity}. ")


def test_the_tables_hold_both_versions(visit: Visit) -> None:
    page = visit("changes", "improved")
    heads = part(page, "statistics").locator("tbody th").all_inner_texts()
    assert heads == ["before", "after"]
    maxima = part(page, "statistics").locator("tbody td:last-child").all_inner_texts()
    for text, model in zip(maxima, changed_models(), strict=True):
        rows = channel_rows(model, "improved")
        ranges = rows.max(axis=1) - rows.min(axis=1)
        assert float(text) == pytest.approx(ranges.max() / ranges.min(), rel=5e-3)
    columns = part(page, "rounding").locator("thead th").all_inner_texts()
    assert [" ".join(text.split()) for text in columns[1:]] == [
        "tensor before",
        "tensor after",
        "channel before",
        "channel after",
    ]


def test_layers_without_a_partner_are_named_with_the_reason(visit: Visit) -> None:
    section = part(visit("changes"), "not-compared")
    entries = dict(zip(section.locator("dt").all_inner_texts(), section.locator("dd").all_inner_texts(), strict=True))
    assert entries == {
        "added": "only in the new model",
        "removed": "only in the old model",
        "reshaped": "its shape was 5×4 and is 6×4",
    }
    assert {"added", "removed", "reshaped"}.isdisjoint(shown_rows(visit("changes")))


def test_the_overview_has_a_mark_for_before_and_after(visit: Visit) -> None:
    page = visit("changes")
    styles = page.locator(".stems i").evaluate_all("all => all.map(e => e.getAttribute('style'))")
    assert len(styles) == len(VERDICTS)
    assert all("--h:" in style and "--b:" in style for style in styles)


def test_pointing_at_a_stem_tells_before_and_after(visit: Visit) -> None:
    page = visit("changes")
    box = page.locator(".field").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.1 * box["width"], box["y"] + box["height"] / 2)
    row = part(page, "layer-row").filter(has=page.locator("a[title=improved]"))
    before, after = (row.locator("td").nth(column).inner_text() for column in (5, 6))
    assert before != after
    expect(page.locator(".field .hover")).to_have_text(f"improved {before} → {after} ok")
    page.mouse.move(0, 0)


def test_pointing_at_a_channel_shows_both_versions(visit: Visit) -> None:
    tip = point_at(visit("changes", "improved"), "ranges", 4)
    assert tip["channel"] == "4"
    expected = [channel_rows(model, "improved")[4].min() for model in changed_models()]
    shown = [float(text.replace("−", "-")) for text in tip["min"].split(" → ")]
    assert shown == pytest.approx(expected, rel=1e-3)


def test_identical_models_have_not_changed(shared_page: Shared, report: Reports) -> None:
    page = shared_page("awkward changes")
    count = len(report("awkward changes").layers)
    assert f"nothing changed in {count} layers" in part(page, "verdict").inner_text()
    assert page.locator("td.gain").all_inner_texts() == ["unchanged"] * count
    expect(part(page, "not-compared")).to_have_count(0)
    assert "Unchanged. The weights are the same, bit for bit." in part(page, "findings").inner_text()
    columns = points(page, "ranges", type="Scatter", y="mean")
    assert columns["before_min"] == columns["min"]


def test_models_with_no_layer_in_common_are_told_apart_by_name(shared_page: Shared) -> None:
    page = shared_page("nothing in common")
    assert "no layer of the two models could be matched" in part(page, "verdict").inner_text()
    assert part(page, "not-compared").locator("dt").all_inner_texts() == ["other", "layer0", "layer1"]
    expect(part(page, "layers")).to_have_count(0)
    expect(part(page, "detail")).to_have_count(0)
    for key in ("j", "k", "p", "/", "t", "t", "t", "Escape"):
        page.keyboard.press(key)
    go_to(page, "layer=other")
    with page.expect_download():
        part(page, "download-csv").click()
    with page.expect_download():
        part(page, "download-json").click()
    part(page, "copy-markdown").click()
    expect(part(page, "toast")).to_have_text("Copied as Markdown")
    page.keyboard.press("?")
    expect(part(page, "help-dialog")).to_be_visible()
    page.keyboard.press("Escape")
    assert page.watch.messages == []


def test_the_worst_change_is_shown_first(visit: Visit) -> None:
    page = visit("changes")
    assert selected(page) == "spoiled"
    assert page.title() == "Old to New: what changed"
    assert part(page, "identity").inner_text().startswith("Old")
