"""Which variables of a Keras layer are weights, and where their output channels are: one rule for each type of layer.

The rules serve models in memory and files alike, so that they take arrays and plain values, and import no framework.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np

from qvis.layers import FloatArray

Config = Mapping[str, Any]
"""What a rule must know of a layer beside its type: its configuration, or as much of it as there is."""


def take(weight: FloatArray, axes: Sequence[int]) -> FloatArray:
    """``weight`` with the given axes merged into rows, in their order, and all others into columns."""
    rest = [axis for axis in range(weight.ndim) if axis not in axes]
    rows = prod(weight.shape[axis] for axis in axes)
    matrix: FloatArray = weight.transpose([*axes, *rest]).reshape(rows, prod(weight.shape[axis] for axis in rest))
    return matrix


def gate(weight: FloatArray, index: int, count: int) -> FloatArray:
    """``weight (..., count * out) -> (out, elements)``: one of the matrices that stand beside one another."""
    size = weight.shape[-1] // count
    return take(weight[..., index * size : (index + 1) * size], [weight.ndim - 1])


class Part(NamedTuple):
    """A matrix inside one of a layer's variables."""

    op: str
    shape: tuple[int, ...]
    """The variable's own shape; of one matrix among several, that matrix's."""
    view: Callable[[FloatArray], FloatArray]
    """Makes the (channels, elements) matrix of the array."""
    channels: str
    """The same in words."""
    label: str = ""
    """What follows the name of the layer."""
    note: str = ""


class _Rule(NamedTuple):
    """Where the output channels of a variable are."""

    kind: str
    """``last``, ``first``, ``swapped``, ``depthwise``, ``equation``, or the letters of the gates."""
    axes: int | None = None
    """How many axes the variable has, None for any number from 2 on."""


_LSTM, _GRU = "ifco", "zrh"
_SPATIAL = (1, 2, 3)

RULES: dict[str, dict[str, _Rule]] = {
    "Dense": {"kernel": _Rule("last", 2)},
    "EinsumDense": {"kernel": _Rule("equation")},
    **{f"Conv{n}D": {"kernel": _Rule("last", n + 2)} for n in _SPATIAL},
    **{f"Conv{n}DTranspose": {"kernel": _Rule("swapped", n + 2)} for n in _SPATIAL},
    **{f"DepthwiseConv{n}D": {"kernel": _Rule("depthwise", n + 2)} for n in (1, 2)},
    **{
        f"SeparableConv{n}D": {"depthwise_kernel": _Rule("depthwise", n + 2), "pointwise_kernel": _Rule("last", n + 2)}
        for n in (1, 2)
    },
    "Embedding": {"embeddings": _Rule("first", 2)},
    "ReversibleEmbedding": {"embeddings": _Rule("first", 2), "reverse_embeddings": _Rule("last", 2)},
    **{
        name: {"kernel": _Rule(gates, axes), "recurrent_kernel": _Rule(gates, axes)}
        for names, gates, axes in (
            (("LSTM", "LSTMCell", "CuDNNLSTM"), _LSTM, 2),
            (("GRU", "GRUCell", "CuDNNGRU"), _GRU, 2),
            (("SimpleRNN", "SimpleRNNCell"), "last", 2),
            (("ConvLSTM1D",), _LSTM, 3),
            (("ConvLSTM2D",), _LSTM, 4),
            (("ConvLSTM3D",), _LSTM, 5),
            (("ConvLSTMCell",), _LSTM, None),
        )
        for name in names
    },
}
"""The weights of each type of layer by the names of their variables, in the order in which a file numbers them."""

_OWN_NAME = {"kernel", "embeddings"}
_KEPT = re.compile(
    r"bias|bias_\w+|\w+_scale|\w+_zero|g_idx|lora_\w+|\w+_amax_history\w*|\w+_quantizer\w*|inputs_\w+|outputs_\w+"
)
"""Variables of the layers above that are no matrices, whatever their shape."""
_STATE = {"moving_mean", "moving_variance", "mean", "variance", "count", "vector_u", "sn_u", "seed_generator_state"}
"""Variables that training does not learn but keeps."""
_PROJECTIONS = {"query": 1, "key": 1, "value": 1, "query_dense": 1, "key_dense": 1, "value_dense": 1}
_PROJECTIONS |= {"gate": 1, "gate_dense": 1, "output_dense": 2, "attention_output": 2}
"""The dense layers inside an attention layer, and how many leading axes of their kernels are summed over."""


