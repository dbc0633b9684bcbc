"""The page of pictures: by mouse, keyboard and ear; what is uploaded to it; and what it must not do."""

from __future__ import annotations

import base64
import io
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from qvis.images.figures import Original
from qvis.images.loading import load_pictures
from qvis.images.png import encode_png
from qvis.images.quantizing import Samples, quantize
from qvis.images.report import ImageReport, visualize_image_quantization
from qvis.images.settings import CHANNELS, RANGES, ROUNDING, Settings
from tests.browser import opened, part
from tests.test_images import photo

pytestmark = pytest.mark.browser

NAME = "<b>it's</b> \u202e.png"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ImageReport:
    pictures = [photo(46, 61), photo(40, 33, 1, "uint16")]
    return visualize_image_quantization(pictures, tmp_path_factory.mktemp("image"), name=[NAME, "deep"])


@contextmanager
def shown(browser: Browser, report: ImageReport, **options: Any) -> Iterator[Page]:
    assert report.path is not None
    with opened(browser, report.path, **options) as page:
        if options.get("java_script_enabled", True):
            settled(page)
        yield page


def settled(page: Page) -> None:
    """Until all depths are drawn and measured."""
    page.wait_for_selector("html[data-measured]", state="attached")


def choose(page: Page, name: str, value: str) -> None:
    page.locator(f"input[name='{name}'][value='{value}'] + span").click()
    settled(page)


def pixels_of(page: Page, bits: int | str, index: int = 0) -> list[int]:
    """What the small picture of a depth really holds: red, green and blue of each pixel."""
    found: list[int] = page.evaluate(
        """([index, bits]) => {
            const canvas = document.querySelector(`.picture[data-i="${index}"] [data-bits="${bits}"] canvas`);
            const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return Array.from(data).filter((_, i) => i % 4 < 3);
        }""",
        [index, str(bits)],
    )
    return found


def as_shown(samples: Samples) -> list[int]:
    colours = samples if samples.dtype == np.uint8 else np.rint(samples / 257).astype(np.uint8)
    return np.broadcast_to(colours, (*colours.shape[:2], 3)).ravel().tolist()


def upload(page: Page, name: str, content: bytes, kind: str = "image/png") -> None:
    before = int(page.evaluate("document.documentElement.dataset.opened || 0"))
    part(page, "file").set_input_files({"name": name, "mimeType": kind, "buffer": content})
    page.wait_for_selector(f"html[data-opened='{before + 1}']", state="attached")


def row(page: Page, bits: int | str, index: int = 0) -> dict[str, str]:
    cells = page.locator(f".picture[data-i='{index}'] tbody tr[data-bits='{bits}'] td")
    found: dict[str, str] = cells.evaluate_all(
        "all => Object.fromEntries(all.map(td => [td.dataset.of, td.textContent]))"
    )
    return found


# ---------------------------------------------------------------------------------------------- opening


def test_the_page_opens_in_silence_under_its_policy_and_asks_for_nothing(browser: Browser, report: ImageReport) -> None:
    with shown(browser, report) as page:
        requests = [url for url in page.watch.requests if not url.startswith("blob:")]
        assert requests == [report.path.as_uri()]
        assert len(page.workers) == 1
        policy = page.locator("meta[http-equiv]").get_attribute("content")
        assert policy.startswith("default-src 'none'")
        assert "worker-src blob:" in policy
        assert "unsafe-eval" not in policy
        assert not page.evaluate("fetch('https://example.com/').then(() => true, () => false)")
        page.watch.messages.clear()
        page.watch.requests.clear()


def test_names_stay_text(browser: Browser, report: ImageReport) -> None:
    with shown(browser, report) as page:
        expect(part(page, "verdict")).to_have_text(report.verdict)
        assert page.locator("main b").filter(has_text="it's").count() == 0
        expect(page.locator(".picture h2").first).to_contain_text("<b>it's</b> \\u202e.png")


def test_the_page_reads_without_a_script(browser: Browser, report: ImageReport) -> None:
    with shown(browser, report, java_script_enabled=False) as page:
        assert part(page, "picture").count() == 4
        assert page.locator(".picture").first.locator("img").count() == 7
        expect(page.locator(".picture").nth(1).locator("tbody tr")).to_have_count(8)
        expect(part(page, "costs").first).to_contain_text("dB, 127 read")
        for hidden in ("viewer", "drop", "channels"):
            expect(part(page, hidden)).to_be_hidden()


