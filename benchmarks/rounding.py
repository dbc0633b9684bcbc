"""Rounds the weights of models of PyTorch and Keras, and what enters their layers, and runs them.

It shares no code with qvis, whose results it judges, and is run in AIMET's environment as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
PER_RUN = 256
"""Samples that are run together."""


class Setting(NamedTuple):
    """What is rounded, on which grids."""

    bits: int
    granularity: str = "tensor"
    """``tensor`` or ``channel``: what shares a step of the weights. Inputs of layers have one grid per tensor."""
    inputs: bool = False
    """Whether what enters the layers is rounded as well, to 8 bits."""


class TorchModel:
    """A module whose convolutions and Linear layers can be rounded."""

    def __init__(self, model: Any) -> None:
        import torch

        kinds = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Linear)
        self.model = model.eval()
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
        self.weights = {name: (module.weight.detach().numpy().copy(), (0,)) for name, module in self.layers.items()}

    def assign(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Write weights into the model."""
        import torch

        with torch.no_grad():
            for name, weight in weights.items():
                self.layers[name].weight.copy_(torch.from_numpy(np.asarray(weight)))

    def run(self, inputs: Any) -> Floats:
        """The outputs (samples, values)."""
        import torch

        with torch.no_grad():
            if isinstance(inputs, dict):
                outputs = self.model(**{name: torch.from_numpy(one) for name, one in inputs.items()})
            else:
                outputs = self.model(torch.from_numpy(inputs))
        return np.asarray(outputs.flatten(1).double())

    def ranges(self, inputs: Any) -> dict[str, tuple[float, float]]:
        """The smallest and the largest value that enters each layer, and 0."""
        found: dict[str, tuple[float, float]] = {}

        def note(name: str, _: Any, given: Any) -> None:
            low, high = found.get(name, (0.0, 0.0))
            found[name] = min(low, float(given[0].min())), max(high, float(given[0].max()))

        with self._hooked(note, self.layers):
            self.run(inputs)
        return found

    @contextmanager
    def rounding_inputs(self, ranges: Mapping[str, tuple[float, float]]) -> Iterator[None]:
        """Round what enters the layers to 8 bits while this lasts."""

        def round_inputs(name: str, _: Any, given: Any) -> Any:
            low, high = ranges[name]
            step = (high - low) / 255 or 1.0
            zero = round(-low / step)
            return (((given[0] / step).round() + zero).clamp(0, 255) - zero) * step, *given[1:]

        with self._hooked(round_inputs, ranges):
            yield

    @contextmanager
    def _hooked(self, hook: Any, names: Any) -> Iterator[None]:
        handles = [self.layers[name].register_forward_pre_hook(partial(hook, name)) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class KerasModel:
    """A Keras model whose kernels can be rounded; what enters its layers is left alone."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.kernels, self.weights = {}, {}
        for layer in model.layers:
            for kind in ("kernel", "depthwise_kernel", "pointwise_kernel"):
                kernel = getattr(layer, kind, None)
                if kernel is not None:
                    name = f"{layer.name}.{kind}"
                    depthwise = kind == "depthwise_kernel" or "depthwise" in type(layer).__name__.lower()
                    self.kernels[name] = kernel
                    self.weights[name] = np.array(kernel), (2, 3) if depthwise else (len(kernel.shape) - 1,)

    def assign(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Write weights into the model."""
        for name, weight in weights.items():
            self.kernels[name].assign(weight)

    def run(self, inputs: Any) -> Floats:
        """The outputs (samples, values)."""
        return np.asarray(self.model(inputs, training=False), np.float64).reshape(len(inputs), -1)


def wrap(model: Any) -> Any:
    """The model with what is needed to round it."""
    return TorchModel(model) if hasattr(model, "named_modules") else KerasModel(model)


def rounded(weight: NDArray[Any], kept: Sequence[int], setting: Setting, stretch: float) -> NDArray[Any]:
    """The weight on a symmetric grid of ``2^bits - 1`` values, with a step ``stretch`` times as large as it need be.

    ``kept`` are the axes of its output channels.
    """
    others = tuple(axis for axis in range(weight.ndim) if axis not in kept)
    largest = np.abs(weight).max(axis=others if setting.granularity == "channel" else None, keepdims=True)
    step = stretch * np.where(largest > 0, largest, 1).astype(np.float64) / (2 ** (setting.bits - 1) - 1)
    return (np.rint(weight / step) * step).astype(weight.dtype)


def draw_all(
    model: Any, setting: Setting, draws: Sequence[Mapping[str, float]], inputs: Any, ranges: Any = None
) -> Floats:
    """The outputs (draws, samples, values) of a wrapped model with all its weights rounded, once for each draw.

    A draw is by how much the step of each layer is stretched.
    """
    found = []
    for draw in draws:
        model.assign({name: rounded(one, kept, setting, draw[name]) for name, (one, kept) in model.weights.items()})
        if setting.inputs:
            with model.rounding_inputs(ranges):
                found.append(run_all(model, inputs))
        else:
            found.append(run_all(model, inputs))
    model.assign({name: one for name, (one, _) in model.weights.items()})
    return np.stack(found)


def run_all(model: Any, inputs: Any) -> Floats:
    """The outputs of a wrapped model, (samples, values)."""
    total = count(inputs)
    return np.concatenate([model.run(part(inputs, at, at + PER_RUN)) for at in range(0, total, PER_RUN)])


def part(inputs: Any, start: int, stop: int) -> Any:
    """Some of the samples of an array, or of a dictionary of them."""
    if isinstance(inputs, dict):
        return {name: one[start:stop] for name, one in inputs.items()}
    return inputs[start:stop]


def count(inputs: Any) -> int:
    """How many samples there are."""
    return len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)
