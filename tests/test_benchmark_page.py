"""The page of a benchmark, in a browser."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from math import inf, nan
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from qvis.benchmarking.records import Benchmark, LayerError
from qvis.report.benchmark_verdict import tell_time
from qvis.words import size, visible
from tests.browser import AWKWARD_NAMES, EVIL, assert_shows, opened, part
from tests.measured import make_benchmark, make_variant

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser
CLASSES = tuple(str(i) for i in range(10))


@pytest.fixture(scope="module")
def found() -> Benchmark:
    """A baseline, two models, and one that only simulates integers."""
    variants = [make_variant(i, classes=CLASSES, layers=4 + i) for i in range(3)]
    return make_benchmark([*variants, make_variant(3, name="imitated.pt2", classes=CLASSES, timed=False, layers=7)])


@pytest.fixture(scope="module")
def page(browser: Browser, found: Benchmark, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    path = found.write(tmp_path_factory.mktemp("benchmark")).path
    assert path is not None
    with opened(browser, path, accept_downloads=True) as page:
        yield page


def cells(page: Page, rows: str) -> list[list[str]]:
    """The texts of rows that are shown; a name without what stands below it."""
    read: list[list[str]] = page.evaluate(
        "(rows) => [...document.querySelectorAll(rows)].filter(r => r.checkVisibility())"
        ".map(r => [...r.cells].map(c => (c.querySelector('a, :scope > span:not(.after)') ?? c).textContent.trim()))",
        rows,
    )
    return read


def columns(page: Page, table: str) -> list[dict[str, str]]:
    """The rows of a table, by the titles of its columns."""
    titles = page.locator(f"[data-test={table}] thead th").all_text_contents()
    return [
        dict(zip((title.strip() for title in titles), row, strict=True))
        for row in cells(page, f"[data-test={table}] tbody tr")
    ]


def choose(page: Page, place: int) -> None:
    """Look at the model at this place."""
    from playwright.sync_api import expect

    part(page, "model-choice").select_option(str(place))
    expect(page.locator(f"#model-{place + 1}")).to_be_visible()


class TestPage:
    def test_the_table_shows_the_figures_of_all_models(self, page: Page, found: Benchmark) -> None:
        rows = columns(page, "models")
        assert [row["Model"] for row in rows] == [one.name for one in found.variants]
        for row, variant in zip(rows, found.variants, strict=True):
            assert variant.answers is not None
            assert variant.contents is not None
            assert variant.file_bytes is not None
            assert variant.peak_bytes is not None
            assert row["File"] == size(variant.file_bytes)
            assert row["Parameters"] == size(variant.parameter_bytes)
            assert row["Memory"] == size(variant.peak_bytes)
            assert_shows(row["Top-1"], variant.answers.top1 or 0, decimals=3)
            assert_shows(row["Integer ops"], variant.contents.integer_operations, digits=2)
            if variant.sqnr_db is not None:
                assert_shows(row["Output keeps"], variant.sqnr_db, decimals=1)
                assert_shows(row["Agreement"], variant.answers.agreement or 0, decimals=3)
        assert [row["Relative time"] for row in rows] == ["—", "0.44 (0.41 to 0.47)", "0.58 (0.55 to 0.61)", "n/a"]
        assert [row["Time"] for row in rows] == [
            *(tell_time(one.latencies[0].median) for one in found.variants[:3]),
            "not timed",
        ]

    def test_times_are_of_all_batches_and_threads(self, page: Page, found: Benchmark) -> None:
        rows = columns(page, "times")
        told = [(row["Model"], row["Call"], row["Median"], row["90 %"]) for row in rows]
        expected = [
            (
                one.name,
                f"batch {calls.batch}, {calls.threads} thread{'s' * (calls.threads > 1)}",
                tell_time(calls.median),
                tell_time(calls.p90),
            )
            for point in range(3)
            for one in found.variants[:3]
            for calls in [one.latencies[point]]
        ]
        assert told == expected
        assert "imitated.pt2" in part(page, "untimed").inner_text()

    def test_the_chart_shows_what_is_chosen_and_no_time_of_a_simulation(self, page: Page, found: Benchmark) -> None:
        from playwright.sync_api import expect

        marks = page.locator("[data-test=chart] .mark")
        expect(marks).to_have_text([one.name for one in found.variants[:3]])
        label = page.locator("[data-test=chart] .label").last
        expect(label).to_contain_text("batch 1, 1 thread")
        part(page, "point").select_option("2")
        expect(label).to_contain_text("batch 16, 2 threads")
        page.get_by_text("Top-1", exact=True).first.click()
        expect(marks).to_have_text([one.name for one in found.variants])
        expect(part(page, "point")).to_be_hidden()
        page.get_by_text("Output kept", exact=True).click()
        expect(marks).to_have_text([one.name for one in found.variants[1:]])
        page.get_by_text("Time of a call", exact=True).first.click()
        expect(marks).to_have_count(3)

    def test_one_model_is_looked_at(self, page: Page, found: Benchmark) -> None:
        from playwright.sync_api import expect

        details = part(page, "model-detail")
        expect(details.filter(visible=True)).to_have_attribute("aria-label", found.variants[1].name)
        page.locator("[data-test=models] a", has_text="imitated.pt2").click()
        expect(details.filter(visible=True)).to_have_attribute("aria-label", "imitated.pt2")
        expect(part(page, "model-choice")).to_have_value("3")
        page.keyboard.press("-")
        expect(details.filter(visible=True)).to_have_attribute("aria-label", found.variants[2].name)
        expect(page.locator("[data-test=models] tr.on")).to_contain_text(found.variants[2].name)
        # the last dot is that of the second of both
        page.locator("[data-test=chart] .dot").nth(1).click()
        expect(details.filter(visible=True)).to_have_attribute("aria-label", found.variants[1].name)
        choose(page, 1)

    def test_classes_layers_and_what_is_left_in_float_are_those_of_the_model(
        self, page: Page, found: Benchmark
    ) -> None:
        for place in (2, 1):
            choose(page, place)
            variant = found.variants[place]
            shown = cells(page, f"#model-{place + 1} [data-test=classes] tbody tr")
            by_name = {name: (before, right) for name, _, before, right in variant.per_class}
            changes = [by_name[row[0]][1] - by_name[row[0]][0] for row in shown]
            assert changes == sorted(changes)
            assert len(shown) == 10
            for row, change in zip(shown, changes, strict=True):
                assert_shows(row[3], by_name[row[0]][1] / 36, decimals=3)
                assert_shows(row[4], 100 * change / 36, decimals=1)
            layers = sorted(variant.layers, key=lambda layer: layer.sqnr_db)
            rows = cells(page, f"#model-{place + 1} [data-test=layers] tbody tr")
            assert [row[0] for row in rows] == [layer.name for layer in layers]
            for row, layer in zip(rows, layers, strict=True):
                assert_shows(row[2], layer.sqnr_db, decimals=1)
                assert row[3].endswith(f"(channel {int(np.argmin(layer.channels))})")
            dots = page.locator(f"#model-{place + 1} .chart .dot.open")
            assert dots.count() == len(layers)
            (left,) = cells(page, f"#model-{place + 1} [data-test=leftovers] tbody tr")
            assert left == ["SOFTMAX", "float", "1", "probabilities"]

    def test_samples_that_changed_are_filtered_by_model(self, page: Page, found: Benchmark) -> None:
        from playwright.sync_api import expect

        cards = page.locator("[data-test=cards] li")
        expect(cards.filter(visible=True)).to_have_count(len({one.index for one in found.changed}))
        assert all(
            text.startswith("data:image/png") for text in cards.locator("img").evaluate_all("i => i.map(x => x.src)")
        )
        part(page, "changed-by").select_option("1")
        expect(cards.filter(visible=True)).to_have_count(2)
        expect(part(page, "changed-count")).to_have_text("2 samples shown.")
        told = [
            re.findall(r"\d+", text)
            for text in cards.filter(visible=True).locator(".after:visible b").all_inner_texts()
        ]
        assert told == [[str(one.answer)] for one in found.changed if one.variant == 1]
        part(page, "changed-by").select_option("")
        expect(cards.filter(visible=True)).to_have_count(len({one.index for one in found.changed}))

    def test_tables_are_sorted(self, page: Page, found: Benchmark) -> None:
        from playwright.sync_api import expect

        head = page.locator("[data-test=models] th[data-key=time]")
        head.get_by_role("button").click()
        expect(head).to_have_attribute("aria-sort", "ascending")
        timed = sorted(found.variants[:3], key=lambda one: one.latencies[0].median)
        assert [row["Model"] for row in columns(page, "models")] == [*(one.name for one in timed), "imitated.pt2"]
        page.locator("[data-test=models] th.rank").get_by_role("button").click()
        assert [row["Model"] for row in columns(page, "models")] == [one.name for one in found.variants]

    def test_downloads_hold_the_figures(self, page: Page, found: Benchmark) -> None:
        def save(name: str) -> str:
            with page.expect_download() as download:
                part(page, name).click()
            return download.value.path().read_text(encoding="utf-8")

        table = list(csv.DictReader(io.StringIO(save("download-csv"))))
        assert [row["model"] for row in table].count(found.variants[0].name) == 3
        assert [(row["median_s"], row["simulated"]) for row in table][-1] == ("", "it imitates integers with floats")
        assert float(table[0]["median_s"]) == pytest.approx(found.variants[0].latencies[0].median, rel=1e-3)
        report = json.loads(save("download-json"))
        document = found.to_dict()
        assert report["verdict"]["text"] == document["verdict"]["text"]
        for told, one in zip(report["variants"], document["variants"], strict=True):
            assert told == {key: one[key] for key in told} | {"layers": told["layers"]}


def test_names_and_unknown_figures_do_no_harm(browser: Browser, tmp_path: Path) -> None:
    layers = [LayerError(EVIL, EVIL, EVIL, value, np.array([value, inf])) for value in (30.0, inf, nan, -3.0)]
    variants: list[Any] = [
        replace(
            make_variant(i, name=one, classes=AWKWARD_NAMES), engine=EVIL, notes=(EVIL,), layers=tuple(layers) * (i > 0)
        )
        for i, one in enumerate(AWKWARD_NAMES)
    ]
    variants[2] = replace(variants[2], sqnr_db=inf)
    variants[3] = replace(
        variants[3], sqnr_db=nan, file_bytes=None, no_memory=EVIL, simulated=EVIL, latencies=(), ratios=()
    )
    made = replace(make_benchmark(variants, classes=6, pictures=False), classes=AWKWARD_NAMES, notes=(EVIL,))
    path = made.write(tmp_path).path
    assert path is not None
    with opened(browser, path, viewport={"width": 400, "height": 800}) as page:
        rows = cells(page, "[data-test=models] tbody tr")
        assert [row[1] for row in rows] == [visible(name) for name in AWKWARD_NAMES]
        choose(page, 2)
        shown = cells(page, "#model-3 [data-test=layers] tbody tr")
        assert [row[2] for row in shown] == ["n/a", "−3.0 dB", "30.0 dB", "identical"]
        assert rows[2][-1] == "identical"
        assert rows[3][-1] == "n/a"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_many_models_layers_and_classes_are_shown(browser: Browser, tmp_path: Path) -> None:
    classes = tuple(f"class {i}" for i in range(1000))
    variants = [make_variant(i, classes=classes, layers=200) for i in range(12)]
    for place, one in enumerate(variants[1:], 1):
        lost = tuple((name, 5, 4, 4 - (i % 10 == place)) for i, name in enumerate(classes))
        variants[place] = replace(one, per_class=lost)
    path = make_benchmark(variants, classes=1000).write(tmp_path).path
    assert path is not None
    assert path.stat().st_size < 3_000_000
    with opened(browser, path) as page:
        assert len(cells(page, "[data-test=models] tbody tr")) == 12
        assert page.locator("[data-test=chart] .mark").all_text_contents() == [str(i + 1) for i in range(12)]
        choose(page, 5)
        assert len(cells(page, "#model-6 [data-test=layers] tbody tr")) == 200
        assert len(cells(page, "#model-6 [data-test=classes] tbody tr")) == 100
        assert "900 classes with as many right answers as before are left out." in page.inner_text("#model-6")


def test_the_page_reads_without_a_script(browser: Browser, found: Benchmark, tmp_path: Path) -> None:
    path = found.write(tmp_path).path
    assert path is not None
    with opened(browser, path, java_script_enabled=False) as page:
        said = part(page, "verdict").inner_text().replace("\u00a0", " ")
        assert said.startswith("Measured on 360 samples: of 3 models the smallest")
        assert [one.is_visible() for one in part(page, "model-detail").all()] == [True] * 3
        assert not part(page, "model-choice").is_visible()
        assert page.locator("[data-test=cards] li").first.is_visible()


def test_one_model_without_data_has_a_page(browser: Browser, tmp_path: Path) -> None:
    alone = make_benchmark([make_variant(0, data=False)], data=False, has_baseline=False)
    path = alone.write(tmp_path).path
    assert path is not None
    with opened(browser, path) as page:
        assert part(page, "chart").count() == 0
        assert part(page, "changed").count() == 0
        assert [row["Model"] for row in columns(page, "models")] == [alone.variants[0].name]
        assert "Measured on made-up inputs" in part(page, "methods").inner_text()