def test_the_table_is_what_python_measured_and_the_page_measures_the_same(
    browser: Browser, report: ImageReport
) -> None:
    with shown(browser, report) as page:
        before = {bits: row(page, bits) for bits in ("original", 8, 4, 1)}
        assert before[4]["psnr"] == f"{report.figures[0][3].psnr:.1f} dB"
        choose(page, "rounding", "dithered")
        picture = report.pictures[0]
        expected = Original(picture.samples).measure(quantize(picture.samples, 4, Settings(rounding="dithered")), 4)
        found = row(page, 4)
        assert found["psnr"] == f"{expected.psnr:.1f} dB"
        assert float(found["ssim"]) == pytest.approx(expected.ssim, abs=1e-4)
        assert found["colours"] == f"{expected.colours:,}"
        choose(page, "rounding", "nearest")
        after = {bits: row(page, bits) for bits in ("original", 8, 4, 1)}
        for bits, figures in before.items():  # the browser's own zlib may count other bytes
            for name in figures.keys() - {"png_bytes", "ratio"}:
                assert after[bits][name] == figures[name]
            assert float(after[bits]["ratio"]) == pytest.approx(float(figures["ratio"]), rel=0.1, abs=0.2)


@pytest.mark.parametrize("index", [0, 1])
def test_each_depth_in_each_mode_shows_the_pixels_that_python_finds(
    browser: Browser, report: ImageReport, index: int
) -> None:
    picture = report.pictures[index]
    modes: list[dict[str, str]] = [
        {"channels": c, "levels": "uniform", "rounding": r, "range": g}
        for c, r, g in product(CHANNELS, ROUNDING, RANGES)
    ]
    modes += [{"channels": c, "levels": "palette", "rounding": r} for c, r in product(CHANNELS, ROUNDING)]
    with shown(browser, report) as page:
        choose(page, "picture", str(index))
        assert pixels_of(page, "original", index) == as_shown(picture.samples)
        for mode in modes:
            if index and ("luminance" in mode.values() or mode.get("range") == "channel"):
                continue  # they say nothing about a grey picture, and are not offered
            for name, value in mode.items():
                if not (index and name == "channels"):
                    choose(page, name, value)
            for bits in (3, 1):
                expected = quantize(picture.samples, bits, Settings(**mode), picture.tile).samples
                assert pixels_of(page, bits, index) == as_shown(expected), (bits, mode)
            if mode["levels"] == "palette":
                choose(page, "levels", "uniform")


# ---------------------------------------------------------------------------------------------- keys, mouse, ears


def test_every_control_has_a_name_and_the_sliders_say_what_they_are_at(browser: Browser, report: ImageReport) -> None:
    with shown(browser, report) as page:
        bits = page.get_by_role("slider", name=re.compile("Bits"))
        expect(bits).to_have_attribute("aria-valuetext", "4 bits")
        bits.focus()
        page.keyboard.press("ArrowRight")
        expect(bits).to_have_attribute("aria-valuetext", "6 bits")
        expect(part(page, "chip")).to_have_text("6 bits")
        expect(page.locator("[data-bits='6'] [aria-pressed=true]")).to_have_count(1)
        split = page.get_by_role("slider", name=re.compile("Split"))
        split.focus()
        page.keyboard.press("Home")
        expect(split).to_have_attribute("aria-valuetext", "original left of 0 %")
        canvas = part(page, "canvas")
        expect(canvas).to_have_attribute("aria-label", re.compile("the original left of the line, 6 bits right of it"))
        unnamed = page.evaluate(
            "[...document.querySelectorAll('button, input, canvas, [role=img]')].filter(e => e.checkVisibility() && "
            "!(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.[0]?.textContent.trim()))"
            ".map(e => e.outerHTML)"
        )
        assert unnamed == []
        assert page.locator("fieldset > legend").count() == 5


