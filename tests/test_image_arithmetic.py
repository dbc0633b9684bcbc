"""The page quantizes pictures as Python does: for the same pixels and settings every pixel is the same."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page

from qvis.images.quantizing import Samples, depth_of, quantize
from qvis.images.settings import CHANNELS, RANGES, ROUNDING, Settings, depths
from qvis.report.frame import read_widget

pytestmark = pytest.mark.browser

RUN = """([picture, jobs]) => {
    const bytes = Uint8Array.from(atob(picture.samples), (c) => c.charCodeAt(0));
    picture.samples = picture.depth === 8 ? bytes : new Uint16Array(bytes.buffer);
    return jobs.map(([bits, settings]) => {
        const found = quantizing.quantize(picture, bits, settings);
        return {samples: Array.from(found.samples), bytes: found.bytes, bits: found.bitsPerPixel, values: found.values};
    });
}"""


def smooth(height: int, width: int, channels: int, dtype: str, noise: float = 0.03) -> Samples:
    random = np.random.default_rng(height * width + channels)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (3 + c) + c) * np.cos(y / (4 + c)) * 0.3 + 0.5 for c in range(channels)]
    values = np.stack(waves, axis=-1) + random.normal(size=(height, width, channels)) * noise
    top = np.iinfo(dtype).max
    return np.clip(np.rint(values * top), 0, top).astype(dtype)


def noise(height: int, width: int, dtype: str = "uint8") -> Samples:
    random = np.random.default_rng(5)
    return random.integers(0, np.iinfo(dtype).max, size=(height, width, 3), endpoint=True).astype(dtype)


PICTURES = {
    "odd sides": smooth(19, 23, 3, "uint8"),
    "grey": smooth(15, 21, 1, "uint8"),
    "more than a tile": smooth(35, 41, 3, "uint8"),
    "noise": noise(21, 17),
    "one pixel": np.array([[[12, 200, 77]]], dtype=np.uint8),
    "one column": smooth(19, 1, 3, "uint8"),
    "one row": smooth(1, 53, 3, "uint8"),
    "one colour": np.full((9, 7, 3), (3, 128, 255), dtype=np.uint8),
    "black": np.zeros((5, 5, 1), dtype=np.uint8),
    "two colours": np.where(np.indices((12, 13)).sum(0)[..., None] % 3 == 0, (255, 0, 9), (0, 77, 8)).astype(np.uint8),
    "16 bits": smooth(13, 18, 3, "uint16"),
    "grey of 16 bits": smooth(17, 19, 1, "uint16"),
    "noise of 16 bits": noise(17, 18, "uint16"),
}


@pytest.fixture(scope="module")
def arithmetic(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.evaluate(f"() => {{ {read_widget('picture_quantizing.js')}\n globalThis.quantizing = quantizing; }}")
    yield page
    context.close()


def in_browser(
    page: Page, samples: Samples, jobs: list[tuple[int, dict[str, str]]], tile: tuple[int, int]
) -> list[dict[str, Any]]:
    height, width, channels = samples.shape
    picture = {
        "width": width,
        "height": height,
        "channels": channels,
        "depth": depth_of(samples),
        "tile": list(tile),
        "samples": base64.b64encode(samples.tobytes()).decode(),
    }
    found: list[dict[str, Any]] = page.evaluate(RUN, [picture, jobs])
    return found


def every_mode() -> Iterator[dict[str, str]]:
    for channels, rounding, range_ in product(CHANNELS, ROUNDING, RANGES):
        yield {"channels": channels, "levels": "uniform", "rounding": rounding, "range": range_}
    for channels, rounding in product(CHANNELS, ROUNDING):
        yield {"channels": channels, "levels": "palette", "rounding": rounding, "range": "picture"}


@pytest.mark.parametrize("name", PICTURES)
def test_every_pixel_is_the_same_in_the_browser_at_all_depths_in_all_modes(arithmetic: Page, name: str) -> None:
    samples = PICTURES[name]
    tile = (32, 32) if name == "more than a tile" else (7, 5)
    jobs = [(b, mode) for mode in every_mode() for b in depths(depth_of(samples), mode["levels"])]
    for (bits, mode), found in zip(jobs, in_browser(arithmetic, samples, jobs, tile), strict=True):
        expected = quantize(samples, bits, Settings(**mode), tile)
        what = f"{name}: {bits} bits, {mode}"
        assert found["samples"] == expected.samples.ravel().tolist(), what
        assert found["bytes"] == expected.bytes, what
        assert found["bits"] == expected.bits_per_pixel, what
        assert found["values"] == list(expected.values), what


def test_a_larger_picture_is_the_same_with_a_full_palette(arithmetic: Page) -> None:
    samples = smooth(120, 161, 3, "uint8", noise=0.1)
    for rounding in ROUNDING:
        mode = {"channels": "rgb", "levels": "palette", "rounding": rounding, "range": "picture"}
        (found,) = in_browser(arithmetic, samples, [(8, mode)], (32, 32))
        expected = quantize(samples, 8, Settings(**mode)).samples
        assert len(np.unique(expected.reshape(-1, 3), axis=0)) > 200
        assert found["samples"] == expected.ravel().tolist()
