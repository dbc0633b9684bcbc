"""The page of compared grids: answers, tables, the levels on the weights, and what it does with awkward layers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

import qvis
from qvis.quantization.grids import Scheme
from qvis.report.grids import GridReport
from qvis.words import size, visible
from tests.browser import EVIL, LONG, QUOTES, TURNED, opened, part, selected, shown_rows

pytestmark = pytest.mark.browser
Visit = Callable[..., Page]

SCHEMES = (
    Scheme(bits=8, granularity="tensor"),
    Scheme(bits=4),
    Scheme(bits=4, symmetric=False),
    Scheme(bits=4, symmetric=False, granularity=32, range="mse"),
    Scheme(bits=4, narrow=False, granularity=32),
    Scheme("offset", 3),
    Scheme("power_of_two", 6),
    Scheme("kmeans", 2, "tensor"),
    Scheme("kmeans", 3),
    Scheme("quantile", 4),
    Scheme("logarithmic", 4),
    Scheme("float8_e5m2", 8),
    Scheme("float4_e2m1", 4, "tensor"),
    Scheme(bits=12),
)
PHONE = {"width": 400, "height": 800}


def weights() -> dict[str, np.ndarray[Any, Any]]:
    """Layers of all sorts, with names of all sorts."""
    generator = np.random.default_rng(0)
    sizes = generator.lognormal(0, 0.5, (12, 1))
    return {
        "plain": (generator.standard_normal((12, 80)) * sizes).astype(np.float32),
        EVIL: generator.standard_normal((3, 4, 3, 3)).astype(np.float32),
        QUOTES: np.zeros((2, 3), np.float32),
        LONG: np.full((2, 3), np.nan, np.float32),
        TURNED: np.array([[1.5, 1.5], [1.5, np.inf]]),
        "short": generator.standard_normal((6, 9)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> GridReport:
    return qvis.compare_grids(
        weights(), tmp_path_factory.mktemp("grids"), schemes=SCHEMES, keep_db=25, name="odd & ends"
    )


@pytest.fixture(scope="module")
def page(browser: Browser, report: GridReport) -> Iterator[Page]:
    with opened(browser, report.path) as page:
        yield page


def choose(page: Page, layer: str) -> None:
    """Select a layer by its row."""
    if part(page, "filter").input_value():
        part(page, "filter").fill("")
    page.locator("[data-test=layer-row]").nth([*weights()].index(layer)).locator("td.name").click()
    expect(part(page, "detail-name")).to_have_text(visible(layer))


def columns(page: Page, table: str) -> list[list[str]]:
    """The texts of the rows of a table."""
    found: list[list[str]] = page.evaluate(
        "(table) => [...document.querySelectorAll(`[data-test=${table}] tbody tr`)]"
        ".map(row => [...row.cells].map(cell => cell.textContent.trim()))",
        table,
    )
    return found


def draw_only(page: Page, label: str) -> None:
    """Have the levels of one grid drawn, and of no other."""
    for box in page.locator("[data-test=grids] input:checked").all():
        box.uncheck()
    page.get_by_label(f"Draw the levels of {label}", exact=True).check()
    expect(page.locator(".strip")).to_have_count(1)


# ---------------------------------------------------------------------------------------------------------------------


def test_the_page_reads_without_scripts(browser: Browser, report: GridReport) -> None:
    with opened(browser, report.path, java_script_enabled=False) as page:
        expect(part(page, "verdict")).to_have_text(report.verdict)
        for answer, article in zip(report.comparison.answers, part(page, "answer").all(), strict=True):
            expect(article).to_contain_text(answer.question)
            expect(article).to_contain_text(answer.text.replace(" %", "\N{NO-BREAK SPACE}%"))
        expect(part(page, "layer-row")).to_have_count(len(weights()))
        expect(part(page, "grids-detail")).to_be_hidden()
        expect(part(page, "verdict-details")).to_contain_text("Without data nothing is known of the output")


def test_the_schemes_stand_best_first_with_their_figures(page: Page, report: GridReport) -> None:
    found = report.comparison
    rows = columns(page, "schemes")
    assert [row[0] for row in rows] == [found.labels[found.schemes.index(one.scheme)] for one in found.ranked]
    for row, one in zip(rows, found.ranked, strict=True):
        by = int(found.beaten[found.schemes.index(one.scheme)])
        assert row[1] == f"{one.bits_per_weight:.2f}"
        assert row[2] == size(one.bytes)
        assert row[3] == f"{one.sqnr_db:.1f}"
        assert row[4:] == [one.runs_on, "none" if by < 0 else found.labels[by]]


@pytest.mark.parametrize("layer", ["plain", EVIL, "short"])
def test_the_grids_of_a_layer_are_those_that_were_found(page: Page, report: GridReport, layer: str) -> None:
    choose(page, layer)
    found, labels = report.comparison.layer(layer), report.comparison.labels
    ranked = [one for one in found.ranked if found.same_as[SCHEMES.index(one.scheme)] == SCHEMES.index(one.scheme)]
    rows = columns(page, "grids")
    assert [row[1] for row in rows] == [labels[SCHEMES.index(one.scheme)] for one in ranked]
    for row, one in zip(rows, ranked, strict=True):
        by = found.beaten_by(one.scheme)
        assert row[2:4] == [f"{one.bits_per_weight:.2f}", size(one.bytes)]
        assert float(row[4]) == pytest.approx(one.sqnr_db, abs=0.11)
        assert row[5:] == [one.runs_on, "none" if by is None else labels[SCHEMES.index(by.scheme)]]
    for answer, line in zip(found.answers, part(page, "findings").locator("p").all(), strict=True):
        expect(line).to_contain_text(answer.question)
        expect(line).to_contain_text(answer.text.replace(" %", "\N{NO-BREAK SPACE}%"))


@pytest.mark.parametrize("scheme", SCHEMES[:-1], ids=str)
def test_the_levels_that_are_drawn_are_those_of_the_grid(page: Page, report: GridReport, scheme: Scheme) -> None:
    weight = weights()["plain"]
    choose(page, "plain")
    label = report.comparison.labels[SCHEMES.index(scheme)]
    draw_only(page, label)
    shown = report.comparison.layer("plain").shown
    for place in (1, len(shown) - 1):
        channel = shown[place].channel
        assert channel is not None
        part(page, "channel").select_option(str(place))
        group = int(np.abs(weight[channel]).argmax()) // 32 if scheme.granularity == 32 else 0
        row = 0 if scheme.granularity == "tensor" else channel
        levels = np.unique(scheme.fit(weight).levels(row, group))
        expect(page.locator(".strip line.stem")).to_have_count(len(levels))
        expect(page.locator(".strip p")).to_contain_text(f"{len(levels)} levels")
        drawn: list[float] = page.evaluate(
            "[...document.querySelectorAll('.strip line.stem')].map(l => +l.getAttribute('x1'))"
        )
        drawn = sorted(drawn)
        inside = (levels - levels[0]) / (levels[-1] - levels[0])
        assert (np.array(drawn) - drawn[0]) / (drawn[-1] - drawn[0]) == pytest.approx(inside, abs=2e-3)


def test_bars_are_the_weights_of_what_is_chosen(page: Page, report: GridReport) -> None:
    choose(page, "plain")
    for place, shown in enumerate(report.comparison.layer("plain").shown):
        part(page, "channel").select_option(str(place))
        expect(page.locator("#grid-histogram rect.bar")).to_have_count(int(np.count_nonzero(shown.counts)))
        heights = page.evaluate(
            "[...document.querySelectorAll('#grid-histogram rect.bar')].map(b => +b.getAttribute('height'))"
        )
        counts = shown.counts[shown.counts > 0]
        assert np.array(heights) / max(heights) == pytest.approx(counts / counts.max(), abs=0.02)


def test_a_grid_that_differs_by_channel_asks_for_one(page: Page) -> None:
    choose(page, "plain")
    draw_only(page, "4-bit uniform, per channel")
    part(page, "channel").select_option("0")
    expect(page.locator(".strip p")).to_contain_text("another grid in each channel: choose one above")
    expect(page.locator(".strip svg")).to_have_count(0)
    draw_only(page, "12-bit uniform, per channel")
    part(page, "channel").select_option("1")
    expect(page.locator(".strip p")).to_contain_text("too many levels to be seen")


def test_four_grids_can_be_compared_at_once(page: Page) -> None:
    choose(page, "plain")
    draw_only(page, "4-bit uniform, per channel")
    for label in ("2-bit kmeans, per tensor", "4-bit quantile, per channel", "4-bit logarithmic, per channel"):
        page.get_by_label(f"Draw the levels of {label}", exact=True).check()
    expect(page.locator(".strip")).to_have_count(4)
    # a fifth takes the place of the first
    page.get_by_label("Draw the levels of 6-bit power of two, per channel", exact=True).check()
    expect(page.locator(".strip")).to_have_count(4)
    expect(page.get_by_label("Draw the levels of 4-bit uniform, per channel", exact=True)).not_to_be_checked()


def test_a_mark_of_the_chart_draws_its_grid(page: Page) -> None:
    choose(page, "plain")
    draw_only(page, "4-bit uniform, per channel")
    chart = part(page, "grid-chart")
    chart.scroll_into_view_if_needed()
    box = chart.locator("g.series circle.dot:not(.open)").last.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(chart.locator("output")).to_contain_text("bits a weight")
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(page.locator(".strip")).to_have_count(2)


def test_log_counts_are_switched_by_box_and_key(page: Page) -> None:
    choose(page, "plain")
    part(page, "channel").select_option("0")

    def labels() -> list[str]:
        return page.locator("#grid-histogram text.tick[text-anchor=end]").all_text_contents()

    linear = labels()
    part(page, "log").check()
    expect(page.locator("#grid-histogram text.tick[text-anchor=end]")).not_to_have_text(linear)
    assert set(labels()) <= {"1", "2", "5", "10", "20", "50", "100"}
    part(page, "log").blur()
    page.keyboard.press("l")
    expect(part(page, "log")).not_to_be_checked()
    assert labels() == linear


def test_layers_without_numbers_say_so(page: Page) -> None:
    choose(page, QUOTES)
    expect(part(page, "findings")).to_contain_text("all its weights are zero, which any grid holds")
    expect(part(page, "grid-chart")).to_be_hidden()
    expect(page.locator("[data-test=grids] tr.frontier")).to_have_count(0)
    choose(page, LONG)
    expect(part(page, "findings")).to_contain_text("there are no numbers in it")
    expect(part(page, "detail-meta")).to_contain_text("6 weights NaN or infinite, which count for nothing")
    choose(page, TURNED)
    expect(part(page, "exact")).to_contain_text("no error")


def test_rows_are_filtered_sorted_and_walked_by_keys(page: Page) -> None:
    names = [visible(name) for name in weights()]
    choose(page, "plain")
    page.keyboard.press("j")
    expect(part(page, "detail-name")).to_have_text(names[1])
    page.keyboard.press("k")
    expect(part(page, "detail-name")).to_have_text(names[0])
    page.keyboard.press("/")
    page.keyboard.type("short")
    expect(part(page, "count")).to_have_text("1 of 6")
    assert shown_rows(page) == ["short"]
    page.keyboard.press("Enter")
    expect(part(page, "detail-name")).to_have_text("short")
    assert page.evaluate("location.hash") == "#layer=short"
    part(page, "filter").fill("nothing at all")
    expect(part(page, "empty")).to_be_visible()
    part(page, "empty").get_by_role("button").click()
    expect(part(page, "count")).to_have_text("6 layers")
    page.locator(".layers th.weights button").click()
    assert shown_rows(page)[0] == "plain"
    page.locator(".layers th.rank button").click()
    assert shown_rows(page) == names


@pytest.mark.parametrize("layer", [EVIL, TURNED, LONG])
def test_a_link_leads_to_a_layer_whatever_its_name(browser: Browser, report: GridReport, layer: str) -> None:
    with opened(browser, report.path, layer=layer) as page:
        assert selected(page) == visible(layer)


def test_on_a_phone_the_panel_opens_below_its_row(browser: Browser, report: GridReport) -> None:
    with opened(browser, report.path, viewport=PHONE) as page:
        expect(part(page, "grids-detail")).to_be_hidden()
        page.locator("[data-test=layer-row] td.name").first.click()
        expect(page.locator("tr.inline [data-test=grids-detail]")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        # a chart is as high as it is meant to be, in a table too
        box = page.locator("#grid-chart svg").bounding_box()
        assert box is not None
        assert box["height"] > 200
        page.locator("[data-test=layer-row] td.name").first.click()
        expect(part(page, "grids-detail")).to_be_hidden()


def test_what_is_saved_holds_what_was_found(page: Page, report: GridReport, tmp_path: Path) -> None:
    document = report.to_dict()
    with page.expect_download() as waiting:
        part(page, "download-json").click()
    waiting.value.save_as(tmp_path / "grids.json")
    saved = json.loads((tmp_path / "grids.json").read_text())
    assert saved["schemes"] == document["schemes"]
    for ours, theirs in zip(saved["layers"], document["layers"], strict=True):
        assert ours["answers"] == theirs["answers"]
        for name in ("rank", "bytes", "beaten_by", "same_as"):
            assert ours["grids"][name] == theirs["grids"][name]
        known = [
            (a, b) for a, b in zip(ours["grids"]["sqnr_db"], theirs["grids"]["sqnr_db"], strict=True) if b is not None
        ]
        assert [a for a, _ in known] == pytest.approx([b for _, b in known], rel=1e-3)
    with page.expect_download() as waiting:
        part(page, "download-csv").click()
    waiting.value.save_as(tmp_path / "grids.csv")
    lines = (tmp_path / "grids.csv").read_text().splitlines()
    assert lines[0] == "layer,rank,grid,bits_per_weight,bytes,sqnr_db,runs_on,beaten_by"
    assert lines[1].startswith('plain,1,"')
    assert not any(re.match(r"[=+@-]", line) for line in lines)
    part(page, "copy-markdown").click()
    expect(part(page, "toast")).to_have_text("Copied as Markdown")


def test_a_model_that_was_run_shows_damage_and_what_was_measured(browser: Browser, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 5))
    inputs = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)
    report = qvis.compare_grids(model, tmp_path, schemes=SCHEMES[:3], inputs=inputs)
    with opened(browser, report.path) as page:
        expect(part(page, "verdict")).to_contain_text("of the output are left, measured on 32 samples")
        expect(part(page, "schemes").get_by_text("measured", exact=True)).to_have_count(3)
        rows = columns(page, "grids")
        for row, one in zip(rows, report.layers[0].ranked, strict=True):
            told, sign = re.fullmatch(r"([\d.]+)\s%(.?)", row[5]).groups()  # type: ignore[union-attr]
            assert float(told) / 100 == pytest.approx(one.damage.value, rel=0.06)
            assert sign == ("?" if one.damage.confidence == "low" else "±")
        expect(part(page, "footer")).to_contain_text("the model was run, and not changed")


def test_a_thousand_layers_have_a_row_and_a_panel_each(browser: Browser, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    many = {f"layer.{i}": generator.standard_normal((2, 3)) for i in range(1000)}
    report = qvis.compare_grids(many, tmp_path, schemes=SCHEMES[:2])
    with opened(browser, report.path, layer="layer.999") as page:
        expect(part(page, "count")).to_have_text("1,000 layers")
        assert selected(page) == "layer.999"
        expect(page.locator("[data-test=channel] option")).to_have_count(3)
        found = report.layers[-1].shown[-1]
        expect(part(page, "channel").locator("option").last).to_contain_text(f"channel {found.channel}")
        part(page, "channel").select_option("2")
        expect(page.locator("#grid-histogram rect.bar")).to_have_count(int(np.count_nonzero(found.counts)))
