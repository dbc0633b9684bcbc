"""The table of all layers that qvis has a rule for, made by asking the rules themselves. Needs no framework."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from qvis.adapters import read
from qvis.adapters.keras import parts as keras
from qvis.adapters.matrices import Part
from qvis.adapters.onnx import parts as onnx
from qvis.adapters.tflite import parts as tflite
from qvis.adapters.torch import parts as torch
from qvis.adapters.values import Tensor, Value


class Row(NamedTuple):
    """One line of the table."""

    framework: str
    layer: str
    weight: str
    channels: str


def rows() -> Iterator[Row]:
    """The rows of all frameworks; what differs only in the name of the layer, or of the weight, shares one."""
    layers: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in (*_torch(), *_keras(), *_onnx(), *_tflite(), *_checkpoints()):
        layers.setdefault((row.framework, row.layer), {}).setdefault(row.channels, []).append(row.weight)
    for (framework, weights), alike in groupby(layers, lambda key: (key[0], layers[key])):
        names = ", ".join(layer for _, layer in alike)
        for channels, held in weights.items():
            yield Row(framework, names, ", ".join(held).replace(", input ", ", "), channels)


def _literal(name: str) -> str:
    return f"``{name}``"


def _in_parts(channels: str, labels: Iterable[str]) -> str:
    """``axis 0, part 1 of 3`` and its like, for all the matrices in one tensor."""
    return f"{channels.partition(',')[0]}, in parts: {', '.join(labels)}"


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch

TORCH_WEIGHTS = {
    "MultiheadAttention": ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    "RNN": ("weight_ih_l0", "weight_hh_l0"),
    "GRU": ("weight_ih_l0", "weight_hh_l0"),
    "LSTM": ("weight_ih_l0", "weight_hh_l0", "weight_hr_l0"),
    "RNNCell": ("weight_ih", "weight_hh"),
    "GRUCell": ("weight_ih", "weight_hh"),
    "LSTMCell": ("weight_ih", "weight_hh"),
}
"""The weights of layers that have others than ``weight``."""


def _torch() -> Iterator[Row]:
    for op, rule in torch.RULES.items():
        for name in TORCH_WEIGHTS.get(op, ("weight",)):
            found = rule(op, name, 1) or []
            grouped = rule(op, name, 2) or []
            if not found or not grouped:
                raise ValueError(f"the rule of {op} knows no {name}; see TORCH_WEIGHTS in {Path(__file__).name}")
            channels = found[0].channels
            if grouped[0].channels != channels:
                channels += f"; {grouped[0].channels} when grouped"
            labels = [part.label for part in found if part.label]
            yield Row("PyTorch", _literal(op), _literal(name), _in_parts(channels, labels) if labels else channels)


# ---------------------------------------------------------------------------------------------------------------------
# Keras

EQUATION = "abc,cde->abde"
"""An example for EinsumDense."""


def _keras() -> Iterator[Row]:
    for op, variables in keras.RULES.items():
        for name, rule in variables.items():
            equation = {"equation": EQUATION} if rule.kind == "equation" else {}
            axes = rule.axes or (3 if equation else 4)
            found = keras.weights(op, equation, name, (12,) * axes)
            if not found or found[0].op != op:
                raise ValueError(f"the rule of {op} does not know its own {name}")
            channels = found[0].channels
            if len(found) > 1:
                channels = _in_parts(channels, [part.label.rpartition("/")[2] for part in found])
            if equation:
                channels += f" for {_literal(EQUATION)}"
            yield Row("Keras", _literal(op), _literal(name), channels)


# ---------------------------------------------------------------------------------------------------------------------
# Graphs: the rule of an operator is shown constants as its inputs until it finds a weight among them

Inputs = list["Value | None"]

INPUTS = 40
"""More than any operator has."""
ATTRIBUTES = {
    "Einsum": {"equation": SimpleNamespace(s=b"abc,cde->abde")},
    "MatMulNBits": {name: SimpleNamespace(i=size) for name, size in (("N", 1), ("K", 16), ("block_size", 16))},
}
"""What an operator cannot do without."""
VARIANTS = (("group", 2, "when grouped"), ("transB", 1, "where it has ``transB``"))
"""Attributes that move the output channels."""


def _constant(index: int, shape: tuple[int, ...], kind: str = "float32") -> Value:
    return Value.of(Tensor("", shape, kind, lambda: np.zeros(shape)), index)


def _examples() -> Iterator[Inputs]:
    """Inputs of which some are constant: a weight behind what flows through the graph, or before it."""
    for axes in (2, 3, 4, 5):
        shape = (1, *(12,) * (axes - 1)) if axes == 3 else (12,) * axes
        yield [None, *(_constant(index, shape) for index in range(1, INPUTS))]
        yield [None, _constant(1, shape)]
        yield [_constant(0, shape)]
        for weights in ((1, 2), (1,), (3,)):  # of integers, with a scale for the whole
            yield [
                _constant(index, shape, "int8") if index in weights else _constant(index, ()) for index in range(INPUTS)
            ]
    yield [None, _constant(1, (1, 1, 8), "uint8"), _constant(2, ())]


def _described(
    operator: str, ask: Callable[..., Iterable[Part]], variants: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """The inputs that are weights and where their channels are, also with each of some attributes."""
    inputs = next((one for one in _examples() if list(ask(one))), None)
    if inputs is None:
        raise ValueError(f"no example shows what the rule of {operator} does; see _examples in {Path(__file__).name}")
    found = _weights(ask(inputs))
    others = {words: _weights(ask(inputs, variant)) for words, variant in variants.items()}
    for weight, channels in found.items():
        moved = [f"{two[weight]} {words}" for words, two in others.items() if two.get(weight, channels) != channels]
        yield weight, "; ".join((channels, *moved))


def _weights(found: Iterable[Part]) -> dict[str, str]:
    weights = {}
    for index, alike in groupby(found, lambda part: part.value.key):
        parts = list(alike)
        labels = [part.label.rpartition(".")[2] for part in parts]
        weights[f"input {index}"] = _in_parts(parts[0].channels, labels) if len(parts) > 1 else parts[0].channels
    return weights


def _onnx() -> Iterator[Row]:
    for domain in ("", "com.microsoft"):
        for op, rule in onnx.RULES[domain].items():

            def ask(inputs: Inputs, more: Mapping[str, Any] = {}, op: str = op, rule: Any = rule) -> Iterable[Part]:
                return rule(onnx.Node(op, "", "", (), (), {**ATTRIBUTES.get(op, {}), **more}), inputs)

            variants = {words: {attribute: SimpleNamespace(i=value)} for attribute, value, words in VARIANTS}
            for weight, channels in _described(op, ask, variants):
                equation = f" for {_literal(EQUATION)}" if op == "Einsum" else ""
                framework = f"ONNX ({domain})" if domain else "ONNX"
                yield Row(framework, _literal(op), weight, channels + equation)


def _tflite() -> Iterator[Row]:
    turned = SimpleNamespace(number=lambda field, *_: int(field == 1))
    for op, rule in tflite.RULES.items():

        def ask(inputs: Inputs, options: Any = None, op: str = op, rule: Any = rule) -> Iterable[Part]:
            return rule(tflite.Operator(op, (), (), options), inputs)

        for weight, channels in _described(op, ask, {"where it has ``adj_y``": turned}):
            yield Row("TensorFlow Lite", _literal(op), weight, channels)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: an example of each convention is written to a file, and read


def _checkpoints() -> Iterator[Row]:
    packed = {"qzeros": np.full((1, 2), 0x77777777, "<i4"), "scales": np.ones((1, 16), "<f2")}
    tensors = {
        "fc.weight": np.ones((6, 4), "<f4"),
        "conv.weight": np.ones((6, 4, 3, 3), "<f4"),
        "dense.kernel": np.ones((4, 6), "<f4"),
        "conv2d.kernel": np.ones((3, 3, 4, 6), "<f4"),
        "attention.in_proj_weight": np.ones((12, 4), "<f4"),
        "lstm.weight_ih_l0": np.ones((16, 3), "<f4"),
        "lstm.weight_hh_l0": np.ones((16, 4), "<f4"),
        "gru.weight_ih_l0": np.ones((12, 3), "<f4"),
        "gru.weight_hh_l0": np.ones((12, 4), "<f4"),
        "gptq.qweight": np.zeros((4, 16), "<i4"),
        "awq.qweight": np.zeros((32, 2), "<i4"),
        **{f"{owner}.{name}": array for owner in ("gptq", "awq") for name, array in packed.items()},
    }
    with TemporaryDirectory() as folder:
        path = Path(folder, "example.npz")
        np.savez(path, **tensors)  # type: ignore[arg-type]
        layers = {layer.name: layer for layer in read(path).layers}
    for name, array in tensors.items():
        of_tensor = [
            layer for known, layer in layers.items() if f"{known}.".startswith(f"{name.removesuffix('.weight')}.")
        ]
        if name.endswith(".qweight"):
            of_tensor = [layers[name.removesuffix(".qweight")]]
        if not of_tensor:  # a scale or the like
            continue
        channels = of_tensor[0].channels
        if len(of_tensor) > 1:
            channels = _in_parts(channels, [layer.name.rpartition(".")[2] for layer in of_tensor])
        shape = " x ".join(map(str, array.shape))
        yield Row("Checkpoint", of_tensor[0].op, f"{_literal(name)} ({shape})", channels)