def test_keys_change_bits_zoom_and_what_is_shown(browser: Browser, report: ImageReport) -> None:
    with shown(browser, report) as page:
        page.keyboard.press("[")
        expect(part(page, "bits-said")).to_have_text("3 bits")
        page.keyboard.press("]")
        page.keyboard.press("]")
        expect(part(page, "bits-said")).to_have_text("6 bits")
        page.keyboard.press("e")
        expect(part(page, "chip")).to_have_text("error of 6 bits")
        expect(part(page, "error-said")).to_contain_text("the brightest is off by")
        expect(part(page, "zoom-said")).to_contain_text("fits")
        page.keyboard.press("+")
        expect(part(page, "zoom-said")).not_to_contain_text("fits")
        expect(part(page, "stage")).to_have_class(re.compile("zoomed"))
        page.keyboard.press("0")
        expect(part(page, "zoom-said")).to_contain_text("fits")


def test_the_line_follows_the_pointer_and_a_zoomed_picture_is_moved(browser: Browser, report: ImageReport) -> None:
    with shown(browser, report) as page:
        box = part(page, "stage").bounding_box()
        middle = box["y"] + box["height"] / 3
        page.mouse.move(box["x"] + box["width"] / 2, middle)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.8, middle, steps=4)
        page.mouse.up()
        expect(part(page, "split-said")).not_to_have_text("50 %")
        said = part(page, "split-said").inner_text()
        part(page, "pixels").click()
        part(page, "zoom-in").click()
        before = base64.b64encode(part(page, "stage").screenshot())
        page.mouse.move(box["x"] + 60, middle)
        page.mouse.down()
        page.mouse.move(box["x"] + 200, middle + 40, steps=4)
        page.mouse.up()
        expect(part(page, "split-said")).to_have_text(said)
        assert base64.b64encode(part(page, "stage").screenshot()) != before


def test_a_card_shows_its_depth(browser: Browser, report: ImageReport) -> None:
    with shown(browser, report) as page:
        page.locator(".picture.on [data-bits='2'] [data-test=card]").click()
        expect(part(page, "bits-said")).to_have_text("2 bits")
        expect(part(page, "facts-title")).to_have_text("2 bits for each channel")
        expect(part(page, "facts")).to_contain_text(f"{report.figures[0][5].psnr:.1f} dB")
        page.locator(".picture.on [data-bits=original] [data-test=card]").click()
        expect(part(page, "split-said")).to_have_text("100 %")


def test_all_pictures_make_one_gallery_that_follows_the_settings(browser: Browser, report: ImageReport) -> None:
    with shown(browser, report) as page:
        assert page.locator(".picture:visible").count() == 2
        choose(page, "rounding", "dithered")
        page.wait_for_selector("html[data-all*=dithered]", state="attached")
        samples = report.pictures[1].samples
        expected = Original(samples).measure(quantize(samples, 3, Settings(rounding="dithered")), 3)
        assert row(page, 3, 1)["psnr"] == f"{expected.psnr:.1f} dB"
        page.locator(".picture[data-i='1'] [data-bits='3'] [data-test=card]").click()
        page.wait_for_selector("html[data-measured^='1 ']", state="attached")
        expect(part(page, "bits-said")).to_have_text("3 bits")
        assert pixels_of(page, 3, 1) == as_shown(quantize(samples, 3, Settings(rounding="dithered")).samples)
        assert page.locator("[aria-pressed=true]").count() == 1


def test_the_histogram_shows_the_levels_of_the_grid(browser: Browser, report: ImageReport) -> None:
    with shown(browser, report) as page:
        for bits, levels in ((4, 16), (3, 8), (1, 2)):
            page.locator(f".picture.on [data-bits='{bits}'] [data-test=card]").click()
            expect(part(page, "histogram").locator(".rule")).to_have_count(levels)
        choose(page, "range", "tile")
        expect(part(page, "histogram").locator(".rule")).to_have_count(0)
        expect(part(page, "histogram-said")).to_contain_text("Each tile has levels of its own")


