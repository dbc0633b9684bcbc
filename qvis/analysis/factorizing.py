"""Making a layer smaller by putting the product of two thin matrices in its place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qvis.analysis.compressing import OPTIONS, SCALE_BYTES, Compression, Rows, Stored, dot, packed
from qvis.layers import FloatArray, Graph, Layer
from qvis.noise import WeightGrid, round_weight

LARGEST_SIDE = 2048
"""The singular values of a matrix whose shorter side is longer are left out: they would take minutes for each layer."""


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a layer's matrix (channels, elements)."""

    values: FloatArray
    """The largest first."""

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli, EUSIPCO 2007)."""
        shares = self.values[self.values > 0] / max(self.values.sum(), np.finfo(float).tiny)
        return float(np.exp(-(shares * np.log(shares)).sum())) if shares.size else 0.0

    def energy_rank(self, share: float) -> int:
        """The smallest rank that keeps this share of the sum of squares."""
        energy = np.cumsum(np.square(self.values))
        return int(np.searchsorted(energy, share * energy[-1])) + 1 if energy.size and energy[-1] > 0 else 0


def why_not(layer: Layer, graph: Graph | None) -> str:
    """Why the matrix of a layer cannot be put in two, or nothing."""
    calls = graph.calls.get(layer.name, ()) if graph is not None else ()
    if layer.op == "other":
        return "it is not known how the model uses this weight"
    if "conv" in layer.op.lower() and not calls:
        return "the model's graph is not known, and so neither is whether this convolution has groups"
    groups = max((int(call.attributes.get("groups", 1)) for call in calls), default=1)
    if groups > 1:
        return f"a convolution of {groups} groups has a small matrix for each of them, and no channels in common"
    shorter = min(layer.weight.shape)
    if shorter > LARGEST_SIDE:
        return (
            f"its singular values would take long: its shorter side is {shorter:,}, and {LARGEST_SIDE:,} is the limit"
        )
    return ""


class LowRank(Compression):
    """``W (out, in)`` as ``A (out, r)`` times ``B (r, in)``: a layer to r channels, and one of size 1 from them.

    The best such product leaves out the smallest singular values. Each column of A and row of B is rounded with a step
    of its own, so that what rounding does to one has nothing to do with the others, nor with the rank.
    """

    method = "rank"

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored)
        out, into = stored.weight.shape
        each = packed(out + into, stored.bits) + 2 * SCALE_BYTES
        longest = min(out, into, max(0, (stored.bytes - 1) // each))
        ranks = -(-longest * np.arange(1, OPTIONS + 1) // OPTIONS)
        self.settings = [int(rank) for rank in ranks]
        self.sizes = [each * rank for rank in self.settings]
        left, right, values = decompose(stored.weight, longest)
        self.spectrum = Spectrum(values)
        grid = WeightGrid(stored.bits, "channel")
        self._left, self._right = round_weight(left, grid), round_weight(right, grid)
        """(ranks, out) and (ranks, in)"""

    def see(self, gradient: FloatArray, rows: Rows) -> None:
        each = np.einsum("ki,ki->k", self._left[:, rows] @ gradient, self._right, dtype=np.float64)
        self.along.append(self._cut(np.cumsum(each)) - dot(gradient, self.stored.weight[rows]))

    def noise(self) -> FloatArray:
        found, done = [], 0
        left_over = self.stored.weight.astype(np.float32, copy=True)
        for rank in self.settings:
            if rank > done:
                left_over -= self._left[done:rank].T @ self._right[done:rank]
                done = rank
            found.append(np.einsum("ij,ij->i", left_over, left_over, dtype=np.float64))
        return np.stack(found)

    def make(self, setting: int) -> FloatArray:
        made: FloatArray = self._left[:setting].T @ self._right[:setting]
        return made.astype(self.stored.weight.dtype, copy=False)

    def _cut(self, sums: FloatArray) -> FloatArray:
        cut: FloatArray = np.array([sums[rank - 1] if rank else 0.0 for rank in self.settings])
        return cut


def decompose(weight: FloatArray, rank: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The singular vectors of ``weight (out, in)``: ``(rank, out)`` and ``(rank, in)``, and all singular values.

    From the eigenvectors of the smaller of W Wᵀ and Wᵀ W, which takes less time and memory than the decomposition of W.
    One side is multiplied by the singular values. Their product is exact for any rank; singular values below a
    hundred-millionth of the largest are not.
    """
    wide = weight.shape[0] < weight.shape[1]
    tall = np.asarray(weight.T if wide else weight, dtype=np.float64)
    squares, vectors = np.linalg.eigh(tall.T @ tall)
    order = np.argsort(squares)[::-1]
    short = vectors[:, order[:rank]]
    pair = (tall @ short).T.astype(np.float32), short.T.astype(np.float32)
    values: FloatArray = np.sqrt(np.maximum(squares[order], 0))
    return (*(pair[::-1] if wide else pair), values)
