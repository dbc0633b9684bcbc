"""Folders of images, read only where samples are taken from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvis.errors import BadArgumentError
from qvis.layers import FloatArray, IntArray

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_DEEP = ("I", "F")
"""Modes of Pillow with more than 8 bits, which it would cut off at 255."""


@dataclass(frozen=True)
class Images:
    """How images become numbers: ``(pixel * scale - mean) / std``, as float32.

    They are turned as their EXIF data say, made RGB or grey, resized (bilinear, both sides by one factor), and cut to
    ``size`` around the centre.
    """

    size: int | tuple[int, int] = 224
    """Height and width in pixels; one number for both."""
    margin: float = 256 / 224
    """What is resized to cover ``size`` times this; the rest is cut off. 1 keeps as much as can be kept."""
    grey: bool = False
    """One channel instead of red, green, blue."""
    scale: float = 1 / 255
    """What pixels, 0 to 255, are multiplied with. 1 for a model that does it by itself."""
    mean: float | Sequence[float] = 0.0
    """Taken off after scaling; one number, or one for each channel."""
    std: float | Sequence[float] = 1.0
    """Divided by after that."""
    channels_last: bool = False
    """(samples, height, width, channels), as Keras has it, instead of (samples, channels, height, width)."""

    def __post_init__(self) -> None:
        size = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
            raise BadArgumentError(f"size: got {self.size!r}, expected pixels such as 224, or (height, width)")
        if not (isfinite(self.margin) and self.margin >= 1):
            raise BadArgumentError(f"margin: got {self.margin!r}, expected a factor of 1 or more")
        for name in ("scale", "mean", "std"):
            values = np.ravel(np.asarray(getattr(self, name), dtype=float))
            lengths = (1,) if name == "scale" else (1, self.channels)
            if len(values) not in lengths or not np.isfinite(values).all() or (name == "std" and (values <= 0).any()):
                raise BadArgumentError(
                    f"{name}: got {getattr(self, name)!r}, expected a {'positive ' * (name == 'std')}number"
                    + f", or {self.channels} of them for the channels" * (name != "scale")
                )

    @property
    def channels(self) -> int:
        """1 for grey, else 3."""
        return 1 if self.grey else 3

    @property
    def height_and_width(self) -> tuple[int, int]:
        """Of the result, in pixels."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)


@dataclass(frozen=True)
class ImageFiles:
    """Files of images that are indexed like one array, (images, ...). A file is opened when it is taken."""

    paths: tuple[Path, ...]
    images: Images

    @property
    def dtype(self) -> np.dtype[np.float32]:
        """float32."""
        return np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that all images would make."""
        sides, channels = self.images.height_and_width, (self.images.channels,)
        return (len(self.paths), *(sides + channels if self.images.channels_last else channels + sides))

    def __getitem__(self, places: IntArray) -> FloatArray:
        return np.stack([read_image(self.paths[place], self.images) for place in places])


def find_images(folder: Path, images: Images, notes: list[str]) -> tuple[ImageFiles, NDArray[np.int64] | None]:
    """The images of a folder, sorted by name, and their labels.

    Where subfolders hold images, each subfolder is a class, numbered in the order of the names. Names that begin with a
    dot are passed over.

    Raises
    ------
    BadArgumentError
        There are no images, or images both in the folder and in its subfolders.
    """
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    in_classes = [_files(path.rglob("*"), path) for path in classes]
    own, others = _split(_files(folder.iterdir(), folder))
    parts = [_split(files) for files in in_classes]
    ignored = len(others) + sum(len(rest) for _, rest in parts)
    if ignored:
        notes.append(f"inputs: {ignored} files in {str(folder)!r} that are no {_spell_suffixes()} files were left out")
    by_class = [found for found, _ in parts]
    if own and any(by_class):
        raise BadArgumentError(
            f"inputs: {str(folder)!r} holds images ({own[0].name!r}, ...) and folders of images; "
            "give a folder of images, or one of folders that are the classes"
        )
    if own:
        return ImageFiles(tuple(own), images), None
    if not any(by_class):
        raise BadArgumentError(f"inputs: the folder {str(folder)!r} holds no {_spell_suffixes()} files")
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(found) for found in by_class])
    return ImageFiles(tuple(path for found in by_class for path in found), images), labels


def read_image(path: Path, images: Images) -> NDArray[np.float32]:
    """One image as numbers, without the axis of samples.

    Raises
    ------
    BadArgumentError
        Pillow is not installed, the file is damaged, or it has more than 8 bits for each channel.
    """
    pillow = _pillow()
    try:
        with pillow.open(path) as opened:
            deep = opened.mode.startswith(_DEEP)
            pixels = None if deep else _pixels(opened, images)
    except Exception as error:  # Pillow raises many kinds for damaged and for oversized files
        raise BadArgumentError(f"inputs: cannot read {str(path)!r}: {type(error).__name__}: {error}") from error
    if pixels is None:
        raise BadArgumentError(
            f"inputs: {str(path)!r} has more than 8 bits for each pixel; give a function that reads such images"
        )
    mean, std = np.asarray(images.mean, np.float32), np.asarray(images.std, np.float32)
    values = (pixels * np.float32(images.scale) - mean) / std
    return np.ascontiguousarray(values if images.channels_last else np.moveaxis(values, -1, 0))


def _pixels(opened: Any, images: Images) -> NDArray[np.float32]:
    """The pixels that are kept, (height, width, channels), 0 to 255."""
    from PIL import Image, ImageOps

    height, width = images.height_and_width
    image = ImageOps.exif_transpose(opened)
    if image.mode == "P":  # its transparency may be in a form that only RGBA takes
        image = image.convert("RGBA")
    image = image.convert("L" if images.grey else "RGB")
    factor = max(height * images.margin / image.height, width * images.margin / image.width)
    sides = max(width, round(image.width * factor)), max(height, round(image.height * factor))
    image = image.resize(sides, Image.Resampling.BILINEAR)
    left, top = (sides[0] - width) // 2, (sides[1] - height) // 2
    kept = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32)
    return kept.reshape(height, width, images.channels)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise BadArgumentError(
            "inputs: images cannot be read without Pillow; install it with pip install 'qvis[images]'"
        ) from error
    return Image


def _files(found: Iterable[Path], below: Path) -> list[Path]:
    """The files among what was found, sorted, without hidden ones and those in hidden folders."""
    return sorted(path for path in found if path.is_file() and "/." not in f"/{path.relative_to(below).as_posix()}")


def _split(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """The images, and what is none."""
    groups: tuple[list[Path], list[Path]] = ([], [])
    for path in files:
        groups[path.suffix.lower() not in SUFFIXES].append(path)
    return groups


def _spell_suffixes() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
