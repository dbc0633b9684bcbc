"""What rounding to an integer grid does to the weights of a layer: exact, not estimated."""

from __future__ import annotations

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

    Raises:
        BadArgumentError: ``bits`` is not from 2 to 16.
    """
    if not 2 <= bits <= 16:
        raise BadArgumentError(f"bits: got {bits!r}, expected a whole number from 2 to 16")
    largest = 2 ** (bits - 1) - 1
    peak = np.nan_to_num(statistics.peak, nan=0.0)
    layer_peak = float(peak.max(initial=0.0))
    step = layer_peak / largest
    steps = peak / largest
    clean = not statistics.nonfinite.any()
    # float32 carries r = w / step well enough; tiny or huge steps would not survive the division in it
    dtype = weight.dtype if 1e-30 < layer_peak < 1e30 else np.dtype(np.float64)

    def noise_of_block(rows: slice) -> NDArray[np.float64]:
        block = weight[rows].astype(dtype, copy=False)
        if not clean:
            block = np.where(np.isfinite(block), block, 0)
        own = steps[rows]
        # where the step is below the type's reach, so is the noise
        reach = np.finfo(dtype).tiny
        inverse = np.divide(1.0, own, out=np.zeros_like(own), where=own > reach)
        buffer = np.empty_like(block)
        shared = _errors(block, np.full_like(own, 1 / step if step > reach else 0.0), buffer, largest) * step**2
        return np.stack([shared, _errors(block, inverse, buffer, largest) * own**2])

    tensor, channel = np.concatenate((pool or Pool()).map(noise_of_block, weight), axis=1)
    low, high = np.nan_to_num(statistics.min), np.nan_to_num(statistics.max)
    levels = np.rint(high / step) - np.rint(low / step) + 1 if step > 0 else np.ones_like(low)
    return RoundingNoise(
        bits=bits,
        step=step,
        power=_power(statistics),
        noise_tensor=tensor,
        noise_channel=channel,
        levels=levels.astype(np.int64),
    )


def _errors(block: FloatArray, inverse_step: FloatArray, buffer: FloatArray, largest: int) -> NDArray[np.float64]:
    """Sum of squared rounding errors of each row, in steps; ``buffer`` has the shape of ``block``."""
    ratio = np.multiply(block, inverse_step.astype(block.dtype)[:, None], out=buffer)
    errors = sum_of_squares(np.subtract(ratio, np.rint(ratio), out=ratio))
    # weights that lie on the grid come out a few units of the type's last place beside it: that is no noise
    errors[errors < block.shape[1] * (4 * largest * np.finfo(block.dtype).eps) ** 2] = 0
    return errors


def _power(statistics: ChannelStatistics) -> NDArray[np.float64]:
    """Sum of w^2 of each channel from its moments, which spares a pass over the weights."""
    count = statistics.elements - statistics.nonfinite
    spread = np.where(count > 1, (count - 1) * np.square(np.nan_to_num(statistics.std)), 0.0)
    return np.asarray(spread + count * np.square(np.nan_to_num(statistics.mean)), dtype=np.float64)
