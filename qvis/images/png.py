"""A PNG writer without Pillow, so that the page and Python count the same bytes.

``templates/widgets/picture_figures.js`` does the same; only the compressor is the browser's own zlib there.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np

from qvis.images.palettes import distinct, pack_colours

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, COLOUR, INDEXED = 0, 2, 3
"""Types of colour in PNG."""
LEVEL = 6
"""zlib's usual effort, which browsers have as well."""
MARK = b"Software\x00qvis"
"""Says who wrote the file."""


def encode_png(samples: np.ndarray[Any, Any]) -> bytes:
    """A picture (height, width, 1 or 3) of uint8 or uint16 as PNG.

    Up to 256 colours of 8 bits are stored as 1, 2, 4 or 8 bits for each pixel with a table of colours; else each row is
    filtered by Paeth's predictor.
    """
    height, width, channels = samples.shape
    depth, kind, table = 8 * samples.dtype.itemsize, COLOUR if channels == 3 else GREY, b""
    colours = distinct(samples.reshape(-1, channels))
    if depth == 8 and len(colours) <= 256:
        places = np.searchsorted(pack_colours(colours), pack_colours(samples.reshape(-1, channels)))
        depth, kind = next(bits for bits in (1, 2, 4, 8) if len(colours) <= 2**bits), INDEXED
        rows = _packed(places.reshape(height, width).astype(np.uint8), depth)
        rows = np.pad(rows, ((0, 0), (1, 0)))  # filter 0: none
        table = _chunk(b"PLTE", np.broadcast_to(colours, (len(colours), 3)).astype(np.uint8).tobytes())
    else:
        rows = np.pad(filtered(samples), ((0, 0), (1, 0)), constant_values=4)
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    data = zlib.compress(rows.tobytes(), LEVEL)
    head = SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"tEXt", MARK)
    return head + table + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def filtered(samples: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of each row less what Paeth's predictor expects from the neighbours; (height, bytes)."""
    height = len(samples)
    step = samples.shape[2] * samples.dtype.itemsize
    rows = samples.astype(samples.dtype.newbyteorder(">")).view(np.uint8).reshape(height, -1).astype(np.int16)
    left, above, corner = np.zeros_like(rows), np.zeros_like(rows), np.zeros_like(rows)
    left[:, step:] = rows[:, :-step]
    above[1:] = rows[:-1]
    corner[1:, step:] = rows[:-1, :-step]
    by_left, by_above = np.abs(above - corner), np.abs(left - corner)
    by_corner = np.abs(left + above - 2 * corner)
    guess = np.where(
        (by_left <= by_above) & (by_left <= by_corner), left, np.where(by_above <= by_corner, above, corner)
    )
    return (rows - guess).astype(np.uint8)


def _packed(places: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Numbers of so many bits in bytes, the first in the highest bits; each row ends with a whole byte."""
    each = 8 // bits
    padded = np.pad(places, ((0, 0), (0, -places.shape[1] % each))).reshape(len(places), -1, each)
    packed = np.zeros(padded.shape[:2], dtype=np.uint8)
    for place in range(each):
        packed = packed << bits | padded[..., place]
    return packed


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
