"""What shows a choice of bit widths: the document, Markdown, the exports, and the page."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from qvis.analysis.widths import BitWidths, interpolate, stored_bytes
from qvis.errors import BadArgumentError, OutputError
from qvis.layers import Skipped, decibels
from qvis.noise import WeightGrid
from qvis.report.bit_widths import LONGEST_TEXT, WidthsReport, summarize_widths
from qvis.report.bit_widths_text import terminal_lines
from qvis.words import size
from tests.browser import EVIL, FORMULA, LONG, TURNED, assert_shows, number, opened, part
from tests.widths import make_widths

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("stem", "body.0.conv", "body.1.conv", "head")


@pytest.fixture(scope="module")
def found() -> BitWidths:
    return make_widths(NAMES, skipped=(Skipped("tokens", "cannot be run on other weights"),))


@pytest.fixture(scope="module")
def document(found: BitWidths) -> dict[str, Any]:
    return WidthsReport(found).to_dict()


# ---------------------------------------------------------------------------------------------- document


def test_the_document_has_the_figures_of_the_records(found: BitWidths, document: dict[str, Any]) -> None:
    grids = [WeightGrid(one["bits"], one["granularity"]) for one in document["grids"]]
    for told, layer in zip(document["layers"], found.layers, strict=True):
        grid = found.chosen.grids[layer.name]
        assert (told["name"], told["op"], told["shape"]) == (layer.name, layer.op, list(layer.shape))
        assert (told["bits"], told["granularity"]) == (grid.bits, grid.granularity)
        assert told["weights"] == layer.channels * layer.elements
        assert told["bytes"] == layer.option(*grid).bytes
        assert told["damage_db"] == pytest.approx(decibels(1.0, layer.option(*grid).damage), rel=1e-3)
        for place, one in enumerate(grids):
            assert told["options"]["damage"][place] == pytest.approx(layer.option(*one).damage, rel=1e-3)
            assert told["options"]["bytes"][place] == stored_bytes(layer.channels, layer.elements, one)
    for told, mix in zip(
        [document["chosen"], *document["frontier"], *document["uniform"]],
        [found.chosen, *found.frontier, *found.uniform],
        strict=True,
    ):
        assert {name: grids[place] for name, place in zip(NAMES, told["grids"], strict=True)} == mix.grids
        assert told["bytes"] == mix.bytes
        assert told["predicted_db"] == pytest.approx(mix.predicted_db, rel=1e-3)
        assert told["measured_db"] == (None if mix.measured is None else pytest.approx(mix.measured_db, rel=1e-3))
    assert document["sizes"] == {
        "bytes": found.bytes,
        "rest_bytes": 400,
        "float_bytes": 4 * sum(layer.weights for layer in found.layers) + 400,
    }
    assert document["verified"]["gain_db"] == pytest.approx(found.verified.gain_db, rel=1e-3)
    assert document["verified"]["accuracy"] == {"share": 0.984, "error": 0.004}
    assert document["skipped"] == [{"name": "tokens", "reason": "cannot be run on other weights"}]


def test_the_verdict_is_that_of_the_records_after_its_evidence(found: BitWidths, document: dict[str, Any]) -> None:
    verdict = document["verdict"]
    assert verdict["text"] == f"Measured on 64 samples: a{found.verdict[1:]}"
    assert [text for text, style in verdict["sentence"] if style] == [f"{found.verified.sqnr_db:.1f} dB"]
    assert verdict["details"][0].startswith("Asked for: 5 bits on average. The model takes ")
    assert "Of 512 answers 98.4 % are right, 99.2 % in float and 97.7 % with one width" in verdict["details"][1]
    assert "+0.7 ± 0.4 points" in verdict["details"][1]


def test_what_is_not_known_is_null_and_not_told() -> None:
    alone = make_widths(["only"], bits=(4,), average=4, labels=False, network=False, looked_at=("channel",))
    fallback = replace(alone.chosen, grids={"only": WeightGrid(5, "channel")})  # a width that was not looked at
    document = WidthsReport(replace(alone, chosen=fallback)).to_dict()
    (layer,) = document["layers"]
    assert (layer["bits"], layer["damage_db"]) == (5, None)
    assert layer["options"]["damage"][document["chosen"]["grids"][0]] is None
    assert document["verified"]["accuracy"] is None
    assert document["exports"] == []
    assert not any("answers" in detail for detail in document["verdict"]["details"])
    assert "n/a" in WidthsReport(replace(alone, chosen=fallback)).to_markdown()


def test_exports_are_those_of_the_chosen_mix_and_long_ones_are_left_to_files(monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_widths(NAMES)
    exports = {entry["format"]: entry for entry in summarize_widths(one)["exports"]}
    assert set(exports) == {"aimet", "torchao", "onnxruntime"}
    encodings = json.loads(exports["aimet"]["text"])["param_encodings"]
    told = {name.removesuffix(".weight"): entries[0]["bitwidth"] for name, entries in encodings.items()}
    assert told == one.bits
    assert exports["onnxruntime"]["text"] == ""
    assert "run qvis on the .onnx file" in exports["onnxruntime"]["notes"][0]
    assert len(exports["aimet"]["text"]) < LONGEST_TEXT
    monkeypatch.setattr("qvis.report.bit_widths.LONGEST_TEXT", 100)
    short = {entry["format"]: entry for entry in summarize_widths(one)["exports"]}
    assert short["aimet"]["text"] == ""
    assert "qvis bits --export aimet=FILE writes them" in short["aimet"]["notes"][0]


def test_the_same_widths_make_the_same_bytes(found: BitWidths) -> None:
    first, second = WidthsReport(found), WidthsReport(found)
    assert first.to_json() == second.to_json()
    assert first.to_html() == second.to_html()


def test_reports_are_written_all_or_none_and_never_over_foreign_files(found: BitWidths, tmp_path: Path) -> None:
    report = found.write(tmp_path / "new", ("html", "json", "md"))
    assert report.path == tmp_path / "new" / "bit_widths.html"
    assert json.loads(report.paths["json"].read_text()) == report.to_dict()
    assert report.paths["md"].read_text() == report.to_markdown()
    assert "srcdoc" in report._repr_html_()
    found.write(tmp_path / "new")
    (tmp_path / "bit_widths.html").write_text("mine")
    with pytest.raises(OutputError, match="was not written by qvis and is left alone"):
        found.write(tmp_path, ("json", "html"))
    assert (tmp_path / "bit_widths.html").read_text() == "mine"
    assert not (tmp_path / "bit_widths.json").exists()
    with pytest.raises(BadArgumentError, match="formats: got 'pdf'"):
        found.write(tmp_path, ("pdf",))
    with pytest.raises(OutputError, match="is a file or lies below one"):
        found.write(tmp_path / "bit_widths.html")
    with pytest.raises(BadArgumentError, match="open: no page was written"):
        WidthsReport(found).open()


def test_widths_are_exported_to_files_that_qvis_may_replace(found: BitWidths, tmp_path: Path) -> None:
    for form in ("json", "csv", "aimet", "torchao"):
        path = tmp_path / f"{form}.txt"
        notes = found.export(path, form)
        text = path.read_text()
        assert (form == "torchao") == any("FqnToConfig" in note for note in notes)
        assert found.export(path, form) == notes
        assert path.read_text() == text
    for form, other in (("json", "csv"), ("aimet", "json"), ("torchao", "aimet")):
        with pytest.raises(OutputError, match=f"is not what qvis writes for {other}, and is left alone"):
            found.export(tmp_path / f"{form}.txt", other)
    # what AIMET itself writes is somebody's calibration
    (tmp_path / "calibrated").write_text(json.dumps({"version": "1.0.0", "param_encodings": []}, indent=4))
    with pytest.raises(OutputError, match="is not what qvis writes for aimet"):
        found.export(tmp_path / "calibrated", "aimet")
    with pytest.raises(OutputError, match="format: 'onnxruntime' cannot be told any of the layers; left out: stem"):
        found.export(tmp_path / "script.py", "onnxruntime")
    assert not (tmp_path / "script.py").exists()
    with pytest.raises(BadArgumentError, match="format: got 'gguf'"):
        found.export(tmp_path / "a", "gguf")
    with pytest.raises(OutputError, match=r"path: .* is a folder"):
        found.export(tmp_path)
    with pytest.raises(OutputError, match="lies in a folder that does not exist"):
        found.export(tmp_path / "no" / "a")
    with pytest.raises(BadArgumentError, match="export: the layers of the model are not at hand"):
        replace(found, network=None).export(tmp_path / "a")


# ---------------------------------------------------------------------------------------------- words


def test_markdown_has_each_layer_and_nothing_that_acts() -> None:
    names = [EVIL, "a|b", TURNED, *(f"layer{i}" for i in range(20))]
    text = WidthsReport(make_widths(names, corrected=("Others were tried:",))).to_markdown()
    assert text.startswith("<!-- qvis ")
    assert "</script" not in text
    assert "\u202e" not in text
    assert "| **the mix** |" in text
    assert "Others were tried:" in text
    assert "13 more layers" in text
    assert text.count("`layer") == 20


def test_the_terminal_names_the_most_damaging_of_many_layers() -> None:
    many = make_widths([f"layer{i}" for i in range(60)], granularities=("channel", 32))
    lines = list(terminal_lines(summarize_widths(many)))
    shown = [line.split()[0] for line in lines if re.match(r"layer\d", line)]
    assert len(shown) == 20
    assert "and 40 layers that do less damage; --all shows them" in lines
    damages = {layer.name: layer.option(*many.chosen.grids[layer.name]).damage for layer in many.layers}
    worst = sorted(damages, key=lambda name: -damages[name])[:20]
    assert set(shown) == set(worst)
    assert shown == [name for name in damages if name in worst]  # in the model's own order
    everything = list(terminal_lines(summarize_widths(many), all_rows=True))
    assert sum(bool(re.match(r"layer\d", line)) for line in everything) == 60


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (999.6, "1 kB"),
        (1234, "1.23 kB"),
        (5e6, "5 MB"),
        (2e12, "2,000 GB"),
    ],
)
def test_sizes_have_three_digits(given: float, words: str) -> None:
    assert size(given) == words


# ---------------------------------------------------------------------------------------------- page


@pytest.fixture(scope="module")
def page(browser: Browser, found: BitWidths, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    path = found.write(tmp_path_factory.mktemp("widths")).path
    assert path is not None
    with opened(browser, path, accept_downloads=True) as page:
        yield page


def rows(page: Page) -> list[list[str]]:
    cells: list[list[str]] = page.evaluate(
        "[...document.querySelectorAll('[data-test=layer-row]')].filter(r => r.checkVisibility())"
        ".map(r => [...r.cells].map(c => c.textContent.trim()))"
    )
    return cells


def back(page: Page) -> None:
    page.keyboard.press("c")
    from playwright.sync_api import expect

    expect(part(page, "mix-title")).to_have_text("The chosen mix")


@pytest.mark.browser
class TestPage:
    def test_the_rows_are_the_layers_with_their_chosen_widths(self, page: Page, found: BitWidths) -> None:
        shown = rows(page)
        assert [row[1] for row in shown] == list(NAMES)
        for row, layer in zip(shown, found.layers, strict=True):
            grid = found.chosen.grids[layer.name]
            assert row[2] == f"{layer.op} {' × '.join(map(str, layer.shape))}"
            assert [row[3], row[4], row[5]] == [
                f"{layer.weights:,}",
                str(grid.bits),
                f"{stored_bytes(layer.channels, layer.elements, grid):,}",
            ]
            assert_shows(row[6], decibels(1.0, layer.option(*grid).damage), decimals=1)
            for text, bits in zip(row[7:], (8, 6, 4, 3, 2), strict=True):
                assert_shows(text, decibels(1.0, layer.option(bits).damage), decimals=1)
        marked = page.locator("td.at.on").all_inner_texts()
        assert [number(text) for text in marked] == [number(row[6]) for row in shown]

    def test_another_mix_is_shown_everywhere(self, page: Page, found: BitWidths) -> None:
        from playwright.sync_api import expect

        mixes = sorted({one.bytes: one for one in (*found.frontier, found.chosen)}.values(), key=lambda one: one.bytes)
        at = [mix.bytes for mix in mixes].index(found.chosen.bytes)
        other = mixes[at - 2]
        part(page, "smaller").click()
        page.keyboard.press("-")
        expect(part(page, "mix-title")).to_have_text("Another mix")
        expect(part(page, "average")).to_have_text(f"{other.average_bits:.2f} bits")
        expect(part(page, "size")).to_have_text(size(other.bytes + 400))
        expect(page.locator("td.bits")).to_have_text([str(other.grids[name].bits) for name in NAMES])
        expect(page.locator(".strip li")).to_have_count(len(NAMES))
        heights = page.locator(".strip li").evaluate_all(
            "(bars) => bars.map(b => parseFloat(b.style.getPropertyValue('--h')))"
        )
        assert heights == pytest.approx([100 * other.grids[name].bits / 8 for name in NAMES])
        kept = other.predicted_db if other.measured is None else other.measured_db
        assert_shows(part(page, "kept").inner_text(), kept, decimals=1)
        sizes = np.array([float(mix.bytes) for mix in found.uniform])
        uniform = interpolate(other.bytes, sizes, np.array([mix.measured_db for mix in found.uniform]))
        assert_shows(part(page, "uniform").inner_text(), uniform, decimals=1)
        how = "predicted" if other.measured is None else "measured, ± 0.4"
        expect(page.locator("[data-figure=kept] small")).to_have_text(how)
        expect(page.locator("[data-figure=accuracy]")).to_contain_text("not counted for this mix")
        change = round(100 * abs((other.bytes + 400) / found.bytes - 1))
        expect(part(page, "change")).to_contain_text(f"{change}\u00a0% smaller than the chosen mix")
        part(page, "back").click()
        expect(part(page, "average")).to_have_text(f"{found.chosen.average_bits:.2f} bits")
        expect(page.locator("td.bits")).to_have_text([str(found.bits[name]) for name in NAMES])
        expect(part(page, "back")).to_be_hidden()

    def test_a_point_of_the_chart_shows_its_mix(self, page: Page, found: BitWidths) -> None:
        from playwright.sync_api import expect

        # of those that were tried, from the smallest on; the very first lies beneath one width for all layers
        page.locator("[data-test=frontier] .series .dot:not(.open)[r='4']").nth(1).click()
        tried = [mix for mix in found.frontier if mix.measured is not None and mix.bytes != found.chosen.bytes]
        second = sorted(tried, key=lambda mix: mix.bytes)[1]
        expect(part(page, "average")).to_have_text(f"{second.average_bits:.2f} bits")
        expect(page.locator("[data-figure=kept] small")).to_contain_text("measured")
        expect(part(page, "slider")).to_have_attribute("aria-valuetext", re.compile("measured"))
        back(page)
        for label in ("int8", "int4", "int2", "chosen"):
            assert label in page.locator("[data-test=frontier] .mark").all_text_contents()

    def test_the_slider_answers_to_the_keyboard(self, page: Page, found: BitWidths) -> None:
        from playwright.sync_api import expect

        part(page, "slider").focus()
        page.keyboard.press("Home")
        expect(part(page, "average")).to_have_text(f"{min(m.average_bits for m in found.frontier):.2f} bits")
        expect(part(page, "smaller")).to_be_disabled()
        page.keyboard.press("End")
        expect(part(page, "larger")).to_be_disabled()
        back(page)

    def test_damages_of_another_granularity(self, page: Page, found: BitWidths) -> None:
        from playwright.sync_api import expect

        page.get_by_text("per tensor", exact=True).click()
        expect(part(page, "columns-for")).to_have_text("per tensor")
        for row, layer in zip(rows(page), found.layers, strict=True):
            for text, bits in zip(row[7:], (8, 6, 4, 3, 2), strict=True):
                assert_shows(text, decibels(1.0, layer.option(bits, "tensor").damage), decimals=1)
        expect(page.locator("td.at.on")).to_have_count(0)
        expect(page.locator("td.at.near")).to_have_count(len(NAMES))
        page.locator("[data-test=granularity] label").first.click()
        expect(page.locator("td.at.on")).to_have_count(len(NAMES))

    def test_rows_are_sorted_and_filtered(self, page: Page, found: BitWidths) -> None:
        from playwright.sync_api import expect

        head = page.locator(".widths thead th").nth(3)
        head.get_by_role("button").click()
        expect(head).to_have_attribute("aria-sort", "descending")
        by_size = sorted(found.layers, key=lambda layer: -layer.weights)
        assert [row[1] for row in rows(page)] == [layer.name for layer in by_size]
        page.locator(".widths thead th").first.get_by_role("button").click()
        assert [row[1] for row in rows(page)] == list(NAMES)
        page.keyboard.press("/")
        page.keyboard.type("body")
        expect(part(page, "count")).to_have_text("2 of 4")
        assert [row[1] for row in rows(page)] == ["body.0.conv", "body.1.conv"]
        page.keyboard.type("nothing")
        expect(part(page, "empty")).to_be_visible()
        page.keyboard.press("Escape")
        expect(part(page, "count")).to_have_text("4 layers")

    def test_a_bar_leads_to_its_layer(self, page: Page) -> None:
        from playwright.sync_api import expect

        page.locator(".strip li").nth(2).click()
        expect(page.locator("tr.on td.name")).to_have_text("body.1.conv")

    def test_downloads_are_of_the_mix_that_is_shown(
        self, page: Page, found: BitWidths, document: dict[str, Any]
    ) -> None:
        def save(name: str) -> str:
            with page.expect_download() as download:
                part(page, name).click()
            return download.value.path().read_text(encoding="utf-8")

        part(page, "larger").click()
        mixes = sorted({one.bytes: one for one in (*found.frontier, found.chosen)}.values(), key=lambda one: one.bytes)
        other = mixes[[mix.bytes for mix in mixes].index(found.chosen.bytes) + 1]
        table = list(csv.DictReader(io.StringIO(save("save-widths-csv"))))
        assert {row["layer"]: int(row["bits"]) for row in table} == {n: g.bits for n, g in other.grids.items()}
        assert sum(int(row["bytes"]) for row in table) == other.bytes
        told = json.loads(save("save-widths-json"))
        assert {one["name"]: (one["bits"], one["granularity"]) for one in told["layers"]} == {
            name: (grid.bits, grid.granularity) for name, grid in other.grids.items()
        }
        back(page)
        report = json.loads(save("download-json"))
        assert report == {key: value for key, value in document.items() if key in report}
        assert {"layers", "frontier", "chosen", "verdict"} <= set(report)
        part(page, "export-torchao").locator("summary").click()
        with page.expect_download() as download:
            part(page, "export-torchao").get_by_text("Save widths_torchao.py").click()
        assert download.value.suggested_filename == "widths_torchao.py"
        (torchao,) = (one for one in document["exports"] if one["format"] == "torchao")
        assert download.value.path().read_text() == torchao["text"]

    def test_what_was_left_out_is_named(self, page: Page) -> None:
        assert part(page, "left-out").inner_text().split("\n")[-2:] == ["tokens", "cannot be run on other weights"]
        assert "run qvis on the .onnx file" in (part(page, "export-onnxruntime").text_content() or "")


@pytest.mark.browser
def test_names_do_no_harm(browser: Browser, tmp_path: Path) -> None:
    awkward = make_widths([EVIL, TURNED, FORMULA, LONG], skipped=(Skipped(EVIL, EVIL),), corrected=(EVIL,))
    path = replace(awkward, name=EVIL).write(tmp_path).path
    assert path is not None
    with opened(browser, path, viewport={"width": 400, "height": 800}) as page:
        names = [row[1] for row in rows(page)]
        assert names == [EVIL, "\\u202egpj_vnoc\\x07", FORMULA, LONG]
        part(page, "smaller").click()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.browser
def test_the_page_reads_without_a_script(browser: Browser, found: BitWidths, tmp_path: Path) -> None:
    path = found.write(tmp_path).path
    assert path is not None
    with opened(browser, path, java_script_enabled=False) as page:
        assert len(page.locator("[data-test=layer-row]").all()) == len(NAMES)
        assert part(page, "kept").inner_text() == f"{found.verified.sqnr_db:.1f} dB"
        assert not part(page, "what-if").is_visible()
        assert part(page, "strip").is_visible()


@pytest.mark.browser
@pytest.mark.parametrize("layers", [1, 400])
def test_few_and_many_layers_are_shown(browser: Browser, tmp_path: Path, layers: int) -> None:
    one = {"bits": (4,), "average": 4, "labels": False, "network": False, "looked_at": ("channel",)}
    many = {"granularities": ("channel", 32), "looked_at": ("channel", "tensor", 128, 64, 32)}
    made = make_widths([f"layer{i}" for i in range(layers)], **(one if layers == 1 else many))  # type: ignore[arg-type]
    path = made.write(tmp_path).path
    assert path is not None
    from playwright.sync_api import expect

    with opened(browser, path, viewport={"width": 1000, "height": 800}) as page:
        expect(page.locator(".strip li")).to_have_count(layers)
        if layers == 1:
            expect(part(page, "what-if")).to_be_hidden()
            expect(part(page, "granularity")).to_have_count(0)
            expect(page.locator("[data-figure=uniform] small")).to_have_text("the mix keeps as much")
        else:
            part(page, "larger").click()
            expect(part(page, "mix-title")).to_have_text("Another mix")
            grids = [made.chosen.grids[f"layer{i}"] for i in range(layers)]
            back(page)
            texts = [f"{g.bits} {'per channel' if g.granularity == 'channel' else 'groups of 32'}" for g in grids]
            expect(page.locator("td.bits")).to_have_text(texts)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