def weights(op: str, config: Config, variable: str, shape: tuple[int, ...]) -> list[Part]:
    """The matrices in one variable of a layer; none where it is a bias or the like."""
    rule = RULES.get(op, {}).get(_rename(op, variable))
    if rule is not None and (rule.axes is None or rule.axes == len(shape)) and len(shape) >= 2:
        return _ruled(op, config, variable, shape, rule)
    if len(shape) < 2 or is_state(variable) or (op in RULES and _KEPT.fullmatch(variable)):
        return []
    return [_whole("other", shape, [len(shape) - 1], variable)]


def is_state(variable: str) -> bool:
    """Whether it is a variable that is kept, but not learned."""
    return variable in _STATE or variable.endswith(("_scale", "_zero"))


def _rename(op: str, variable: str) -> str:
    """Keras 2 calls the kernel of a depthwise convolution by its full name."""
    return "kernel" if op.startswith("Depthwise") and variable == "depthwise_kernel" else variable


def _ruled(op: str, config: Config, variable: str, shape: tuple[int, ...], rule: _Rule) -> list[Part]:
    label = "" if _rename(op, variable) in _OWN_NAME and _has_one_weight(op) else variable
    last = len(shape) - 1
    if rule.kind == "equation":
        axes = kernel_axes(config, len(shape))
        if axes is None:
            note = "the file does not say which axes are the outputs: taken to be the last one"
            return [_whole(op, shape, [last], label, note)]
        return [_whole(op, shape, axes, label)]
    whole = {"last": [last], "first": [0], "swapped": [last - 1], "depthwise": [last - 1, last]}.get(rule.kind)
    if whole is not None:
        return [_whole(op, shape, whole, label)]
    count = len(rule.kind)
    if shape[-1] % count:
        return [_whole("other", shape, [last], variable)]
    part = (*shape[:-1], shape[-1] // count)
    return [
        Part(
            op,
            part,
            partial(gate, index=index, count=count),
            f"axis {last}, part {index + 1} of {count}",
            f"{label}/{letter}",
        )
        for index, letter in enumerate(rule.kind)
    ]


def _has_one_weight(op: str) -> bool:
    return len(RULES[op]) == 1


def _whole(op: str, shape: tuple[int, ...], axes: list[int], label: str, note: str = "") -> Part:
    words = f"axis {axes[0]}" if len(axes) == 1 else f"axes {' x '.join(map(str, axes))}"
    return Part(op, shape, partial(take, axes=axes), words, label, note)


def kernel_axes(config: Config, axes: int) -> list[int] | None:
    """The axes of an EinsumDense kernel that reach the output: all that its equation does not sum over.

    >>> kernel_axes({"equation": "abc,cde->abde"}, 3)
    [1, 2]
    """
    operands = re.fullmatch(r"[^,]*,([a-zA-Z]+)->(.*)", str(config.get("equation", "")).replace(" ", ""))
    if operands is not None and len(operands[1]) == axes:
        found = [index for index, letter in enumerate(operands[1]) if letter in operands[2]]
        return found or None
    summed = config.get("summed")
    return list(range(summed, axes)) if isinstance(summed, int) and summed < axes else None


def bias(
    op: str, config: Config, variable: str, shape: tuple[int, ...], part: Part, given: tuple[int, ...]
) -> Callable[[FloatArray], FloatArray] | None:
    """How a layer's bias, of shape ``given``, becomes (channels,) of one of its weights; None where it is not known."""
    rule = RULES.get(op, {}).get(_rename(op, variable))
    if rule is None or variable in ("recurrent_kernel", "embeddings", "reverse_embeddings"):
        return None
    if op.startswith("Separable") and variable == "depthwise_kernel":
        return None  # it is added after the second kernel
    if rule.kind == "equation":
        return _einsum_bias(config, shape, given)
    if rule.kind == "depthwise":
        return np.ravel if given == (shape[-2] * shape[-1],) else None
    if rule.kind in ("last", "first", "swapped"):
        return np.ravel if given == (shape[-2 if rule.kind == "swapped" else -1],) else None
    if given[-1:] != shape[-1:]:
        return None
    index, size = rule.kind.index(part.label[-1]), part.shape[-1]
    # A GRU may have a second row, for its recurrent kernel.
    return lambda array: array.reshape(-1, shape[-1])[0, index * size : (index + 1) * size]


def _einsum_bias(
    config: Config, shape: tuple[int, ...], given: tuple[int, ...]
) -> Callable[[FloatArray], FloatArray] | None:
    """The bias of an EinsumDense, whose axes are the last of its output, in the order of its channels."""
    operands = re.fullmatch(r"[^,]*,([a-zA-Z]+)->(.*)", str(config.get("equation", "")).replace(" ", ""))
    axes = kernel_axes(config, len(shape))
    if axes is None:
        return None
    sizes = [shape[axis] for axis in axes]
    if operands is None:
        return np.ravel if list(given) == sizes else None
    letters = [operands[1][axis] for axis in axes]
    held = dict(zip(reversed(operands[2].replace(".", "")), reversed(given), strict=False))
    if any(size != 1 and letter not in letters for letter, size in held.items()):
        return None  # it differs from place to place
    kept = [letter for letter in held if letter in letters][::-1]

    def view(array: FloatArray) -> FloatArray:
        array = array.reshape([held[letter] for letter in kept])
        array = array.transpose([kept.index(letter) for letter in letters if letter in kept])
        array = array.reshape([held.get(letter, 1) for letter in letters])
        return np.broadcast_to(array, sizes).ravel()

    return view


def projection(name: str) -> Config | None:
    """What is known of a dense layer inside an attention layer by its name."""
    summed = _PROJECTIONS.get(name.lstrip("_"))
    return None if summed is None else {"summed": summed}


def position(name: str) -> int:
    """Where a layer stands among those inside an attention layer."""
    name = name.lstrip("_")
    return list(_PROJECTIONS).index(name) if name in _PROJECTIONS else -1


def variable_names(op: str, config: Config, count: int) -> list[str]:
    """The names of a layer's variables where a file only numbers them: first the weights, then what else there is."""
    names: list[str] = []
    if op in RULES:
        names = list(RULES[op])
        if op == "ReversibleEmbedding" and config.get("tie_weights", True):
            names = names[:1]
        if config.get("use_bias", True) and config.get("bias_axes", "") is not None and "Embedding" not in op:
            names.append("bias")
        if quantization(config) == "int8":
            names += [f"{name}_scale" for name in names if name != "bias"]
        names += [f"bias_{index}" for index in range(len(names), count)]
    elif op in ("BatchNormalization", "SyncBatchNormalization"):
        names = [name for name, key in (("gamma", "scale"), ("beta", "center")) if config.get(key, True)]
        names += ["moving_mean", "moving_variance"]
    elif op == "Normalization":
        names = ["mean", "variance", "count"]
    return [*names, *map(str, range(len(names), count))][:count]


def quantization(config: Config) -> str | None:
    """How a layer was quantized by ``quantize()`` of Keras, such as ``int8``; None where it was not."""
    policy = config.get("dtype")
    inner = policy.get("config") if isinstance(policy, Mapping) else None
    mode = inner.get("mode") if isinstance(inner, Mapping) else None
    return mode if isinstance(mode, str) else None


def snake(name: str) -> str:
    """The name that Keras makes of a class.

    >>> snake("DepthwiseConv2D"), snake("ConvLSTM2D"), snake("LSTM")
    ('depthwise_conv2d', 'conv_lstm2d', 'lstm')
    """
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


_BY_SNAKE = {snake(op): op for op in (*RULES, "BatchNormalization", "SyncBatchNormalization", "Normalization")}


def type_named(name: str) -> str | None:
    """The type of a layer that bears the name Keras gave it, such as ``conv2d_3`` or ``forward_lstm``."""
    return _BY_SNAKE.get(re.sub(r"^(forward|backward)_|_\d+$", "", name))


_CELL = re.compile(r"(lstm|gru|simple_rnn|conv_lstm\d?d?|conv_lstm)_cell(_\d+)?")


def owners(paths: Iterable[Sequence[str]]) -> dict[tuple[str, ...], str]:
    """The names of the layers at some paths. The cell of a recurrent layer is one with it, unless it has several."""
    listed = {tuple(path): [step for step in path if not step.startswith("stacked_rnn_cells")] for path in paths}
    cells: dict[tuple[str, ...], set[str]] = {}
    for steps in listed.values():
        if steps and _CELL.fullmatch(steps[-1]):
            cells.setdefault(tuple(steps[:-1]), set()).add(steps[-1])
    names = {}
    for path, steps in listed.items():
        around = tuple(steps[:-1])
        alone = bool(around) and len(cells.get(around, ())) == 1 and _CELL.fullmatch(steps[-1])
        names[path] = "/".join(around if alone else steps)
    return names


def inside_attention(name: str) -> str:
    """The name of a layer inside an attention layer, of which early files only have the attribute's."""
    plain = name.lstrip("_")
    if plain not in _PROJECTIONS or not plain.endswith("_dense"):
        return name
    return "attention_output" if plain == "output_dense" else plain.removesuffix("_dense")
