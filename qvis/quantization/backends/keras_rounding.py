"""A model of steps with rounding in place: as it is trained, and as it is handed to the converter of TensorFlow Lite.

Rounding hands gradients on as if it were not there (Bengio et al., arXiv 1308.3432). The step of each kernel, or of
each of its channels, is learned beside the kernel (Esser et al., arXiv 1902.08153), as a logarithm, so that Adam moves
it by shares. The ranges of activations are those of calibration, then moving averages (Jacob et al., arXiv 1712.05877).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from qvis.layers import FloatArray
from qvis.quantization.backends.keras_floats import find_floats
from qvis.quantization.backends.keras_steps import Step, Steps, Weight
from qvis.quantization.grids import Scheme
from qvis.quantization.methods import FLOAT

BITS = 8
"""Of activations, and of kernels that have no width."""
SMALLEST = 2.0**-14
"""No channel's step is a smaller share of the largest one of its kernel; those of dead channels are this one."""
INT4 = 4
"""Up to so many bits, TensorFlow Lite holds two weights in a byte."""


UNKNOWN = np.array([0, 1], np.float32)
"""The range of what is always zero."""


class Rounded:
    """A model, its variables, and what it computes with rounding in place."""

    def __init__(self, model: Steps, bits: Mapping[str, int], granularity: str) -> None:
        import tensorflow as tf

        self.model = model
        weights = {id(step.weight): step.weight for step in model.steps if step.weight is not None}
        self.weights = weights
        self.widths = {key: bits.get(weight.name, BITS) for key, weight in weights.items()}
        self.floats = find_floats(model, {key for key, width in self.widths.items() if width == FLOAT})
        self.kernels = {key: tf.Variable(weight.kernel) for key, weight in weights.items()}
        self.scales = {
            key: tf.Variable(np.log(first_steps(weight, self.widths[key], granularity == "channel")))
            for key, weight in weights.items()
            if self.widths[key] != FLOAT
        }
        """Logarithms of the steps, (channels,) or (1,)."""
        self.biases = {id(step): tf.Variable(step.bias) for step in model.steps if step.bias is not None}
        self.variables = [*self.kernels.values(), *self.biases.values(), *self.scales.values()]
        self.places = {id(step): place for place, step in enumerate(model.steps)}
        self.ends = tf.Variable(np.tile(UNKNOWN, (len(model.steps), 1)), trainable=False)
        """The range of each step's result, (steps, 2)."""

    # -----------------------------------------------------------------------------------------------------------------
    # As it is trained

    def run(self, inputs: Sequence[Any], *, seed: Any = None, rounding: bool = True) -> tuple[dict[int, Any], Any]:
        """The result of each step, by its id, and the ranges that came up, (steps, 2).

        Parameters
        ----------
        inputs
            A tensor for each input, the samples along the first axis.
        seed
            With it, dropout is active, and this its state.
        rounding
            Whether anything is rounded.
        """
        import tensorflow as tf

        found = tf.unstack(self.ends)
        kernels = {key: self.kernel(key) if rounding else one for key, one in self.kernels.items()}

        def finish(y: Any, step: Step) -> Any:
            if step.kind != "mix" and step.limits is None:
                ends = [tf.minimum(tf.reduce_min(y), 0.0), tf.maximum(tf.reduce_max(y), 0.0)]
                found[self.places[id(step)]] = tf.stack(ends)
            return _fake(y, self.range_of(step, self.ends)) if rounding else y

        def drop(y: Any, step: Step) -> Any:
            return y if seed is None else step.run(y, tf.stack([seed, self.places[id(step)]]))

        made = self._follow(inputs, lambda step: (kernels[id(step.weight)], self.biases.get(id(step))), finish, drop)
        return made, tf.stack(found)

    def kernel(self, key: int) -> Any:
        """A kernel, rounded."""
        import tensorflow as tf

        if key not in self.scales:
            return self.kernels[key]
        most = float(2 ** (self.widths[key] - 1) - 1)
        axis = self.weights[key].axis
        along = [-1 if one == axis else 1 for one in range(self.weights[key].kernel.ndim)]
        step = tf.reshape(tf.exp(self.scales[key]), along)
        codes = tf.clip_by_value(self.kernels[key] / step, -most, most)
        return (codes + tf.stop_gradient(tf.round(codes) - codes)) * step

    def range_of(self, step: Step, ends: Any) -> tuple[Any, Any]:
        """The ends of the grid of a result."""
        while step.kind in ("mix", "keep", "dropout"):
            step = step.inputs[0]
        if step.limits is not None:
            return step.limits
        place = self.places[id(step)]
        return ends[place, 0], ends[place, 1]

    def set_ranges(self, ends: FloatArray) -> None:
        """Set the ranges of all results, (steps, 2). One without extent becomes 0 to 1."""
        ends = np.where(ends[:, 1:] - ends[:, :1] > 0, ends, UNKNOWN)
        self.ends.assign(ends.astype(np.float32))

    # -----------------------------------------------------------------------------------------------------------------
    # As it is converted

    def fixed(self) -> Callable[..., list[Any]]:
        """A function of the inputs for the converter, which holds all numbers as constants.

        That takes kernels for int4 or int8 by the bits it is told, and their ranges for 7 or 127 steps to either side:
        with just these the codes in the file are the very ones that were trained.
        """
        import tensorflow as tf

        ends = self.ends.numpy()
        kernels = {key: self.kernel(key).numpy() for key in self.kernels}
        steps = {key: np.exp(one.numpy()) for key, one in self.scales.items()}
        biases = {key: one.numpy() for key, one in self.biases.items()}
        uses = dict.fromkeys(steps, 0)

        def numbers(step: Step) -> tuple[Any, Any]:
            key, kernel = id(step.weight), tf.constant(kernels[id(step.weight)])
            if key in steps:
                bits = self.stored(key)
                # the converter makes one of what is rounded the same in two places, and then loses its range
                reach = steps[key] * np.float32((2 ** (bits - 1) - 1) * (1 + uses[key] * 2**-22))
                uses[key] += 1
                kernel = _fake_kernel(kernel, reach, bits)
            return kernel, biases.get(id(step))

        def finish(y: Any, step: Step) -> Any:
            low, high = (float(one) for one in self.range_of(step, ends))
            # what is rounded to its input's grid is so by the operation itself
            return y if step.kind == "mix" else _fake(y, (low, high))

        def forward(*inputs: Any) -> list[Any]:
            made = self._follow(inputs, numbers, finish, lambda y, _: y, scope=tf.name_scope)
            return [made[id(one)] for one in self.model.outputs]

        return forward

    def stored(self, key: int) -> int:
        """With how many bits the file holds each weight of a kernel."""
        return next(bits for bits in (INT4, BITS, FLOAT) if self.widths[key] <= bits)

    # -----------------------------------------------------------------------------------------------------------------

    def _follow(
        self,
        inputs: Sequence[Any],
        numbers: Callable[[Step], tuple[Any, Any]],
        finish: Callable[[Any, Step], Any],
        drop: Callable[[Any, Step], Any],
        scope: Callable[[str], Any] = nullcontext,
    ) -> dict[int, Any]:
        """Take one step after the other; returns the result of each."""
        from qvis.quantization.backends.keras_operations import elu

        made: dict[int, Any] = {}
        given = iter(inputs)
        for step in self.model.steps:
            values = [made[id(one)] for one in step.inputs]
            with scope(_title(step)):
                if step.kind == "input":
                    y = next(given)
                elif step.kind == "dropout":
                    y = drop(values[0], step)
                elif step.kind == "linear":
                    x = elu(values[0]) if id(step) in self.floats.behind else values[0]
                    y = step.run(x, *numbers(step), step.after)
                    y = elu(y) if id(step) in self.floats.before else y
                else:
                    y = step.after(step.run(*values))
                if step.kind not in ("keep", "dropout") and id(step) not in self.floats.unrounded:
                    y = finish(y, step)
            made[id(step)] = y
        return made


