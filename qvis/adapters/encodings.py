"""Turns the bytes of stored numbers into arrays: with NumPy alone, also for types that NumPy has no name for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Encoding(NamedTuple):
    """How one type of number is stored."""

    name: str
    bits: int
    """Of one number; several share a byte where it is less than eight, the first in the lowest bits."""
    decode: Callable[[NDArray[np.uint8]], Array]
    """Bytes, a whole number of them for the count of numbers -> numbers; views of them where NumPy knows the type."""
    floating: bool

    def bytes_for(self, count: int) -> int:
        """How many bytes ``count`` numbers take."""
        return (count * self.bits + 7) // 8

    def numbers(self, data: bytes | memoryview | Array, shape: tuple[int, ...]) -> Array:
        """The array of ``shape`` that is stored in ``data``, little end first.

        Floating types come as float32 or float64, others as the narrowest integers that hold them.
        """
        count = _product(shape)
        if isinstance(data, np.ndarray):
            data = np.ascontiguousarray(data).view(np.uint8)
        flat = np.frombuffer(data, dtype=np.uint8, count=self.bytes_for(count))
        return self.decode(flat)[:count].reshape(shape)


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _view(flat: NDArray[np.uint8], dtype: str) -> Array:
    return flat.view(np.dtype(dtype))


def _half(flat: NDArray[np.uint8]) -> Array:
    return flat.view(np.dtype("<f2")).astype(np.float32)


def _bfloat16(flat: NDArray[np.uint8]) -> Array:
    words: Array = flat.view(np.dtype("<u2")).astype(np.uint32) << np.uint32(16)
    values: Array = words.view(np.float32)
    return values


def _table(flat: NDArray[np.uint8], name: str) -> Array:
    values: Array = float8(name)[flat]
    return values


def _small(flat: NDArray[np.uint8], bits: int, signed: bool) -> Array:
    """Numbers of 2 or 4 bits, the first of each byte in its lowest bits."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes: Array = ((flat[:, None] >> shifts) & (2**bits - 1)).reshape(-1)
    if not signed:
        return codes
    half = 2 ** (bits - 1)
    signed_codes: Array = (codes ^ half).astype(np.int8) - np.int8(half)
    return signed_codes


def _float4(flat: NDArray[np.uint8]) -> Array:
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
    values: Array = np.concatenate([magnitudes, -magnitudes])[_small(flat, 4, signed=False)]
    return values


_FLOAT8 = {
    # (bits of the exponent, its bias, what the largest exponent means)
    "float8_e4m3fn": (4, 7, "nan at all ones"),
    "float8_e4m3fnuz": (4, 8, "nan at minus zero"),
    "float8_e5m2": (5, 15, "inf and nan"),
    "float8_e5m2fnuz": (5, 16, "nan at minus zero"),
}


@cache
def float8(name: str) -> Array:
    """The values of the 256 codes of a type of eight bits."""
    codes = np.arange(256)
    if name == "float8_e8m0fnu":  # a bare exponent
        return np.append(np.ldexp(1.0, codes[:255] - 127), np.nan).astype(np.float32)
    exponent_bits, bias, special = _FLOAT8[name]
    mantissa_bits = 7 - exponent_bits
    exponent = (codes & 0x7F) >> mantissa_bits
    mantissa = (codes & (2**mantissa_bits - 1)) / 2**mantissa_bits
    values: Array = np.where(exponent == 0, np.ldexp(mantissa, 1 - bias), np.ldexp(1 + mantissa, exponent - bias))
    values = values.astype(np.float32)
    values[128:] *= -1
    if special == "nan at minus zero":
        values[0x80] = np.nan
    elif special == "nan at all ones":
        values[(codes & 0x7F) == 0x7F] = np.nan
    else:
        top = exponent == 2**exponent_bits - 1
        values[top & (mantissa == 0)] *= np.inf
        values[top & (mantissa > 0)] = np.nan
    return values


def _integer(name: str, bits: int, code: str) -> Encoding:
    return Encoding(name, bits, partial(_view, dtype=code), False)


ENCODINGS: dict[str, Encoding] = {
    one.name: one
    for one in (
        Encoding("float64", 64, partial(_view, dtype="<f8"), True),
        Encoding("float32", 32, partial(_view, dtype="<f4"), True),
        Encoding("float16", 16, _half, True),
        Encoding("bfloat16", 16, _bfloat16, True),
        *(Encoding(name, 8, partial(_table, name=name), True) for name in (*_FLOAT8, "float8_e8m0fnu")),
        Encoding("float4_e2m1", 4, _float4, True),
        *(_integer(f"int{bits}", bits, f"<i{bits // 8}") for bits in (8, 16, 32, 64)),
        *(_integer(f"uint{bits}", bits, f"<u{bits // 8}") for bits in (8, 16, 32, 64)),
        _integer("bool", 8, "u1"),
        *(Encoding(f"int{bits}", bits, partial(_small, bits=bits, signed=True), False) for bits in (2, 4)),
        *(Encoding(f"uint{bits}", bits, partial(_small, bits=bits, signed=False), False) for bits in (2, 4)),
    )
}
"""By the name of the type, spelled as PyTorch and ml_dtypes do."""
