"""What rounding to an integer grid does to the weights of a layer: exact, not estimated."""

from __future__ import annotations

from operator import index

import numpy as np
from numpy.typing import NDArray

from qvis.analysis.blocks import Pool, sum_of_squares
from qvis.errors import BadArgumentError
from qvis.layers import ChannelStatistics, FloatArray, RoundingNoise


def rounding_noise(
    weight: FloatArray, statistics: ChannelStatistics, *, bits: int = 8, pool: Pool | None = None
) -> RoundingNoise:
    """Round ``weight`` (channels, elements) to nearest on a symmetric signed grid and sum up the errors by channel.

    The step is max|w| / (2^(bits-1) - 1), once over the tensor and once over each channel (Krishnamoorthi,
    arXiv 1806.08342, section 2.1, with a narrow range). Weights that are not finite bring no noise.

    Raises
    ------
    BadArgumentError
        ``bits`` is not from 2 to 16.
    """
    largest = 2 ** (checked_bits(bits) - 1) - 1
    peak = np.nan_to_num(statistics.peak, nan=0.0)
    exponent = _exponent(float(peak.max(initial=0.0)))
    peak = np.ldexp(peak, -exponent)
    step = float(peak.max(initial=0.0)) / largest
    steps = peak / largest
    power = _power(statistics, exponent)
    clean = not statistics.nonfinite.any()
    # float32 carries r = w / step well enough, unless steps are tiny or huge
    dtype = np.dtype(np.float64) if exponent else weight.dtype

    def noise_of_block(rows: slice) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore"):  # of a NaN that was meant to signal
            block = weight[rows].astype(dtype, copy=False)
        if not clean:
            block = np.where(np.isfinite(block), block, 0)
        if exponent:
            block = np.ldexp(block, -exponent)
        own = steps[rows]
        # where the step is below the type's reach, so is the noise
        reach = np.finfo(dtype).tiny
        inverse = np.divide(1.0, own, out=np.zeros_like(own), where=own > reach)
        buffer = np.empty_like(block)
        shared = _errors(block, np.full_like(own, 1 / step if step > reach else 0.0), buffer) * step**2
        noise = np.stack([shared, _errors(block, inverse, buffer) * own**2])
        # weights that lie on the grid come out a few units of their type's last place beside it: that is no noise
        noise[noise < power[rows] * (4 * np.finfo(dtype).eps) ** 2] = 0
        return noise

    tensor, channel = np.concatenate((pool or Pool()).map(noise_of_block, weight), axis=1)
    low, high = (np.ldexp(np.nan_to_num(end), -exponent) for end in (statistics.min, statistics.max))
    levels = np.rint(high / step) - np.rint(low / step) + 1 if step > 0 else np.ones_like(low)
    return RoundingNoise(
        bits=bits,
        step=float(np.ldexp(step, exponent)),
        power=power,
        noise_tensor=tensor,
        noise_channel=channel,
        levels=levels.astype(np.int64),
    )


def checked_bits(bits: int) -> int:
    """``bits`` as a plain integer; an error where it is no width of a grid."""
    try:
        width = index(bits)
    except TypeError:
        width = 0
    if not 2 <= width <= 16:
        raise BadArgumentError(f"bits: got {bits!r}, expected a whole number from 2 to 16")
    return width


def _exponent(peak: float) -> int:
    """The power of two in units of which weights are rounded: 0, unless their squares could leave floating point."""
    return 0 if 1e-24 < peak < 1e24 else int(np.frexp(peak)[1])


def _errors(block: FloatArray, inverse_step: FloatArray, buffer: FloatArray) -> NDArray[np.float64]:
    """Sum of squared rounding errors of each row, in steps; ``buffer`` has the shape of ``block``."""
    ratio = np.multiply(block, inverse_step.astype(block.dtype)[:, None], out=buffer)
    return sum_of_squares(np.subtract(ratio, np.rint(ratio), out=ratio))


def _power(statistics: ChannelStatistics, exponent: int) -> NDArray[np.float64]:
    """Sum of w^2 of each channel from its moments, which spares a pass over the weights."""
    count = statistics.elements - statistics.nonfinite
    std, mean = (np.ldexp(np.nan_to_num(moment), -exponent) for moment in (statistics.std, statistics.mean))
    return np.asarray(np.maximum(count - 1, 0) * np.square(std) + count * np.square(mean), dtype=np.float64)
