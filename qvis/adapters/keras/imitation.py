"""Inputs made up for a Keras model where no data is at hand: noise, shaped until normalizations see what they expect.

A BatchNormalization remembers the mean and the deviation of what it saw in training. Inputs for which each of them sees
that again resemble the training data in what matters to rounding (Haroush et al., The Knowledge Within, arXiv
1912.01274; Cai et al., ZeroQ, arXiv 2001.00281, section 3.1).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qvis.adapters.keras.outputs import to_tensors
from qvis.adapters.keras.tap import Tap, current_graph
from qvis.errors import NotRunnableError
from qvis.layers import FloatArray
from qvis.running import Batch

STEPS = 40
"""Of L-BFGS, which costs about as many backward passes."""
TOGETHER = 16
"""Samples in a batch: enough for a mean."""


@dataclass
class _Norms(Tap):
    """Sees what enters the normalizations, and the tables that rows are taken from."""

    layers: Iterable[Any] = ()
    misfits: list[Any] = field(default_factory=list)
    rows: list[tuple[Any, int]] = field(default_factory=list)
    """Numbers of rows, and how many the table has."""

    def attach(self) -> None:
        import keras

        self._graph = current_graph()
        for layer in self.layers:
            if hasattr(layer, "moving_variance"):
                object.__setattr__(layer, "call", self._seeing(layer, self._see_norm))
            elif isinstance(layer, keras.layers.Embedding):
                object.__setattr__(layer, "call", self._seeing(layer, self._see_table))

    def _seeing(self, layer: Any, see: Callable[[Any, Any], None]) -> Callable[..., Any]:
        call = layer.call

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            x = next(iter([*args, *kwargs.values()]))
            if hasattr(x, "shape") and current_graph() is self._graph:  # out of a loop nothing can be handed
                see(layer, x)
            return call(*args, **kwargs)

        return stand_in

    def _see_norm(self, layer: Any, x: Any) -> None:
        """Note down how far the statistics of ``x`` are from the expected ones, in units of the expected deviation."""
        import tensorflow as tf

        x = tf.cast(x, tf.float32)
        axis = getattr(layer, "axis", -1) % len(x.shape)
        mean, variance = tf.nn.moments(x, [each for each in range(len(x.shape)) if each != axis])
        expected, spread = (tf.cast(one.value, tf.float32) for one in (layer.moving_mean, layer.moving_variance))
        deviation = tf.sqrt(tf.maximum(spread, 1e-10))
        ratio = tf.sqrt(tf.maximum(variance, 1e-10)) / deviation
        off = ((mean - expected) / deviation) ** 2 + (ratio - 1) ** 2
        # a dead channel has hardly any deviation to be measured in
        self.misfits.append(tf.reduce_mean(tf.minimum(off, 100.0)))

    def _see_table(self, layer: Any, x: Any) -> None:
        self.rows.append((x, int(layer.input_dim)))


def look(layers: Iterable[Any], nest: Any, run: Callable[[Tap], object]) -> tuple[Any, Any]:
    """What a run of the model tells of its inputs.

    Returns the misfit, its derivatives by the real inputs, by their places in the flat ``nest``, and the numbers of
    rows that are taken from tables, all as tensors; and how many normalizations there are, and rows in the tables.
    """
    import tensorflow as tf

    real = {place: x for place, x in enumerate(tf.nest.flatten(nest)) if _is_real(x)}
    norms, slopes, misfit = _Norms((), layers=layers), {}, None
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(list(real.values()))
        run(norms)
        if norms.misfits:
            misfit = tf.add_n(norms.misfits) / len(norms.misfits)
    if misfit is not None:
        try:
            slopes = tape.gradient(misfit, real)
        except LookupError:  # an operation without a derivative
            slopes = {}
    slopes = {place: tf.convert_to_tensor(by) for place, by in slopes.items() if by is not None}
    return (misfit, slopes, [x for x, _ in norms.rows]), (len(norms.misfits), [size for _, size in norms.rows])


def imitate(
    see: Callable[[Batch], tuple[Any, Any]], example: Batch, samples: int, seed: int
) -> tuple[list[Batch], str]:
    """Make up inputs of the shapes and types of ``example``.

    Parameters
    ----------
    see
        Returns what :func:`look` finds for a batch.
    example
        Only the shapes after the first axis, and the types, are used.
    samples
        How many to make.
    seed
        Of the noise.

    Returns
    -------
    list of Batch, str
        The inputs, and how they were made.
    """
    form = _Form(example)
    together = TOGETHER
    try:
        seen = see(form.batch(form.marks(together), together))
    except NotRunnableError:
        together = example.size  # some models take no other number
        seen = see(form.batch(form.marks(together), together))
    (_, slopes, rows), (norms, sizes) = seen
    tables = form.tables(form.marks(together), zip(rows, sizes, strict=True))
    generator = np.random.default_rng(seed)
    batches = []
    for start in range(0, samples, together):
        size = min(together, samples - start)
        leaves = form.noise(size, generator, tables)
        batches.append(form.batch(_shaped(leaves, form, size, see) if slopes else leaves, size))
    if slopes:
        return batches, f"noise, shaped in up to {STEPS} steps to the statistics of {norms} normalizations"
    if norms:
        return batches, "noise, since the model cannot be differentiated by its inputs"
    return batches, "noise, since the model has no normalization that remembers its data"


class _Form:
    """The shapes and types that inputs are to have, as a flat list."""

    def __init__(self, example: Batch) -> None:
        import tensorflow as tf

        self._nest = to_tensors((tuple(example.args), dict(example.kwargs)))
        self._size = example.size
        self._leaves = tf.nest.flatten(self._nest)

    def batch(self, leaves: list[Any], size: int) -> Batch:
        import tensorflow as tf

        args, kwargs = tf.nest.pack_sequence_as(self._nest, leaves)
        return Batch(args, kwargs, None, size)

    def marks(self, size: int) -> list[Any]:
        """Zeros and ones, which any table has rows for, in an order that differs from input to input."""

        def mark(place: int, shape: tuple[int, ...]) -> Any:
            return ((place + 1) >> np.arange(int(np.prod(shape))) % 16 & 1).reshape(shape)

        return self._filled(size, mark)

    def tables(self, marks: list[Any], rows: Iterable[tuple[Any, int]]) -> dict[int, int]:
        """The length of the table that an input chooses from, by its place."""
        found: dict[int, int] = {}
        for taken, size in rows:
            for place, mark in enumerate(marks):
                if getattr(mark, "size", 0) and np.array_equal(np.ravel(taken).astype(int), mark.ravel().astype(int)):
                    found[place] = min(size, found.get(place, size))
        return found

    def noise(self, size: int, generator: np.random.Generator, tables: dict[int, int]) -> list[Any]:
        """Numbers of rows where rows of a table are chosen, bytes of images, else ones for integers."""

        def fill(place: int, shape: tuple[int, ...]) -> Any:
            kind = self._leaves[place].dtype
            if place not in tables and kind.is_floating:
                return generator.normal(size=shape)
            ends = tables.get(place, 256 if kind == "uint8" else None)
            return np.ones(shape) if ends is None else generator.integers(0, ends, shape)

        return self._filled(size, fill)

    def _filled(self, size: int, fill: Callable[[int, tuple[int, ...]], Any]) -> list[Any]:
        filled = []
        for place, x in enumerate(self._leaves):
            if not _is_array(x):
                filled.append(x)
                continue
            shape = (size if x.shape[0] == self._size else x.shape[0], *x.shape[1:])
            is_number = x.dtype.is_floating or x.dtype.is_integer or x.dtype.is_bool
            kind = x.dtype.as_numpy_dtype
            filled.append(np.asarray(fill(place, shape)).astype(kind) if is_number else np.resize(x.numpy(), shape))
        return filled


def _is_array(x: Any) -> bool:
    return hasattr(x, "dtype") and hasattr(x, "shape") and len(x.shape) > 0


def _is_real(x: Any) -> bool:
    return _is_array(x) and bool(x.dtype.is_floating)


def _shaped(leaves: list[Any], form: _Form, size: int, see: Callable[[Batch], tuple[Any, Any]]) -> list[Any]:
    """The inputs with the real ones changed until each normalization sees what it expects."""
    real = [place for place, x in enumerate(leaves) if _is_array(x) and x.dtype.kind not in "iubOSU"]
    ends = np.cumsum([leaves[place].size for place in real])

    def filled(x: FloatArray) -> list[Any]:
        made = list(leaves)
        for place, part in zip(real, np.split(x, ends[:-1]), strict=True):
            made[place] = part.reshape(leaves[place].shape).astype(leaves[place].dtype)
        return made

    def off(x: FloatArray) -> tuple[float, FloatArray]:
        (misfit, slopes, _), _ = see(form.batch(filled(x), size))
        by = [np.ravel(slopes[place]) if place in slopes else np.zeros(leaves[place].size) for place in real]
        return float(misfit), np.concatenate(by).astype(np.float32)

    return filled(minimize(off, np.concatenate([leaves[place].ravel() for place in real]).astype(np.float32)))


def minimize(function: Callable[[FloatArray], tuple[float, FloatArray]], x: FloatArray) -> FloatArray:
    """Find where a function, given with its gradient, is small.

    L-BFGS with steps that are halved until they help: Nocedal and Wright, Numerical Optimization, 2nd edition,
    algorithms 7.4 and 3.1.
    """
    value, slope = function(x)
    pairs: deque[tuple[FloatArray, FloatArray]] = deque(maxlen=10)
    for _ in range(STEPS):
        # Without a known curvature, by a tenth of what is there.
        length = float(np.linalg.norm(slope))
        if not 0 < length < np.inf:
            break
        way = _turned(slope, pairs) if pairs else slope * (-0.1 * max(float(np.linalg.norm(x)), 1e-3) / length)
        for stride in 0.5 ** np.arange(8, dtype=np.float32):
            found, after = function(x + stride * way)
            if found <= value + 1e-4 * stride * float(way @ slope):
                break
        else:
            if not pairs:
                break
            pairs.clear()
            continue
        step, bend = stride * way, after - slope
        if float(step @ bend) > 1e-7 * float(np.linalg.norm(step) * np.linalg.norm(bend)):
            pairs.append((step, bend))
        x, value, slope = x + step, found, after
    return x


def _turned(slope: FloatArray, pairs: Iterable[tuple[FloatArray, FloatArray]]) -> FloatArray:
    """Where to go from a slope, given the last steps and what they changed of it."""
    way, pairs, shares = -slope, list(pairs), []
    for step, bend in reversed(pairs):
        shares.append(float(step @ way) / float(step @ bend))
        way = way - shares[-1] * bend
    step, bend = pairs[-1]
    way = way * (float(step @ bend) / float(bend @ bend))
    for (step, bend), share in zip(pairs, reversed(shares), strict=True):
        way = way + (share - float(bend @ way) / float(step @ bend)) * step
    return way
