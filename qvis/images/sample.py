"""The picture that a page opens on where none was given, drawn with NumPy: what bits are lost on first.

Smooth gradients turn to bands, colours far from the corners of the cube move, fine texture and small text live or die.
"""

from __future__ import annotations

import numpy as np

from qvis.images.quantizing import Samples
from qvis.layers import FloatArray

WIDTH, HEIGHT = 960, 600
NAME = "sample"
SEED = 7
LETTERS = {
    "q": "01110 10001 10001 01111 00001 00001 00001",
    "v": "10001 10001 10001 01010 01010 00100 00000",
    "i": "00100 00000 01100 00100 00100 01110 00000",
    "s": "01111 10000 01110 00001 00001 11110 00000",
    "b": "10000 10000 11110 10001 10001 11110 00000",
    "t": "00100 01110 00100 00100 00100 00011 00000",
    "8": "01110 10001 01110 10001 10001 01110 00000",
    "4": "00010 00110 01010 11111 00010 00010 00000",
    "2": "01110 10001 00010 00100 01000 11111 00000",
    "1": "00100 01100 00100 00100 00100 01110 00000",
    " ": "00000 00000 00000 00000 00000 00000 00000",
}
"""Rows of 5 by 7 dots."""


def draw_sample() -> Samples:
    """The sample, (600, 960, 3) of uint8; the same each time."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float64)
    scene = _sky(x, y)
    _paint(scene, _hills(x, y, 400, 46, 0.008), (0.20, 0.36, 0.33), _texture(6, 0.10))
    _paint(scene, _hills(x, y, 470, 34, 0.013), (0.30, 0.44, 0.20), _texture(2, 0.22))
    _ball(scene, x, y, (690.0, 395.0), 120.0, np.array([0.86, 0.36, 0.22]))
    _ball(scene, x, y, (850.0, 470.0), 64.0, np.array([0.30, 0.42, 0.80]))
    _rings(scene, x, y, (150.0, 440.0), 104.0)
    for text, left, top, size, colour in (
        ("qvis", 60, 70, 18, (0.98, 0.97, 0.94)),
        ("8 4 2 1 bits", 64, 226, 4, (0.10, 0.13, 0.25)),
        ("8 4 2 1 bits", 64, 268, 2, (0.10, 0.13, 0.25)),
        ("8 4 2 1 bits", 64, 292, 1, (0.10, 0.13, 0.25)),
    ):
        _write(scene, text, left, top, size, colour)
    return np.rint(np.clip(scene, 0, 1) * 255).astype(np.uint8)


def _sky(x: FloatArray, y: FloatArray) -> FloatArray:
    high, low, glow = (np.array(colour) for colour in ((0.13, 0.25, 0.52), (0.93, 0.74, 0.58), (1.0, 0.88, 0.55)))
    height = np.clip(y / 460, 0, 1)[..., None] ** 1.3
    near = np.exp(-(np.square(x - 560) + np.square(y - 330)) / 2 / 170**2)[..., None]
    sky: FloatArray = high * (1 - height) + low * height
    sky += (glow - sky) * near * 0.8
    return sky


def _hills(x: FloatArray, y: FloatArray, level: float, height: float, wave: float) -> FloatArray:
    """Which part of each pixel lies below a line of hills."""
    line = level + height * (np.sin(x * wave) + 0.5 * np.sin(x * wave * 2.3 + 1) + 0.25 * np.sin(x * wave * 5.1 + 2))
    below: FloatArray = np.clip(y - line + 0.5, 0, 1)
    return below


def _texture(size: int, strength: float) -> FloatArray:
    """Random numbers around 1 that stay the same over ``size`` pixels or so."""
    random = np.random.default_rng(SEED + size)
    coarse = random.random((HEIGHT // size + 2, WIDTH // size + 2))
    rows, columns = np.arange(HEIGHT) / size, np.arange(WIDTH) / size
    (top, down), (left, across) = ((at.astype(int), at % 1) for at in (rows, columns))
    upper, lower = (coarse[row][:, left] * (1 - across) + coarse[row][:, left + 1] * across for row in (top, top + 1))
    mixed: FloatArray = upper * (1 - down)[:, None] + lower * down[:, None]
    return 1 + strength * 2 * (mixed - 0.5)


def _paint(scene: FloatArray, share: FloatArray, colour: tuple[float, float, float], texture: FloatArray) -> None:
    painted = np.array(colour) * texture[..., None]
    scene += (painted - scene) * share[..., None]


def _ball(
    scene: FloatArray, x: FloatArray, y: FloatArray, centre: tuple[float, float], radius: float, colour: FloatArray
) -> None:
    across, down = (x - centre[0]) / radius, (y - centre[1]) / radius
    inside = np.clip((1 - np.hypot(across, down)) * radius + 0.5, 0, 1)[..., None]
    depth = np.sqrt(np.clip(1 - across**2 - down**2, 0, 1))
    light = np.clip(-0.55 * across - 0.6 * down + 0.58 * depth, 0, 1)[..., None]
    shaded = colour * (0.22 + 0.78 * light) + 0.75 * light**24
    scene += (shaded - scene) * inside


def _rings(scene: FloatArray, x: FloatArray, y: FloatArray, centre: tuple[float, float], radius: float) -> None:
    """A zone plate: rings that get finer outwards, tinted around the circle."""
    across, down = x - centre[0], y - centre[1]
    distance = np.hypot(across, down)
    inside = np.clip(radius - distance + 0.5, 0, 1)[..., None]
    wave = 0.5 + 0.5 * np.cos(distance**2 * 0.6 * np.pi / radius / 2)
    turn = np.arctan2(down, across)[..., None]
    tint = 0.5 + 0.5 * np.cos(turn + np.array([0.0, 2.1, 4.2]))
    scene += (wave[..., None] * (0.35 + 0.65 * tint) - scene) * inside


def _write(scene: FloatArray, text: str, left: int, top: int, size: int, colour: tuple[float, float, float]) -> None:
    for place, letter in enumerate(text):
        dots = np.array([[int(dot) for dot in row] for row in LETTERS[letter].split()], dtype=bool)
        start = left + place * 6 * size
        area = scene[top : top + 7 * size, start : start + 5 * size]
        area[np.kron(dots, np.ones((size, size), dtype=bool))] = colour