def first_steps(weight: Weight, bits: int, by_channel: bool) -> FloatArray:
    """The steps to begin with, (channels,) or (1,): all weights fit at 8 bits; below, what leaves the least noise."""
    matrix = np.moveaxis(weight.kernel, weight.axis, 0).reshape(weight.kernel.shape[weight.axis], -1)
    granularity = "channel" if by_channel and weight.by_channel else "tensor"
    scheme = Scheme("uniform", bits, granularity, range="minmax" if bits == BITS else "mse")
    steps = scheme.fit(matrix).scale.reshape(-1)
    alive = matrix.any(axis=1) if len(steps) > 1 else np.ones(1, np.bool_)
    # a bias is held in multiples of the step, and 32 bits have to do for it
    least = steps[alive].max(initial=0) * SMALLEST or 1.0
    return np.where(alive, np.maximum(steps, least), least).astype(np.float32)


def _fake(y: Any, ends: tuple[Any, Any]) -> Any:
    import tensorflow as tf

    return tf.quantization.fake_quant_with_min_max_vars(y, *ends, num_bits=BITS)


def _fake_kernel(kernel: Any, reach: FloatArray, bits: int) -> Any:
    import tensorflow as tf

    if reach.size == 1:
        low, high = -float(reach[0]), float(reach[0])
        return tf.quantization.fake_quant_with_min_max_vars(kernel, low, high, num_bits=bits, narrow_range=True)
    return tf.quantization.fake_quant_with_min_max_vars_per_channel(
        kernel, -reach, reach, num_bits=bits, narrow_range=True
    )


def _title(step: Step) -> str:
    """The scope that operations are named in, after which the file's layers are called."""
    name = step.weight.name if step.weight is not None and step.weight.name else step.name
    return "".join(one if one.isalnum() or one in "_.-/" else "_" for one in name).lstrip("_./-") or "step"
