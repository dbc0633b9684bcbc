"""From arrays, Pillow's images and paths to pictures for the page."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from qvis.errors import BadArgumentError
from qvis.images.quantizing import Samples
from qvis.images.settings import TILE
from qvis.images.shrinking import shrink
from qvis.words import visible

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What Pillow may read: pictures of pixels, whose readers run nothing."""
MOST_PIXELS = 100_000_000
"""A file that says it has more is not decoded."""
ORIENTATION = 0x0112
"""A tag of EXIF."""
LONGEST = 1200
"""Sides on the page, in pixels, at most."""
MOST_PICTURES = 24


@dataclass(frozen=True)
class Picture:
    """A picture, ready to be quantized."""

    name: str
    samples: Samples
    """(height, width, 1 or 3), uint8 or uint16."""
    given: tuple[int, int]
    """Width and height before it was resized."""
    notes: tuple[str, ...] = ()
    """What was done to it, in words."""
    tile: tuple[int, int] = (TILE, TILE)
    """Width and height of what has a range of its own where each tile has."""


def load_pictures(images: Any, *, names: Sequence[str] | str | None = None, longest: int = LONGEST) -> list[Picture]:
    """Load one picture, or a list or tuple of them; see :func:`qvis.visualize_image_quantization`."""
    several = list(images) if isinstance(images, list | tuple) else [images]
    if not several or len(several) > MOST_PICTURES:
        raise BadArgumentError(f"image: got {len(several)} pictures, expected 1 to {MOST_PICTURES} for one page")
    if isinstance(longest, bool) or not isinstance(longest, int) or not 16 <= longest <= 4000:
        raise BadArgumentError(f"longest: got {longest!r}, expected pixels from 16 to 4000")
    given = [names] if isinstance(names, str) else list(names or ())
    if given and len(given) != len(several):
        raise BadArgumentError(f"name: got {len(given)} names for {len(several)} pictures, expected one for each")
    pictures = []
    for index, image in enumerate(several):
        name = given[index] if given else "picture" if len(several) == 1 else f"picture {index + 1}"
        pictures.append(load_picture(image, name, named=bool(given), longest=longest))
    return pictures


def load_picture(image: Any, name: str, *, named: bool = True, longest: int = LONGEST) -> Picture:
    """Load one picture. A file is called by its own name unless it is ``named``."""
    notes: list[str] = []
    if isinstance(image, str | PathLike):
        path = Path(image)
        name = name if named else path.name
        samples = _read_file(path, notes)
    elif hasattr(image, "getbands") and hasattr(image, "getexif"):
        samples = _from_pillow(image, repr(visible(name)), notes)
    else:
        samples = _from_array(image, notes)
    samples, alpha = _split(samples)
    if alpha is not None:
        samples = _on_white(samples, alpha, notes)
    small = shrink(samples, longest)
    height, width = samples.shape[:2]
    if small.shape != samples.shape:
        notes.append(f"resized from {width:,} × {height:,} to {small.shape[1]:,} × {small.shape[0]:,} for the page")
    return Picture(name, np.ascontiguousarray(small), (width, height), tuple(notes))


# ---------------------------------------------------------------------------------------------- files


