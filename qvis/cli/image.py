"""``qvis image``: a picture, bit by bit."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from qvis.cli.options import Open, OutDir
from qvis.cli.progress import Work

EXAMPLES = (
    "qvis image",
    "qvis image photo.jpg -o pictures --open",
    "qvis image a.png b.webp --levels palette --rounding dithered --save-images",
)


class Channels(str, Enum):
    """What is rounded; a test holds these and those below and :mod:`qvis.images.settings` together."""

    rgb = "rgb"
    luminance = "luminance"


class Levels(str, Enum):
    """Where the levels are."""

    uniform = "uniform"
    palette = "palette"


class Rounding(str, Enum):
    """How numbers go to levels."""

    nearest = "nearest"
    dithered = "dithered"


class Range(str, Enum):
    """What has a range of its own."""

    picture = "picture"
    channel = "channel"
    tile = "tile"


Pictures = Annotated[
    list[Path] | None,
    typer.Argument(metavar="PICTURE", help="PNG, JPEG, WebP, ...; a sample if left out.", show_default=False),
]


def image(
    pictures: Pictures = None,
    out: OutDir = Path("qvis-report"),
    channels: Annotated[Channels, typer.Option(help="Round red, green and blue, or brightness alone.")] = Channels.rgb,
    levels: Annotated[Levels, typer.Option(help="Even steps, or a palette of learned colours.")] = Levels.uniform,
    rounding: Annotated[Rounding, typer.Option(help="To the nearest level, or dithered.")] = Rounding.nearest,
    range_: Annotated[Range, typer.Option("--range", help="What has a range of its own.")] = Range.picture,
    longest: Annotated[int, typer.Option(min=16, max=4000, help="Resize to so many pixels on the longer side.")] = 1200,
    save_images: Annotated[
        bool, typer.Option("--save-images", help="Save the pictures at each depth as well.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON instead of the table.")] = False,
    open_page: Open = False,
) -> None:
    """Show a picture at 16, 8, 6, 4, 3, 2 and 1 bits.

    Writes a page that opens offline and takes further pictures, and prints the figures.
    """
    with Work() as work:
        work.say("Quantizing")
        from qvis.images.report import visualize_image_quantization

        report = visualize_image_quantization(
            list(pictures) if pictures else None,
            out,
            channels=channels.value,
            levels=levels.value,
            rounding=rounding.value,
            range=range_.value,
            longest=longest,
            save_images=save_images,
        )
    if as_json:
        print(report.to_json())
    else:
        print(report.to_text())
        print("", *report.paths.values(), sep="\n")
    if open_page:
        report.open()