def test_a_layer_of_the_model_is_shown_likewise_with_what_its_bits_cost(browser: Browser, report: ImageReport) -> None:
    with shown(browser, report) as page:
        part(page, "show-layer").nth(1).click()
        page.wait_for_selector("html[data-measured^='3 ']", state="attached")
        said = part(page, "cost")
        expect(said).to_contain_text("this layer with 4 bits and one range for the layer keeps −1.6 dB")
        expect(said).to_contain_text("29 of 128 digits are read right, 127 with all weights as they are")
        choose(page, "range", "tile")
        expect(said).to_contain_text("a range for each channel keeps 36.4 dB")
        expect(part(page, "facts-title")).to_have_text("4 bits for each weight")
        choose(page, "levels", "palette")
        expect(said).to_contain_text("a learned codebook keeps")
        expect(part(page, "channels").locator("input").first).to_be_disabled()


def test_downloads_hold_what_is_shown(browser: Browser, report: ImageReport) -> None:
    with shown(browser, report) as page:
        with page.expect_download() as download:
            part(page, "download-csv").click()
        lines = Path(download.value.path()).read_text(encoding="utf-8").splitlines()
        assert len(lines) == 8
        assert "psnr" in lines[0]
        with page.expect_download() as download:
            part(page, "download-png").click()
        content = Path(download.value.path()).read_bytes()
        expected = quantize(report.pictures[0].samples, 4).samples
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")), expected)


# ---------------------------------------------------------------------------------------------- uploads


def test_an_uploaded_picture_is_quantized_as_python_does(browser: Browser, report: ImageReport) -> None:
    samples = photo(50, 70)
    with shown(browser, report) as page:
        upload(page, "new.png", encode_png(samples))
        page.wait_for_selector("html[data-measured^='4 ']", state="attached")
        sentence = ImageReport(load_pictures(samples, names="new.png")).verdict
        expect(part(page, "verdict")).to_contain_text(sentence.split(", and its PNG")[0])
        expect(part(page, "verdict")).to_contain_text(sentence.split("; ")[1])
        expect(part(page, "name")).to_have_text("new.png")
        assert pixels_of(page, "original", 4) == as_shown(samples)
        for bits in (6, 3, 1):
            assert pixels_of(page, bits, 4) == as_shown(quantize(samples, bits).samples)
        expect(page.locator(".picture.on h2")).to_contain_text("new.png 70 × 50 pixels, 3 channels of 8 bits")
        assert page.locator("[name=picture][value='4']").is_checked()
        expected = Original(samples).measure(quantize(samples, 3), 3)
        assert row(page, 3, 4)["psnr"] == f"{expected.psnr:.1f} dB"
        assert page.watch.foreign_requests == []


def test_a_dropped_picture_is_taken(browser: Browser, report: ImageReport) -> None:
    with shown(browser, report) as page:
        page.evaluate(
            """(content) => {
                const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0)), transfer = new DataTransfer();
                transfer.items.add(new File([bytes], "dropped.png", {type: "image/png"}));
                const options = {dataTransfer: transfer, bubbles: true, cancelable: true};
                for (const kind of ["dragover", "drop"]) document.body.dispatchEvent(new DragEvent(kind, options));
            }""",
            base64.b64encode(encode_png(photo(30, 30, 1))).decode(),
        )
        page.wait_for_selector("html[data-measured^='4 ']", state="attached")
        expect(page.locator(".picture.on h2")).to_contain_text("dropped.png 30 × 30 pixels, 1 channel of 8 bits")


def jpeg(image: Image.Image, **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, "JPEG", **options)
    return target.getvalue()


