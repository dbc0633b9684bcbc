"""Work on a weight matrix in blocks of rows that fit a core's cache, on all cores.

Several reductions over a block then read main memory once. NumPy releases the interpreter lock in each of them, so that
plain threads suffice. One matrix is in work at a time: memory is bounded by the largest layer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qvis.layers import FloatArray

BLOCK_BYTES = 1 << 19
"""Bytes of a block: with its temporaries it stays within the second-level cache of common processors."""
CHUNK = 4096
"""float32 sums of squares are taken over this many elements, and added up in float64: exact to about 1e-7."""

Result = TypeVar("Result")


class Pool:
    """Runs a function over the row blocks of a matrix, in order, on the threads it owns."""

    def __init__(self, executor: ThreadPoolExecutor | None = None) -> None:
        self._executor = executor

    def map(self, function: Callable[[slice], Result], weight: FloatArray) -> list[Result]:
        """Call ``function`` with each block of rows of ``weight`` (channels, elements); the results in order."""
        blocks = list(row_blocks(weight))
        if self._executor is None or len(blocks) < 4:
            return [function(block) for block in blocks]
        return list(self._executor.map(function, blocks))

    def submit(self, function: Callable[[], Result]) -> Callable[[], Result]:
        """Start ``function`` beside other work; what is returned waits for its result."""
        return self._executor.submit(function).result if self._executor is not None else function


@contextmanager
def pool(workers: int | None = None) -> Iterator[Pool]:
    """A :class:`Pool` with ``workers`` threads (default: one for each core that this process may use, at most 8)."""
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(cores, 8)
    if workers < 2:
        yield Pool()
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="qvis") as executor:
        yield Pool(executor)


def row_blocks(weight: FloatArray) -> Iterator[slice]:
    """Cut the rows of ``weight`` (channels, elements) into blocks of about :data:`BLOCK_BYTES`."""
    rows = max(1, BLOCK_BYTES // max(1, weight.shape[1] * weight.itemsize))
    for start in range(0, weight.shape[0], rows):
        yield slice(start, min(start + rows, weight.shape[0]))


def sum_of_squares(block: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Sum of squares of each row of ``block`` (rows, elements), accurate to float64 for float32 input."""
    rows, elements = block.shape
    whole = elements - elements % CHUNK
    if whole == 0:
        return np.asarray(np.einsum("ij,ij->i", block, block), dtype=np.float64)
    chunks = block[:, :whole].reshape(rows, -1, CHUNK)
    total = np.asarray(np.einsum("ijk,ijk->ij", chunks, chunks).sum(axis=1, dtype=np.float64))
    if whole < elements:
        total += np.einsum("ij,ij->i", block[:, whole:], block[:, whole:])
    return total
