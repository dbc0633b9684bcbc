"""Differentiates an ONNX graph by computing it with PyTorch, operator by operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qvis.adapters.encodings import Array
from qvis.adapters.onnx.losses import Loss
from qvis.adapters.onnx.prepared import Prepared, Use
from qvis.adapters.onnx.torch_ops import OPERATORS
from qvis.errors import NotRunnableError
from qvis.layers import FloatArray
from qvis.running import Batch, Gradient, Probe

Entering = Callable[[str, list["Tensor | None"]], None]
"""Given the name of a node's first result and its inputs, which it may replace."""


@dataclass
class _Step:
    """A node to compute."""

    function: Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass
class Differentiator:
    """A graph that PyTorch can compute, if none of its operators is missing."""

    prepared: Prepared
    uses: Sequence[Use]
    layers: Sequence[str]
    missing: list[str] = field(default_factory=list)
    """Operators that there is no rule for."""

    def __post_init__(self) -> None:
        self._steps: list[_Step] = []
        for node in self.prepared.model.graph.node:
            domain = "" if node.domain == "ai.onnx" else node.domain
            function = OPERATORS.get(domain, {}).get(node.op_type)
            if function is None:
                self.missing.append(node.op_type)
                continue
            attributes = {one.name: _attribute(one) for one in node.attribute}
            attributes["opset"] = self.prepared.opset(domain)
            attributes["results"] = len(node.output)
            self._steps.append(_Step(function, tuple(node.input), tuple(node.output), attributes))
        self.missing = list(dict.fromkeys(self.missing))

    def forward(self, inputs: Mapping[str, Array], tensors: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
        """The named values, computed without derivatives."""
        with torch.no_grad():
            values = self._compute(inputs, self._constants(tensors), names)
        return [_numpy(one) for one in values]

    def differentiate(
        self,
        parts: Sequence[Mapping[str, Array]],
        size: int,
        batch: Batch,
        tensors: Mapping[str, Array],
        names: Sequence[str],
        probe: Probe,
        loss: Loss | None,
    ) -> Iterator[Gradient]:
        """See :meth:`qvis.running.Runner.differentiate`; ``parts`` of ``size`` samples are run one after another."""
        constants = self._constants(tensors)
        leaves = {self.prepared.layers[name].tensor: None for name in self.layers}
        weights = {name: constants[name].clone().requires_grad_() for name in leaves}
        entered: dict[str, list[tuple[Tensor, int]]] = {}
        by_node: dict[str, list[Use]] = {}
        for use in self.uses:
            if use.watched and use.data is not None:
                by_node.setdefault(use.node, []).append(use)

        def entering(node: str, given: list[Tensor | None]) -> None:
            for use in by_node.get(node, ()):
                x = given[use.data or 0]
                assert x is not None
                # a copy, so that the derivative by it is of this use alone
                x = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
                given[use.data or 0] = x
                entered.setdefault(use.layer, []).append((x, use.axis))

        with torch.enable_grad():
            found = [self._compute(inputs, {**constants, **weights}, names, entering) for inputs in parts]
            outputs = [_join(one, size, batch.size) for one in zip(*found, strict=True)]
            outputs = outputs if loss is None else [loss.differentiable(outputs, batch)]
            factors = probe([_numpy(one) for one in outputs])
            alive = [(one, factor) for one, factor in zip(outputs, factors, strict=True) if one.requires_grad]
            if not alive:
                raise NotRunnableError("model: no output depends on a weight by way of differentiable operators")
            used = [x for calls in entered.values() for x, _ in calls]
            gradients = torch.autograd.grad(
                [one for one, _ in alive],
                [*weights.values(), *used],
                [torch.as_tensor(np.asarray(factor), dtype=one.dtype) for one, factor in alive],
                allow_unused=True,
            )
        by_weight = dict(zip(weights, gradients, strict=False))
        by_input = dict(zip(map(id, used), gradients[len(weights) :], strict=True))
        for name in self.layers:
            held = self.prepared.layers[name]
            gradient = by_weight[held.tensor]
            whole = np.zeros(constants[held.tensor].shape, np.float32) if gradient is None else _numpy(gradient)
            calls = [(x, by_input[id(x)], axis) for x, axis in entered.get(name, ())]
            pairs = tuple((_numpy(x), _numpy(g)) for x, g, _ in calls if g is not None)
            yield Gradient(name, held.take(whole), pairs, calls[0][2] if calls else -1)

    def _constants(self, tensors: Mapping[str, Array]) -> dict[str, Tensor]:
        constants = self.prepared.constants
        return {name: _tensor(tensors[name] if name in tensors else self.prepared.read(name)) for name in constants}

    def _compute(
        self,
        inputs: Mapping[str, Array],
        constants: Mapping[str, Tensor],
        names: Sequence[str],
        entering: Entering | None = None,
    ) -> list[Tensor]:
        values: dict[str, Tensor] = {**constants, **{name: _tensor(array) for name, array in inputs.items()}}
        for step in self._steps:
            given = [values[name] if name else None for name in step.inputs]
            if entering is not None:
                entering(next(filter(None, step.outputs), ""), given)
            results = step.function(step.attributes, *given)
            results = results if isinstance(results, (tuple, list)) else (results,)
            values.update((name, one) for name, one in zip(step.outputs, results, strict=False) if name)
        return [values[name] for name in names]


def _attribute(proto: Any) -> Any:
    import onnx

    value = onnx.helper.get_attribute_value(proto)
    if isinstance(value, onnx.TensorProto):
        return _tensor(onnx.numpy_helper.to_array(value))
    return value.decode() if isinstance(value, bytes) else value


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.array(array, order="C"))


def _numpy(tensor: Tensor) -> FloatArray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.float16 else tensor).numpy()


def _join(parts: Sequence[Tensor], each: int, size: int) -> Tensor:
    """As :func:`qvis.adapters.onnx.runner.join` does with arrays."""
    if len(parts) == 1:
        return parts[0]
    joined = torch.cat(list(parts)) if parts[0].ndim and len(parts[0]) == each else torch.stack(list(parts))
    return joined[:size]
