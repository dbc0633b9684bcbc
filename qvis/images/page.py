"""The page of pictures: words, tables and small pictures that read without a script, and pixels for the scripts."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from functools import cache
from math import inf, isfinite, isnan
from typing import TYPE_CHECKING, Any

import numpy as np

from qvis.images.figures import Figures, Original
from qvis.images.layers import GRIDS, MODEL, MeasuredLayer, load_layers
from qvis.images.loading import LONGEST, Picture
from qvis.images.png import encode_png, filtered
from qvis.images.quantizing import Samples, depth_of, quantize
from qvis.images.settings import BITS, TILE, Settings, depths
from qvis.images.shrinking import shrink
from qvis.report.frame import read_widget, render_page
from qvis.words import count, size, visible

if TYPE_CHECKING:
    from qvis.images.report import ImageReport

STYLES = ("chart", "picture", "print")
SCRIPTS = (
    "chart",
    "picture_store",
    "picture_words",
    "picture_view",
    "picture_gallery",
    "picture_choice",
    "picture_start",
)
WORKER = ("picture_quantizing", "picture_figures", "picture_files", "picture_worker")
SMALL = 200
"""Sides in pixels of the small pictures that stand there without a script."""
FOUND = ("bits", "colours", "png_bytes", "ratio", "psnr", "ssim")
"""Figures that the page is told, so that it need not measure them anew; an infinite or undefined one is left out."""
COSTS = (8, 4, 2, 1)
"""Bits whose cost to the model is told."""


def render_image(report: ImageReport) -> str:
    """The page; the same bytes for the same pictures."""
    layers = load_layers()
    every = [(one, "picture", figures) for one, figures in zip(report.pictures, report.figures, strict=True)]
    for layer in layers:
        original, settings = Original(layer.picture.samples), Settings()
        at = depths(depth_of(layer.picture.samples))
        figures = [original.measure(quantize(layer.picture.samples, b, settings, layer.picture.tile), b) for b in at]
        every.append((layer.picture, "layer", [original.figures, *figures]))
    entries = [_entry(picture, kind, figures, report.settings) for picture, kind, figures in every]
    payload = {
        "settings": vars(report.settings),
        "bits": BITS,
        "tile": TILE,
        "longest": LONGEST,
        "pictures": [_light(entry) for entry in entries],
        "layers": [_costs(layer) for layer in layers],
    }
    pixels = b"".join(filtered(picture.samples).tobytes() for picture, _, _ in every)
    return render_page(
        "image.html.jinja",
        report.document,
        styles=STYLES,
        scripts=SCRIPTS,
        data={"payload": json.dumps(payload, ensure_ascii=False, allow_nan=False).encode(), "pixels": pixels},
        code={"worker": worker_script()},
        policy={"worker-src": "blob:"},
        pictures=entries,
        layers=layers,
        grids=GRIDS,
        costs=COSTS,
        model=MODEL,
        settings=report.settings,
        decibels=decibels,
    )


@cache
def worker_script() -> str:
    """What the page's worker runs; where there can be no worker, the page runs it itself."""
    parts = "\n".join(read_widget(f"{name}.js") for name in WORKER)
    return f'"use strict";\n(() => {{\n{parts}\n}})();\n'


# ---------------------------------------------------------------------------------------------- words


def tell(picture: Picture, figures: Sequence[Figures], settings: Settings) -> str:
    """What a picture keeps, in one sentence."""
    by_bits = {one.bits: one for one in figures[1:]}
    four, one = by_bits[4], by_bits[1]
    what = "a palette of 16 colours" if settings.levels == "palette" else "4 bits for each channel"
    if picture.samples.shape[2] == 1 or settings.channels == "luminance":
        what = "a palette of 16 greys" if settings.levels == "palette" else "4 bits for each pixel"
    name = f"“{visible(picture.name)}”"
    if four.psnr == inf:
        return f"With {what}, {name} loses nothing: it has only {count(four.colours, 'colour')}."
    least = "loses nothing" if one.psnr == inf else f"keeps {decibels(one.psnr)}"
    return (
        f"With {what}, {name} keeps {decibels(four.psnr)}, and its PNG is {times(four.ratio)} than its pixels;"
        f" with 1 bit it {least}."
    )


