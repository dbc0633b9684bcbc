"""The levels of grids that are the same for every layer but for a scale. All are ascending, as float64."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from qvis.layers import FloatArray

FLOATS = {"float8_e4m3fn": (4, 3, 1), "float8_e5m2": (5, 2, 4), "float4_e2m1": (2, 1, 0)}
"""Of each format the bits of the exponent and of the mantissa, and how many of its last codes are no finite numbers.

The first two are those of Micikevicius et al., arXiv 2209.05433, table 1; the third is the element of MXFP4 in the OCP
Microscaling Formats specification 1.0, section 5.3.3.
"""


def float_levels(kind: str) -> FloatArray:
    """All finite numbers of a format, with both zeros as one: (253,), (247,) and (15,) of those in :data:`FLOATS`."""
    exponent_bits, mantissa_bits, reserved = FLOATS[kind]
    exponent, mantissa = np.divmod(np.arange(2 ** (exponent_bits + mantissa_bits) - reserved), 2**mantissa_bits)
    bias = 2 ** (exponent_bits - 1) - 1
    # exponent 0 is for numbers without the leading 1, at the distance of those of exponent 1
    magnitude = ((exponent > 0) + mantissa / 2**mantissa_bits) * 2.0 ** (np.maximum(exponent, 1) - bias)
    return np.concatenate([-magnitude[:0:-1], magnitude])


def logarithmic_levels(bits: int) -> FloatArray:
    """Zero and 1, 1/2, 1/4, ... with either sign, (2^bits - 1,)."""
    powers = 2.0 ** -np.arange(2 ** (bits - 1) - 1)
    return np.concatenate([-powers, [0.0], powers[::-1]])


def quantile_levels(bits: int) -> FloatArray:
    """Levels between -1 and 1 that normal numbers use equally often, with zero among them, (2^bits,).

    As QLoRA makes those of NF4 (Dettmers et al., arXiv 2305.14314, section 3): each half of the normal distribution
    has its own evenly spaced probabilities, 2^(bits-1) of them up to zero for the negative half and one more for the
    positive, whose zeros are one. The outermost probability, which cannot be 1, is half-way between those that leave
    out half a step of either half.
    """
    half = 2 ** (bits - 1)
    outermost = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    normal = NormalDist()

    def quantiles(count: int) -> list[float]:
        return [normal.inv_cdf(p) for p in np.linspace(outermost, 0.5, count)[:-1].tolist()]

    negative, positive = quantiles(half), quantiles(half + 1)
    levels: FloatArray = np.array([-x for x in negative] + [0.0] + positive[::-1]) / positive[0]
    return levels