def _read_file(path: Path, notes: list[str]) -> Samples:
    shown = repr(visible(str(path)))
    try:
        empty = path.stat().st_size == 0
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise BadArgumentError(f"image: cannot read {shown}: {why}; expected the path of a picture") from error
    if path.is_dir():
        raise BadArgumentError(f"image: {shown} is a folder, expected the path of a picture")
    if empty:
        raise BadArgumentError(f"image: {shown} is empty (0 bytes), expected a picture")
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise BadArgumentError(
            f"image: {shown} cannot be read without Pillow; pip install 'qvis[images]', or give an array"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's of large sizes: those that are too large are refused here
            with Image.open(path, formats=FORMATS) as opened:
                return _from_pillow(opened, shown, notes)
    except BadArgumentError:
        raise
    except Image.DecompressionBombError as error:
        raise BadArgumentError(_too_large(shown, str(error).rstrip("."))) from error
    except UnidentifiedImageError as error:
        raise BadArgumentError(
            f"image: {shown} is not a picture that can be read, expected PNG, JPEG, WebP, GIF, BMP, TIFF or PPM"
        ) from error
    except Exception as error:  # Pillow raises many kinds for damaged files
        why = " ".join(str(error).split()) or type(error).__name__
        raise BadArgumentError(f"image: {shown} is damaged or cut short ({why}); give another copy of it") from error


def _from_pillow(image: Any, shown: str, notes: list[str]) -> Samples:
    """The pixels, (height, width, channels), with the transparency as the last channel if there is any."""
    from PIL import ImageOps

    if image.width * image.height > MOST_PIXELS:
        raise BadArgumentError(_too_large(shown, f"it says it has {image.width:,} × {image.height:,} pixels"))
    if 0 in image.size:
        raise BadArgumentError(f"image: {shown} has {image.width} × {image.height} pixels, expected at least 1 × 1")
    frames = getattr(image, "n_frames", 1)
    if getattr(image, "is_animated", False):
        image.seek(0)
        notes.append(f"the first of {frames:,} frames")
    if "16" in "".join(str(tile[-1]) for tile in getattr(image, "tile", ())) and not image.mode.startswith("I"):
        notes.append("read with 8 of its 16 bits, as Pillow reads colours")
    if image.info.get("icc_profile"):
        notes.append("taken as sRGB, whatever its colour profile says")
    turned = image
    if image.getexif().get(ORIENTATION, 1) != 1:
        turned = ImageOps.exif_transpose(image)
        notes.append("turned as its EXIF data say")
    mode = turned.mode
    if mode.startswith(("I", "F")):
        array = np.asarray(turned)
        if mode == "I" and array.min() >= 0 and array.max() <= 65535:
            array = array.astype(np.uint16)  # how some versions of Pillow read 16 bits
        return _from_array(array, notes)
    if mode in ("LA", "La"):
        mode = "LA"
    elif "transparency" in turned.info or mode in ("RGBA", "RGBa", "PA"):
        mode = "RGBA"
    else:
        mode = "L" if mode in ("1", "L") else "RGB"
    pixels: Samples = np.asarray(turned if turned.mode == mode else turned.convert(mode))
    return pixels.reshape(turned.height, turned.width, -1)


def _too_large(shown: str, why: str) -> str:
    return f"image: {shown} is too large to be decoded ({why}), expected at most {MOST_PIXELS:,} pixels"


# ---------------------------------------------------------------------------------------------- arrays


def _from_array(image: Any, notes: list[str]) -> Samples:
    array = np.asarray(image)
    if array.dtype.kind not in "buif":
        raise BadArgumentError(
            f"image: got {type(image).__name__} of type {array.dtype}, expected an array, an image of Pillow or a path"
        )
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or not array.size or array.shape[2] not in (1, 2, 3, 4):
        shape = np.shape(image)
        first = len(shape) == 3 and shape[0] in (1, 2, 3, 4)
        way_out = "; numpy.moveaxis(image, 0, -1) puts the channels last" if first else ""
        raise BadArgumentError(
            f"image: got an array of shape {shape}, expected (height, width) or (height, width, channels) with 1 to"
            f" 4 channels: grey, grey and alpha, RGB or RGBA{way_out}"
        )
    if array.dtype == np.bool_:
        black_or_white: Samples = np.where(array, 255, 0).astype(np.uint8)
        return black_or_white
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    low, high = array.min(), array.max()
    if array.dtype.kind == "f":
        if not (np.isfinite(low) and np.isfinite(high)):
            raise BadArgumentError("image: the array has NaN or infinite numbers, expected 0 to 1; replace them first")
        if low < 0 or high > 1:
            raise BadArgumentError(
                f"image: got floats from {low:g} to {high:g}, expected 0 (black) to 1 (white); divide them by what"
                " is white, or give uint8 or uint16"
            )
        notes.append("floats from 0 (black) to 1 (white), read as 16 bits")
        return np.rint(array.astype(np.float64) * 65535).astype(np.uint16)
    raise BadArgumentError(
        f"image: got {array.dtype} from {low} to {high}, expected uint8 (0 to 255), uint16 (0 to 65535) or floats (0 to"
        " 1); image.astype(numpy.uint8) makes one of the first kind"
    )


def _split(samples: Samples) -> tuple[Samples, Samples | None]:
    if samples.shape[2] in (2, 4):
        return samples[..., :-1], samples[..., -1:]
    return samples, None


def _on_white(samples: Samples, alpha: Samples, notes: list[str]) -> Samples:
    """Mixed with white where it is transparent, in whole numbers, some rows at a time."""
    top = int(np.iinfo(samples.dtype).max)
    if alpha.min() == top:
        return np.ascontiguousarray(samples)
    notes.append("laid on white where it is transparent")
    found = np.empty(samples.shape, dtype=samples.dtype)
    for start in range(0, len(samples), 64):
        part, share = (one[start : start + 64].astype(np.int64) for one in (samples, alpha))
        found[start : start + 64] = (part * share + top * (top - share) + top // 2) // top
    return found
