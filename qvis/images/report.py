"""What ``qvis image`` returns: pictures in a few bits, their figures, and the page that shows them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any

from qvis.errors import BadArgumentError
from qvis.images.figures import Figures, Original
from qvis.images.loading import LONGEST, Picture, load_pictures
from qvis.images.png import MARK, encode_png
from qvis.images.quantizing import Samples, depth_of, quantize
from qvis.images.sample import NAME as SAMPLE
from qvis.images.sample import draw_sample
from qvis.images.settings import Settings, depths
from qvis.report.files import MARKS, make_folder, refuse_foreign, write_all
from qvis.report.report import Page
from qvis.version import __version__

KIND = "image_quantization"
TITLE = "Quantization of pictures"


class ImageReport(Page):
    """Pictures at every depth.

    Attributes
    ----------
    path
        The HTML page; ``None`` as long as nothing is written.
    paths
        Every file written: ``html``, and with ``save_images`` a PNG for each picture and depth, by its name.
    pictures
        The pictures as they are shown, each with ``name``, ``samples``, ``given`` and ``notes``.
    settings
        How they are quantized when the page opens.
    """

    def __init__(self, pictures: Sequence[Picture], settings: Settings | None = None) -> None:
        super().__init__()
        self.pictures = list(pictures)
        self.settings = settings or Settings()

    @cached_property
    def figures(self) -> list[list[Figures]]:
        """Of each picture: the figures of the original, and then at each depth, most bits first."""
        found = []
        for picture in self.pictures:
            original = Original(picture.samples)
            at = [
                original.measure(quantize(picture.samples, b, self.settings, picture.tile), b)
                for b in self.bits(picture)
            ]
            found.append([original.figures, *at])
        return found

    def bits(self, picture: Picture) -> tuple[int, ...]:
        """The depths that a picture is shown at."""
        return depths(depth_of(picture.samples), self.settings.levels)

    def quantized(self, index: int = 0) -> Iterator[tuple[int, Samples]]:
        """Each depth of a picture with its pixels, (height, width, channels)."""
        picture = self.pictures[index]
        for bits in self.bits(picture):
            yield bits, quantize(picture.samples, bits, self.settings, picture.tile).samples

    @property
    def verdict(self) -> str:
        """What the first picture keeps, in one sentence."""
        from qvis.images.page import tell

        return tell(self.pictures[0], self.figures[0], self.settings)

    @cached_property
    def document(self) -> dict[str, Any]:
        """What a page, or an index of pages, says of this report: kind, title and verdict."""
        from qvis.images.page import find_verdict

        return {"qvis": __version__, "kind": KIND, "title": TITLE, "verdict": find_verdict(self)}

    def to_dict(self) -> dict[str, Any]:
        """Settings and figures as plain dicts, lists, strings and numbers; infinite and undefined ones are None."""
        return {
            "qvis": __version__,
            "kind": KIND,
            "settings": vars(self.settings),
            "pictures": [
                {
                    "name": picture.name,
                    "width": picture.samples.shape[1],
                    "height": picture.samples.shape[0],
                    "channels": picture.samples.shape[2],
                    "depth": depth_of(picture.samples),
                    "given": list(picture.given),
                    "notes": list(picture.notes),
                    "original": _plain(figures[0]),
                    "quantized": [_plain(one) for one in figures[1:]],
                }
                for picture, figures in zip(self.pictures, self.figures, strict=True)
            ],
        }

    def to_json(self, *, indent: int | None = None) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False)

    def to_text(self) -> str:
        """The figures of each picture as a table of plain text."""
        from qvis.images.page import tabulate

        return "\n\n".join(tabulate(*one) for one in zip(self.pictures, self.figures, strict=True))

    def to_html(self) -> str:
        """The page."""
        from qvis.images.page import render_image

        return render_image(self)

    def write(self, out_dir: str | PathLike[str], *, save_images: bool = False) -> ImageReport:
        """Write ``image_quantization.html`` into ``out_dir`` (made when missing) and return this report.

        Parameters
        ----------
        out_dir
            The folder.
        save_images
            Write each picture at each depth as a PNG as well, in the size that the page shows.

        Raises
        ------
        OutputError
            The folder cannot be written, or holds a file of the same name that qvis did not write.
        """
        folder = Path(out_dir)
        make_folder(folder)
        targets = {"html": folder / f"{KIND}.html"}
        refuse_foreign(targets["html"], MARKS["html"])
        names = self._file_names() if save_images else []
        for picture, name in zip(self.pictures, names, strict=False):
            for bits in self.bits(picture):
                stem = f"{name}_{bits}_bit{'s' if bits > 1 else ''}"
                targets[stem] = folder / f"{stem}.png"
                refuse_foreign(targets[stem], MARK)
        files: dict[Path, str | bytes] = {targets["html"]: self.to_html()}
        if save_images:
            pngs = (encode_png(samples) for index in range(len(names)) for _, samples in self.quantized(index))
            files |= dict(zip(list(targets.values())[1:], pngs, strict=True))
        write_all(files)
        self.paths = targets
        return self

    def _file_names(self) -> list[str]:
        """A name for the files of each picture, in letters that every system takes, each once."""
        names: list[str] = []
        for picture in self.pictures:
            stem = re.sub(r"\.(png|jpe?g|webp|gif|bmp|tiff?|ppm)$", "", picture.name, flags=re.IGNORECASE)
            base = re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip("._")[:80] or "picture"
            taken, name = 1, base
            while name.lower() in [one.lower() for one in names]:
                taken += 1
                name = f"{base}_{taken}"
            names.append(name)
        return names


def visualize_image_quantization(
    image: Any = None,
    out_dir: str | PathLike[str] = "qvis-report",
    *,
    name: str | Sequence[str] | None = None,
    save_images: bool = False,
    channels: str = "rgb",
    levels: str = "uniform",
    rounding: str = "nearest",
    range: str = "picture",
    longest: int = LONGEST,
) -> ImageReport:
    """Write ``image_quantization.html``: a picture at 16, 8, 6, 4, 3, 2 and 1 bits, with what each depth loses.

    The page takes further pictures by upload or drag and drop, quantizes them in the browser, pixel for pixel as here,
    and sends nothing anywhere.

    Parameters
    ----------
    image
        An array (height, width) or (height, width, channels) of uint8, uint16 or floats from 0 to 1, with one channel
        (grey), two (grey and alpha), three (RGB) or four (RGBA); an image of Pillow; the path of a PNG, JPEG, WebP,
        GIF, BMP, TIFF or PPM file of up to 100 megapixels, which needs ``qvis[images]``; or a list of up to 24 of
        these, for one gallery. None for a sample that comes with qvis. 16 bits are shown for uint16, for floats and for
        grey PNG files of 16 bits. What is transparent is laid on white; photos are turned as their EXIF data say; of an
        animation the first frame is taken. The page says what was done.
    out_dir
        The folder to write to; made when missing.
    name
        What the page calls the picture, or a list of names; a file's own name by default.
    save_images
        Write each picture at each depth as a PNG as well, in the size that the page shows.
    channels
        ``"rgb"`` rounds red, green and blue each by itself, ``"luminance"`` the brightness (ITU-R BT.601) alone.
    levels
        ``"uniform"``: even steps from the lowest number to the highest. ``"palette"``: 2^bits colours learned from the
        picture, up to 8 bits.
    rounding
        ``"nearest"``, or ``"dithered"`` by error diffusion (Floyd and Steinberg).
    range
        What has a range of its own: the whole ``"picture"``, each ``"channel"``, or each ``"tile"`` of 32 by 32 pixels
        of each channel. A palette has none. These four are what the page opens with, and it can change them.
    longest
        Larger pictures are resized to so many pixels on their longer side, 16 to 4000.

    Returns
    -------
    ImageReport
        With ``path``, ``paths``, ``open()``, ``figures`` and ``to_json()``; a notebook shows the page.

    Raises
    ------
    BadArgumentError
        An argument is out of bounds, or the picture cannot be read: not a picture, cut short, empty, too large, of
        another shape or type, or with NaN in it; or Pillow is missing for a file.
    OutputError
        The folder cannot be written, or holds a file of that name that qvis did not write.
    """
    settings = Settings(channels, levels, rounding, range)
    if not isinstance(save_images, bool):
        raise BadArgumentError(f"save_images: got {save_images!r}, expected True or False")
    if image is None:
        image, name = draw_sample(), name or SAMPLE
    pictures = load_pictures(image, names=name, longest=longest)
    return ImageReport(pictures, settings).write(out_dir, save_images=save_images)


def _plain(figures: Figures) -> dict[str, Any]:
    return {key: value if isfinite(value) else None for key, value in vars(figures).items()}