def test_uploads_are_turned_laid_on_white_and_resized_and_that_is_said(browser: Browser, report: ImageReport) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = np.zeros((20, 20, 4), dtype=np.uint8)
    clear[:10] = (200, 10, 30, 255)
    target = io.BytesIO()
    Image.fromarray(clear).save(target, "WEBP", lossless=True)
    frames = [Image.fromarray(np.full((16, 16), shade, dtype=np.uint8)) for shade in (10, 200)]
    moving = io.BytesIO()
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:], loop=0)
    with shown(browser, report) as page:
        upload(page, "turned.jpg", jpeg(Image.fromarray(photo(20, 30)), exif=exif), "image/jpeg")
        upload(page, "clear.webp", target.getvalue(), "image/webp")
        upload(page, "large.png", encode_png(np.zeros((1500, 2400, 1), dtype=np.uint8)))
        upload(page, "deep.png", encode_png(photo(30, 30, 3, "uint16")))
        upload(page, "moving.gif", moving.getvalue(), "image/gif")
        page.wait_for_selector("html[data-measured^='8 ']", state="attached")
        notes = [page.locator(f".picture[data-i='{i}'] [data-test=notes]").text_content() for i in range(4, 9)]
        assert notes[0] == "Turned as its EXIF data say."
        assert page.locator(".picture[data-i='4'] h2").text_content().endswith("20 × 30 pixels, 3 channels of 8 bits")
        assert notes[1] == "Laid on white where it is transparent."
        assert notes[2] == "Resized from 2,400 × 1,500 to 1,200 × 750 for the page."
        assert notes[3] == "Read with 8 of its 16 bits, as browsers do; qvis image reads all of them."
        assert notes[4] == "The first of its frames."
        choose(page, "picture", "5")
        assert pixels_of(page, "original", 5) == [200, 10, 30] * 200 + [255, 255, 255] * 200


def bomb(side: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


SVG = b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'><script>alert(1)</script></svg>"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.png", b"these are words, and no picture", "is not a picture that can be opened"),
        ("empty.png", b"", "is empty (0 bytes)"),
        ("cut.jpg", jpeg(Image.fromarray(photo(200, 300)))[:3000], "is cut short: its end is missing"),
        ("head.jpg", jpeg(Image.fromarray(photo(200, 300)))[:100], "is damaged or cut short"),
        ("cut.png", encode_png(photo(100, 100))[:1500], "is cut short: its end is missing"),
        ("wrong.png", bomb(50), "is damaged: the browser cannot decode it"),
        ("bomb.png", bomb(40_000), "says it has 40,000 × 40,000 pixels, too many to be decoded"),
        ("drawing.svg", SVG, "is an SVG: a drawing that has no pixels and may hold scripts"),
        ("drawing.png", SVG, "is an SVG"),
        ("<img src=x onerror=alert(1)>.png", b"x" * 40, "“<img src=x onerror=alert(1)>.png” is not a picture"),
    ],
)
def test_what_is_no_picture_is_refused_with_a_message(
    browser: Browser, report: ImageReport, name: str, content: bytes, message: str
) -> None:
    with shown(browser, report) as page:
        upload(page, name, content, "image/svg+xml" if name.endswith("svg") else "image/png")
        expect(part(page, "message")).to_contain_text(message)
        expect(part(page, "message")).to_have_attribute("role", "alert")
        assert page.locator(".picture").count() == 4
        assert page.locator("[name=picture]:checked").input_value() == "0"
        upload(page, "good.png", encode_png(photo()))
        expect(part(page, "message")).to_be_hidden()
        expect(page.locator(".picture.on h2")).to_contain_text("good.png")


def test_the_page_answers_while_a_photo_of_12_megapixels_is_opened(browser: Browser, report: ImageReport) -> None:
    large = np.kron(photo(30, 40), np.ones((100, 100, 1), dtype=np.uint8))
    with shown(browser, report) as page:
        upload(page, "photo.jpg", jpeg(Image.fromarray(large), quality=80), "image/jpeg")
        page.wait_for_selector("html[data-shown^='4 ']", state="attached")
        assert (
            page.locator(".picture[data-i='4'] [data-test=notes]")
            .text_content()
            .startswith("Resized from 4,000 × 3,000")
        )
        page.keyboard.press("[")
        expect(part(page, "bits-said")).to_have_text("3 bits")


def test_where_no_worker_can_be_made_the_page_computes_by_itself(browser: Browser, report: ImageReport) -> None:
    with shown(browser, report) as page:
        context = page.context
        other = context.new_page()
        other.add_init_script("window.Worker = class { constructor() { throw new Error('none'); } };")
        other.goto(report.path.as_uri())
        settled(other)
        assert pixels_of(other, 2) == as_shown(quantize(report.pictures[0].samples, 2).samples)


@pytest.mark.parametrize("width", [360, 1600])
def test_nothing_is_wider_than_the_window(browser: Browser, report: ImageReport, width: int) -> None:
    with shown(browser, report, viewport={"width": width, "height": 900}) as page:
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