def tabulate(picture: Picture, figures: Sequence[Figures]) -> str:
    """What a picture keeps and takes at each depth, as a table of plain text."""
    titles = {"title": "", "colours": "colours", "bits_per_pixel": "bits/pixel", "bytes": "packed", "png_bytes": "PNG"}
    titles |= {"ratio": "smaller", "psnr": "PSNR", "ssim": "SSIM"}
    rows = [titles, *(_row(one, at == 0) for at, one in enumerate(figures))]
    widths = {key: max(len(row[key]) for row in rows) for key in titles}
    lines = ["  ".join(row[key].rjust(width) for key, width in widths.items()).rstrip() for row in rows]
    head = f"{visible(picture.name)}: {_about(picture.samples)}"
    return "\n".join([head, *(f"  {note}" for note in picture.notes), "", *lines])


def decibels(value: float) -> str:
    """``31.2 dB``, ``∞ dB``."""
    text = "∞" if value == inf else f"{value:.1f}"
    return f"{text.replace('-', '−')} dB"


def times(value: float) -> str:
    """``5.2 times smaller``"""
    if value < 1:
        return "larger"
    return f"{value:.1f} times smaller" if value < 100 else f"{value:,.0f} times smaller"


def find_verdict(report: ImageReport) -> dict[str, Any]:
    text = report.verdict
    details = [
        "A number of b bits is one of 2ᵇ levels, and which one is all that is kept: here of the light of a pixel,"
        " in a model of each weight.",
        "The code that rounds these pixels, qvis/quantization/grids.py, also rounds the weights of layers; the range of"
        " the picture is to its tiles what one range for a layer is to one for each of its channels.",
    ]
    return {"text": text, "sentence": [(text, "")], "details": details, "first": len(details)}


# ---------------------------------------------------------------------------------------------- pictures


def _entry(picture: Picture, kind: str, figures: Sequence[Figures], settings: Settings) -> dict[str, Any]:
    """What the template and the scripts are told of a picture."""
    height, width, channels = picture.samples.shape
    settings = Settings() if kind == "layer" else settings
    smaller = shrink(picture.samples, SMALL)
    pictures = {one.bits: quantize(smaller, one.bits, settings, picture.tile).samples for one in figures[1:]}
    name = f"{MODEL}: {picture.name}" if kind == "layer" else picture.name
    return {
        "name": visible(name),
        "kind": kind,
        "about": f"{count(width, 'channel')} of {height} weights" if kind == "layer" else _about(picture.samples),
        "width": width,
        "height": height,
        "channels": channels,
        "depth": depth_of(picture.samples),
        "tile": list(picture.tile),
        "given": list(picture.given),
        "notes": list(picture.notes),
        "figures": [_row(one, at == 0) for at, one in enumerate(figures)],
        "found": [{key: getattr(one, key) for key in FOUND if isfinite(getattr(one, key))} for one in figures],
        "small": [_image(smaller), *(_image(one) for one in pictures.values())],
        "is_small": smaller is not picture.samples,
    }


def _about(samples: Samples) -> str:
    height, width, channels = samples.shape
    return f"{width} × {height} pixels, {count(channels, 'channel')} of {depth_of(samples)} bits"


def _row(figures: Figures, original: bool) -> dict[str, Any]:
    """A row of the table, in words."""
    return {
        "bits": figures.bits,
        "title": "original" if original else f"{figures.bits} bit{'' if figures.bits == 1 else 's'}",
        "levels": f"{figures.levels:,}",
        "colours": f"{figures.colours:,}",
        "bits_per_pixel": f"{figures.bits_per_pixel:g}",
        "bytes": size(figures.bytes),
        "png_bytes": size(figures.png_bytes),
        "ratio": f"{figures.ratio:.1f}" if figures.ratio < 100 else f"{figures.ratio:,.0f}",
        "psnr": decibels(figures.psnr),
        "ssim": "n/a" if isnan(figures.ssim) else f"{figures.ssim:.4f}",
    }


def _image(samples: Samples) -> str:
    """As a PNG within the page, 8 bits for each channel, which is what screens show."""
    if samples.dtype != np.uint8:
        samples = np.rint(samples / 257).astype(np.uint8)
    return f"data:image/png;base64,{base64.b64encode(encode_png(samples)).decode('ascii')}"


def _light(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in ("figures", "small", "is_small", "about")}


def _costs(layer: MeasuredLayer) -> dict[str, Any]:
    def plain(cost: Any) -> list[Any]:
        return [cost.bits, round(cost.db, 2) if isfinite(cost.db) else None, cost.right]

    return {
        "name": layer.name,
        "ends": [round(end, 4) for end in layer.ends],
        "costs": {grid: [plain(cost) for cost in costs] for grid, costs in layer.costs.items()},
        "right_before": layer.right_before,
        "samples": layer.samples,
    }
