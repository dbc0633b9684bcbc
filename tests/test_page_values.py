"""The numbers on a page, in words and behind the figures, against pandas and plain NumPy on the weights themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from playwright.sync_api import Page, expect

from qvis.report import Report
from tests.browser import (
    PLOTS,
    assert_shows,
    channel_rows,
    fold,
    mixed_model,
    number,
    part,
    plain_model,
    plot,
    point_at,
    points,
    unfold,
)

pytestmark = pytest.mark.browser
Reports = Callable[[str], Report]
Visit = Callable[..., Page]
Rows = np.ndarray[Any, np.dtype[np.float64]]

MIXED = ("stem", "starving", "partly_dead", "broken", "depthwise", "single", "tokens", "up", "nothing")
"""Layers of the mixed model whose channels are drawn one by one."""
NAMES = {"min": "min", "q25": "25%", "q50": "50%", "mean": "mean", "q75": "75%", "max": "max", "std": "std"}
"""Arrays of the page, and what ``describe`` calls them."""


def model_of(name: str) -> Any:
    from qvis.adapters.digits import load_digits_model

    return load_digits_model(folded=True) if name == "digits" else mixed_model()  # what the page of the digits shows


def finite(rows: Rows) -> Rows:
    return np.where(np.isfinite(rows), rows, np.nan)


def describe_channels(rows: Rows) -> pd.DataFrame:
    """What pandas says of each row, with the relative range; a line for each channel."""
    table = pd.DataFrame(finite(rows).T).describe().T
    return table.assign(relative_range=relative_ranges(table))


def is_live(table: pd.DataFrame) -> pd.Series:
    peak = table[["min", "max"]].abs().max(axis=1)
    return (peak >= 1e-6 * peak.max()) & (peak > 0)


def relative_ranges(table: pd.DataFrame) -> pd.Series:
    ranges = table["max"] - table["min"]
    base = ranges[is_live(table) & (ranges > 0)].min()
    return ranges / base if base > 0 else ranges.where(ranges.isna(), 1.0)


def cells(page: Page, table: str) -> list[list[str]]:
    rows: list[list[str]] = (
        part(page, table).locator("tbody tr").evaluate_all("all => all.map(r => [...r.cells].map(c => c.textContent))")
    )
    return rows


@pytest.mark.parametrize("layer", [*MIXED, "wide"])
def test_the_statistics_of_relative_ranges_are_those_of_pandas(visit: Visit, layer: str) -> None:
    page = visit("relative", layer)
    table = describe_channels(channel_rows(mixed_model(), layer))
    expected = table["relative_range"][is_live(table)].describe()
    heads = part(page, "statistics").locator("thead th").all_inner_texts()
    assert heads == ["count", "mean", "deviation", "min", "25 %", "50 %", "75 %", "max"]
    (texts,) = cells(page, "statistics")
    assert int(texts[0]) == expected["count"]
    for text, name in zip(texts[1:], ["mean", "std", "min", "25%", "50%", "75%", "max"], strict=True):
        assert_shows(text, expected[name])


def round_to_grid(rows: Rows, step: Rows) -> Rows:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(step > 0, np.rint(rows / step) * step, 0.0)


@pytest.mark.parametrize("layer", [*MIXED, "wide"])
def test_the_rounding_table_is_what_rounding_does(visit: Visit, layer: str) -> None:
    page = visit("ranges", layer)
    rows = np.nan_to_num(finite(channel_rows(mixed_model(), layer)))
    noise, sqnr, step, levels, flags = cells(page, "rounding")
    power = np.square(rows).sum(axis=1)
    peaks = np.abs(rows).max(axis=1)
    steps = [np.full((len(rows), 1), peaks.max() / 127), peaks[:, None] / 127]
    live = peaks >= 1e-6 * peaks.max()
    useful = live & (power > 0) & (peaks >= 1e-3 * np.quantile(peaks[live], 0.75))
    for i, own in enumerate(steps):
        errors = np.square(rows - round_to_grid(rows, own)).sum(axis=1)
        if not useful.any():
            assert (noise[1 + i], sqnr[1 + i]) == ("n/a", "n/a")
            continue
        assert_shows(noise[1 + i], np.quantile(errors[useful] / power[useful], 0.75, method="lower"), digits=2)
        if errors.sum() > 1e-12 * power.sum():
            assert_shows(sqnr[1 + i], 10 * np.log10(power.sum() / errors.sum()), decimals=1)
        else:
            assert sqnr[1 + i] == "∞"
    assert_shows(step[1], peaks.max() / 127, digits=3)
    if useful.any():
        counts = np.rint(rows.max(axis=1) / steps[0][0]) - np.rint(rows.min(axis=1) / steps[0][0]) + 1
        assert levels[1] == f"{np.median(counts[live]):g} of 256"
    assert flags[1].endswith(f" of {len(rows)}")


@pytest.mark.parametrize("layer", ["partly_dead", "broken", "depthwise"])
def test_the_table_of_channels_shows_every_number_of_pandas(visit: Visit, layer: str) -> None:
    page = visit("relative", layer)
    table = describe_channels(channel_rows(mixed_model(), layer))
    unfold(page, "channels")
    expect(part(page, "channels").locator("tbody tr")).to_have_count(len(table))
    heads = part(page, "channels").locator("thead th").all_inner_texts()
    assert heads == ["channel", "min", "25 %", "50 %", "mean", "75 %", "max", "deviation", "relative range", "note"]
    for i, texts in enumerate(cells(page, "channels")):
        assert texts[0] == str(i)
        for text, name in zip(texts[1:-1], [*NAMES.values(), "relative_range"], strict=True):
            assert_shows(text, table[name][i], digits=3 if "e" in text else 4)
    fold(page, "channels")


@pytest.mark.parametrize("name", ["relative", "ranges"])
def test_the_downloaded_statistics_are_those_of_pandas(visit: Visit, name: str) -> None:
    page = visit(name)
    model = mixed_model()
    with page.expect_download() as download:
        part(page, "download-json").click()
    layers = {layer["name"]: layer for layer in json.loads(download.value.path().read_text("utf-8"))["layers"]}
    assert set(layers) == {*MIXED, "wide"}
    for layer in MIXED:
        table = describe_channels(channel_rows(model, layer))
        for field, column in {**NAMES, "relative_range": "relative_range"}.items():
            values = np.array(layers[layer]["statistics"][field], dtype=float)
            atol = 1e-6 if name == "digits" else 1e-12  # another way of folding rounds otherwise
            np.testing.assert_allclose(values, table[column], rtol=1e-6, atol=atol, err_msg=f"{layer}: {field}")
    assert "statistics" not in layers["wide"]


@pytest.mark.parametrize(("name", "layers"), [("relative", MIXED), ("digits", ("stem.conv", "classifier"))])
def test_the_figures_draw_what_pandas_says(visit: Visit, name: str, layers: tuple[str, ...]) -> None:
    model = model_of(name)
    for layer in layers:
        page = visit(name, layer)
        table = describe_channels(channel_rows(model, layer))
        columns = points(page, "ranges", type="Scatter", y="mean")
        for field, column in NAMES.items():
            if field == "q50":  # no figure draws the median; the table of channels has it
                continue
            values = np.array(columns[field], dtype=float)
            atol = 1e-6 if name == "digits" else 1e-12  # another way of folding rounds otherwise
            np.testing.assert_allclose(values, table[column], rtol=1e-6, atol=atol, err_msg=f"{layer}: {field}")
        assert columns["label"] == [str(i) for i in range(len(table))]
        assert columns["channel"] == list(range(len(table)))
        with np.errstate(divide="ignore"):
            logs = np.log10(table["relative_range"].where(table["relative_range"] > 0))
        drawn = np.array(points(page, "relative", type="Scatter")["relative_log"], dtype=float)
        np.testing.assert_allclose(drawn, logs, rtol=1e-6, atol=1e-6)


def test_each_figure_draws_its_own_columns(visit: Visit) -> None:
    page = visit("relative", "stem")
    glyphs = {name: [(r["type"], r.get("y"), r.get("top")) for r in plot(page, name)["renderers"]] for name in PLOTS}
    assert ("VBar", None, "max") in glyphs["ranges"]
    assert ("VBar", None, "q75") in glyphs["ranges"]
    assert ("Scatter", "mean", None) in glyphs["ranges"]
    assert ("Scatter", "relative_log", None) in glyphs["relative"]
    assert ("VBar", None, "levels_log") in glyphs["levels"]
    assert glyphs["histogram"] == [("Quad", None, "now")]
    assert glyphs["mean_std"] == [("Scatter", "std", None)]
    assert glyphs["min_max"] == [("Scatter", "max", None)]


@pytest.mark.parametrize("layer", ["starving", "partly_dead", "broken", "depthwise", "wide"])
def test_the_histogram_counts_the_relative_ranges_in_75_bins(visit: Visit, layer: str) -> None:
    page = visit("relative", layer)
    table = describe_channels(channel_rows(mixed_model(), layer))
    relative = table["relative_range"].dropna()
    bins = points(page, "histogram", type="Quad")
    assert len(bins["now"]) == 75
    assert sum(bins["now"]) == (relative >= 1).sum()
    end = bins["right"][-1]
    assert 10**end == pytest.approx(max(relative.max(), 1), rel=0.01)
    wider_than_half = (np.log10(relative[relative >= 1]) > (bins["right"][37] + bins["left"][38]) / 2).sum()
    assert sum(bins["now"][38:]) == wider_than_half


def test_all_points_lie_within_their_axes(visit: Visit) -> None:
    fields = {"ranges": ("channel", "mean"), "mean_std": ("mean", "std"), "min_max": ("min", "max")}
    for layer in MIXED:
        page = visit("relative", layer)
        for name, (across, up) in fields.items():
            figure = plot(page, name)
            columns = figure["renderers"][-1 if name != "ranges" else 0]["data"]
            values = {axis: np.array(columns[field], dtype=float) for axis, field in (("x", across), ("y", up))}
            if name == "ranges":
                values["y"] = np.array([columns["min"], columns["max"]], dtype=float)
            for axis, numbers in values.items():
                low, high = figure[axis]
                assert low < high
                known = numbers[np.isfinite(numbers)]
                assert ((known >= low) & (known <= high)).all(), f"{layer}: {name} {axis}"


@pytest.mark.parametrize("name", ["relative", "ranges", "digits"])
def test_the_findings_are_the_reasons_of_the_report(visit: Visit, report: Reports, name: str) -> None:
    verbs = {"ok": "Leave it. ", "watch": "Watch it. ", "problem": "Fix it. ", "unusable": "Unusable. "}
    for layer in report(name).layers:
        page = visit(name, layer.name)
        texts = [text.replace("\u00a0", " ") for text in part(page, "findings").locator("p").all_inner_texts()]
        expected = [f"{reason.text} ({reason.evidence})" for reason in layer.reasons]
        assert texts == [verbs[str(layer.severity)] + expected[0], *expected[1:]]
        meta = part(page, "detail-meta").inner_text()
        assert meta.startswith(f"{layer.op} {'×'.join(map(str, layer.shape))} {layer.dtype}, ")


@pytest.mark.parametrize(
    ("layer", "marks"),
    [
        ("stem", {}),
        ("starving", {5: "diamond", **{i: "inverted_triangle" for i in range(24) if i != 5}}),
        ("partly_dead", {3: "x", 7: "inverted_triangle"}),
        ("broken", {2: "x", 3: "x", 4: "x"}),
        ("nothing", {0: "x", 1: "x", 2: "x"}),
    ],
)
def test_flagged_channels_are_marked(visit: Visit, layer: str, marks: dict[int, str]) -> None:
    page = visit("relative", layer)
    rows = np.nan_to_num(finite(channel_rows(mixed_model(), layer)))
    setter = int(np.abs(rows).max(axis=1).argmax())
    if rows.any():
        marks = {setter: "diamond", **marks}
    flags = points(page, "ranges", type="Scatter", y="y")
    assert dict(zip(flags["channel"], flags["marker"], strict=True)) == marks
    notes = points(page, "ranges", type="Scatter", y="mean")["note"]
    assert {i for i, note in enumerate(notes) if note} == set(marks)
    assert [i for i, note in enumerate(notes) if "sets the step" in note] == ([setter] if rows.any() else [])


def test_the_notes_of_channels_name_their_findings(visit: Visit) -> None:
    notes = points(visit("relative", "partly_dead"), "ranges", type="Scatter", y="mean")["note"]
    assert notes[3] == "dead"
    assert notes[7] == "near dead"
    notes = points(visit("relative", "starving"), "ranges", type="Scatter", y="mean")["note"]
    assert notes[5] == "sets the step, outlier by range"
    assert {note for i, note in enumerate(notes) if i != 5} == {"starved"}
    notes = points(visit("relative", "broken"), "ranges", type="Scatter", y="mean")["note"]
    assert [i for i, note in enumerate(notes) if "NaN or infinite" in note] == [2, 3, 4]


def test_more_than_512_channels_become_an_envelope_and_the_page_says_so(visit: Visit, report: Reports) -> None:
    page = visit("relative", "wide")
    columns = points(page, "ranges", type="Scatter", y="mean")
    count = len(columns["label"])
    assert count <= 512
    note = part(page, "envelope")
    expect(note).to_be_visible()
    assert f"{count} points over 1,300 channels" in note.inner_text()
    ends = [label.split(" to ") for label in columns["label"]]
    spans = [(int(both[0]), int(both[-1])) for both in ends]
    assert spans[0][0] == 0
    assert spans[-1][1] == 1299
    assert [first for first, _ in spans[1:]] == [last + 1 for _, last in spans[:-1]]
    table = describe_channels(channel_rows(mixed_model(), "wide"))
    joined = {"min": "min", "q25": "min", "mean": "mean", "q75": "max", "max": "max", "std": "max"}
    for field, how in joined.items():
        expected = [table[NAMES[field]].iloc[first : last + 1].agg(how) for first, last in spans]
        np.testing.assert_allclose(np.array(columns[field], dtype=float), expected, rtol=1e-6, atol=1e-12)
    wide = next(layer for layer in report("relative").layers if layer.name == "wide")
    flagged = {*wide.flags["outliers"], *wide.flags["starved"]}
    assert {1, 650, 1298} <= flagged
    assert flagged <= {first for first, last in spans if first == last}
    marked = points(page, "ranges", type="Scatter", y="y")["channel"]
    assert {spans[i][0] for i in marked} >= flagged
    expect(part(visit("relative", "stem"), "envelope")).to_be_hidden()


def test_the_table_of_channels_of_an_envelope_names_its_groups(visit: Visit) -> None:
    page = visit("relative", "wide")
    labels = points(page, "ranges", type="Scatter", y="mean")["label"]
    unfold(page, "channels")
    expect(part(page, "channels").locator("tbody tr")).to_have_count(len(labels))
    assert [row[0] for row in cells(page, "channels")] == labels
    fold(page, "channels")


def test_pointing_at_a_channel_shows_its_numbers(visit: Visit) -> None:
    for name, layer, channel, note in (
        ("relative", "stem", 4, ""),
        ("ranges", "partly_dead", 7, "near dead"),
        ("ranges", "partly_dead", 3, "dead"),
        ("ranges", "broken", 4, "NaN or infinite"),
    ):
        page = visit(name, layer)
        expected = describe_channels(channel_rows(mixed_model(), layer)).loc[channel]
        tip = point_at(page, "ranges", channel + 0.3)
        assert tip.pop("channel") == str(channel)
        assert tip.pop("note") == note
        assert set(tip) == {"mean", "min", "max", "25 %", "75 %", "deviation"}
        for label, text in tip.items():
            name_in_pandas = {"deviation": "std"}.get(label, label.replace(" ", ""))
            assert_shows(text, expected[name_in_pandas], digits=3 if "e" in text else 4)


def test_pointing_at_the_strips_below_shows_their_numbers(visit: Visit) -> None:
    page = visit("relative", "partly_dead")
    table = describe_channels(channel_rows(mixed_model(), "partly_dead"))
    for channel, note in ((0, ""), (7, "near dead"), (19, "")):
        tip = point_at(page, "relative", channel - 0.3)
        assert (tip["channel"], tip["note"]) == (str(channel), note)
        assert_shows(tip["relative range"], table["relative_range"][channel])
    tip = point_at(page, "levels", 7)
    assert tip == {"channel": "7", "levels": "1", "note": "near dead"}


def test_pointing_at_a_dot_names_its_channel(visit: Visit) -> None:
    page = visit("relative", "starving")
    table = describe_channels(channel_rows(mixed_model(), "starving"))
    tip = point_at(page, "mean_std", table["mean"][5], table["std"][5])
    assert tip["channel"] == "5"
    assert_shows(tip["mean"], table["mean"][5], digits=4)
    assert_shows(tip["deviation"], table["std"][5], digits=4)
    tip = point_at(page, "min_max", table["min"][5], table["max"][5])
    assert tip["channel"] == "5"
    assert_shows(tip["max"], table["max"][5], digits=4)


def test_pointing_at_a_bin_counts_its_channels(visit: Visit) -> None:
    page = visit("relative", "starving")
    bins = points(page, "histogram", type="Quad")
    last = bins["now"].index(1, 40)
    tip = point_at(page, "histogram", (bins["left"][last] + bins["right"][last]) / 2, 0.5)
    assert tip["channels"] == "1"
    low, high = map(float, tip["relative range"].split(" to "))
    assert low <= describe_channels(channel_rows(mixed_model(), "starving"))["relative_range"][5] * 1.01 <= high * 1.02


@pytest.mark.parametrize("name", ["relative", "ranges"])
def test_lines_may_be_chosen_instead_of_strokes(visit: Visit, name: str) -> None:
    page = visit(name, "stem")

    def drawn() -> tuple[set[str], set[str]]:
        renderers = [r for r in plot(page, "ranges")["renderers"] if r["visible"]]
        lines = {r["y"] for r in renderers if r["type"] == "Line"}
        return lines, {r["top"] for r in renderers if r["type"] == "VBar" and r["fill_color"]}

    assert drawn() == (set(), {"max", "q75"})
    page.get_by_text("lines", exact=True).click()
    assert drawn() == ({"min", "max", "mean"}, set())
    page.get_by_text("strokes", exact=True).click()
    assert drawn() == (set(), {"max", "q75"})


def test_the_report_of_relative_ranges_shows_them_first(visit: Visit) -> None:
    order = "[...document.querySelectorAll('.fig')].map(e => e.dataset.test)"
    assert visit("relative").evaluate(order)[:2] == ["figure-relative", "figure-ranges"]
    assert visit("ranges").evaluate(order)[:2] == ["figure-ranges", "figure-relative"]


def test_one_layer_of_one_model_has_all_figures(visit: Visit) -> None:
    page = visit("one")
    rows = channel_rows(plain_model(1), "layer0")
    assert number(cells(page, "statistics")[0][0]) == len(rows)
    for name in PLOTS:
        assert any(r["data"] for r in plot(page, name)["renderers"])
