"""What the operations of PyTorch are called in :data:`qvis.layers.OPS`, and the attributes that they have there."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from qvis.adapters.torch.calls import Call, Held
from qvis.adapters.torch.values import Result

COPIES = {"alias", "detach", "clone", "contiguous", "to", "_to_copy", "type_as", "float", "half", "bfloat16", "double"}
COPIES |= {"cpu", "cuda", "lift_fresh_copy", "lift_fresh", "identity", "requires_grad"}
"""Operations that hand on what they take."""
TRANSPOSES = {"t", "numpy_T", "transpose", "permute", "movedim", "moveaxis", "adjoint"}
SPLITS = {"chunk", "split", "split_with_sizes", "unbind", "tensor_split", "unsafe_chunk", "unsafe_split"}
"""Operations with a list of parts as their result."""
SEVERAL = re.compile(
    r"nn\.(LSTM|GRU|RNN|LSTMCell|MultiheadAttention|Transformer)|lstm|gru|rnn_\w+|lstm_cell|topk|sort|max|min|median"
    r"|mode|kthvalue|std_mean|var_mean|\w+_with_indices|native_\w+"
)
"""Operations that may have several results, of which each counts as the whole."""
SHAPES = {"size", "dim", "ndimension", "numel", "len", "stride", "sym_size", "sym_numel", "sym_stride"}
SHAPES |= {"is_floating_point", "_assert_scalar"}
SHAPES |= {"zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones"}
SHAPES |= {"new_full", "new_empty", "new_tensor", "_assert", "_assert_async", "_assert_tensor_metadata", "is_nonzero"}
"""Operations whose result does not depend on the numbers of what they take."""
FACTS = {"shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_sparse", "is_quantized", "requires_grad", "names"}
FACTS |= {"itemsize", "nbytes", "is_mps", "is_meta", "is_leaf", "is_mkldnn", "is_nested", "is_xla", "is_cpu", "grad_fn"}
"""Attributes of a tensor that do not depend on its numbers."""
SAME_SHAPE = {"view_as", "expand_as", "reshape_as", *COPIES}
"""Operations that take the numbers of their first argument alone."""
VIEWS = {*COPIES, *TRANSPOSES, *SPLITS, "view", "reshape", "slice", "select", "narrow", "unsqueeze", "squeeze"}
VIEWS |= {"expand", "unflatten", "flatten", "dropout", "getitem", "view_as", "expand_as", "diagonal", "getattr"}
WHOLE = {*COPIES, "dropout"} - {"clone"}
"""Operations whose result may be the very tensor that they take."""


class Facts(NamedTuple):
    """What is known of an operation's operands when its attributes are asked for."""

    call: Call
    inputs: int
    """How many of its operands are results."""
    before: tuple[int, ...] | None
    """The shape of the first operand; None where it is unknown."""
    after: tuple[int, ...] | None
    """The shape of the result."""
    channels: int | None
    """The channel axis of the first operand."""
    tensor: Callable[[Held], Any]
    """Gives the numbers of a tensor that the model holds, None where they are unknown."""


Described = tuple[str, dict[str, Any]]
Rule = Callable[[Facts], Described | None]


def describe(facts: Facts) -> Described:
    """The word for an operation and its attributes; the framework's own name where there is no word for it."""
    call = facts.call
    name = re.sub(r"\dd(_with_indices)?$", "", call.operation)
    found: Described | None = None
    if name.startswith(("upsample", "_upsample", "interpolate")):
        found = "resize", {}
    elif name in _RULES:
        found = _RULES[name](facts)
    elif name in _WORDS:
        found = _WORDS[name], {}
    return found or (call.original or call.operation, {})


_WORDS = {
    **dict.fromkeys(COPIES, "identity"),
    **{name: name for name in ("relu", "gelu", "silu", "sigmoid", "tanh", "softmax")},
    **{name: name for name in ("hardswish", "hardsigmoid", "elu")},
    "special_expit": "sigmoid",
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"), "dropout"),
    "native_dropout": "dropout",
    **dict.fromkeys(("max_pool", "adaptive_max_pool", "fractional_max_pool"), "max_pool"),
    **dict.fromkeys(("avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool"), "avg_pool"),
    "scaled_dot_product_attention": "attention",
    "unflatten": "reshape",
    "view_as": "reshape",
    "reshape_as": "reshape",
}
"""Operations that need no attributes."""


def _leaky_relu(facts: Facts) -> Described:
    return "leaky_relu", {"slope": float(facts.call.get(1, "negative_slope", default=0.01))}


def _prelu(facts: Facts) -> Described | None:
    slopes = facts.call.get(1, "weight")
    return ("prelu", {"slopes": facts.tensor(slopes)}) if isinstance(slopes, Held) else None


def _clip(low: int | None, high: int | None, defaults: tuple[float | None, float | None] = (None, None)) -> Rule:
    """The bounds are at these positions of the arguments."""

    def rule(facts: Facts) -> Described | None:
        names = (("min", "min_val"), ("max", "max_val"))
        bounds = [
            default if position is None else facts.call.get(position, *spelled, default=default)
            for position, spelled, default in zip((low, high), names, defaults, strict=True)
        ]
        if not all(bound is None or isinstance(bound, (int, float)) for bound in bounds):
            return None
        return "clip", {"low": bounds[0], "high": bounds[1]}

    return rule


def _arithmetic(word: str) -> Rule:
    def rule(facts: Facts) -> Described | None:
        alpha = facts.call.get(2, "alpha", default=1)
        rounding = facts.call.get(2, "rounding_mode")
        if (word in ("add", "sub") and alpha != 1) or (word == "div" and rounding is not None):
            return None
        attributes: dict[str, Any] = {"constant": facts.inputs < 2}
        if word == "div" and facts.inputs == 1:
            attributes["divisor"] = isinstance(facts.call.get(0, "input"), Result)
        return word, attributes

    return rule


def _concat(facts: Facts) -> Described:
    return "concat", {"axis": axis_of(facts.call.get(1, "dim", "axis", default=0), facts.after)}


def split_axis(call: Call, shape: tuple[int, ...] | None) -> int | None:
    """The axis along which one of :data:`SPLITS` takes a tensor of this shape apart; None where it is not known."""
    return axis_of(call.get(1 if call.operation == "unbind" else 2, "dim", default=0), shape)


def _take(facts: Facts) -> Described:
    """A part along an axis."""
    call = facts.call
    if facts.before is not None and facts.before == facts.after:
        return "identity", {}
    axis = axis_of(call.get(1, "dim", default=0), facts.before)
    start = {"slice": call.get(2, "start", default=0), "select": call.get(2, "index"), "narrow": call.get(2, "start")}
    step = call.get(4, "step", default=1) if call.operation == "slice" else 1
    return "split", {"axis": axis, **_place(start.get(call.operation), step, axis, facts.before)}


def _place(start: Any, step: Any, axis: int | None, shape: tuple[int, ...] | None) -> dict[str, Any]:
    """Where a part begins, and how far its elements are apart; nothing where that is not known."""
    start, step = 0 if start is None else start, 1 if step is None else step
    if type(start) is not int or type(step) is not int:
        return {}
    size = shape[axis] if shape and axis is not None else None
    if type(size) is int:
        start = max(start + size, 0) if start < 0 else min(start, size)
    return {"start": start, "step": step}


def _getitem(facts: Facts) -> Described:
    """``x[index]``, as it is written in Python."""
    index = facts.call.args[1]
    index = index if isinstance(index, tuple) else (index,)
    if any(one is Ellipsis or isinstance(one, Held) for one in index):
        return "split", {"axis": None}
    taken = {axis: one for axis, one in enumerate([one for one in index if one is not None]) if one != slice(None)}
    if not taken:
        return ("reshape" if None in index else "identity"), {}
    if len(taken) > 1 or None in index:
        return "split", {"axis": None}
    ((axis, one),) = taken.items()
    start, step = (one.start, one.step) if isinstance(one, slice) else (one if isinstance(one, int) else Ellipsis, 1)
    return "split", {"axis": axis, **_place(start, step, axis, facts.before)}


def _pad(facts: Facts) -> Described:
    mode = facts.call.get(2, "mode", default="constant")
    value = facts.call.get(3, "value", default=0)
    return "pad", {"value": (value or 0) if mode == "constant" else None, **_widths(facts)}


def _pad_with(facts: Facts) -> Described:
    """With a number."""
    return "pad", {"value": facts.call.get(2, "value", default=0), **_widths(facts)}


def _widths(facts: Facts) -> dict[str, Any]:
    """How many come before and after along each axis; PyTorch names the last axis first."""
    given = facts.call.get(1, "pad")
    if facts.before is None or not isinstance(given, Sequence) or not all(type(one) is int for one in given):
        return {}
    pairs = list(zip(given[::2], given[1::2], strict=False))[::-1]
    return {"widths": (*[(0, 0)] * (len(facts.before) - len(pairs)), *pairs)}


def _flatten(facts: Facts) -> Described:
    start, end = facts.call.get(1, "start_dim", default=0), facts.call.get(2, "end_dim", default=-1)
    if facts.before is not None and facts.after is not None:
        return _reshape(facts)
    return ("flatten", {"start": start}) if end == -1 else ("reshape", {})


def _reshape(facts: Facts) -> Described:
    before, after = facts.before, facts.after
    if before is not None and after is not None:
        if before == after:
            return "identity", {}
        for start in range(len(before) - 1):
            if after == (*before[:start], math.prod(before[start:])):
                return "flatten", {"start": start}
        return "reshape", {}
    sizes = facts.call.args[1:]
    sizes = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    # The first size is the batch's own: x.view(x.size(0), -1), or a slice of x.shape.
    if len(sizes) == 2 and sizes[1] == -1 and isinstance(sizes[0], Held):
        return "flatten", {"start": 1}
    return "reshape", {}


def _transpose(facts: Facts) -> Described:
    return "transpose", {"axes": order_of(facts.call, facts.before)}


def order_of(call: Call, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The order of axes after a transposition, None where it is unknown."""
    if call.operation == "permute":
        given = call.get(1, "dims")
        given = given if isinstance(given, (tuple, list)) else call.args[1:]
        if all(isinstance(one, int) for one in given):
            return tuple(one % len(given) for one in given)
        return None
    rank = None if shape is None else len(shape)
    if call.operation in ("t", "numpy_T"):
        return tuple(reversed(range(2 if rank is None else rank)))
    first, second = call.get(1, "dim0", "source"), call.get(2, "dim1", "destination")
    if call.operation in ("movedim", "moveaxis"):
        return _moved_order(first, second, rank)
    if rank is None or call.operation != "transpose" or not (isinstance(first, int) and isinstance(second, int)):
        return None
    order = list(range(rank))
    order[first], order[second] = order[second], order[first]
    return tuple(order)


def _stack(facts: Facts) -> Described:
    return "concat", {"axis": axis_of(facts.call.get(1, "dim", default=0), facts.after)}


def _repeat(facts: Facts) -> Described | None:
    """Repeating along axes; without shapes, it is not known along which."""
    if facts.before is not None and facts.before == facts.after:
        return "identity", {}
    known = facts.before is not None and facts.after is not None and len(facts.before) == len(facts.after)
    return ("resize", {}) if known else None


def _roll(position: int) -> Rule:
    def rule(facts: Facts) -> Described | None:
        axes = facts.call.get(position, "dims")
        axes = [axes] if isinstance(axes, int) else axes
        if not axes or not isinstance(axes, Sequence) or facts.before is None:
            return None
        return "roll", {"axes": tuple(axis % len(facts.before) for axis in axes)}

    return rule


def _pixel_shuffle(facts: Facts) -> Described | None:
    return None if facts.before is None else ("pixel_shuffle", {"channel_axis": len(facts.before) - 3})


def _total(facts: Facts) -> Described | None:
    found = _mean(facts)
    return None if found is None else ("sum", found[1])


def _largest(facts: Facts) -> Described | None:
    """Along axes, or of two results."""
    if facts.inputs == 2:
        return "maximum", {}
    found = _mean(facts)
    return None if found is None else ("max_pool", found[1])


def _glu(facts: Facts) -> Described:
    return "glu", {"axis": axis_of(facts.call.get(1, "dim", default=-1), facts.before)}


def _moved_order(source: Any, destination: Any, rank: int | None) -> tuple[int, ...] | None:
    """The order of axes after some of them have moved."""
    moved, places = ([one] if isinstance(one, int) else one for one in (source, destination))
    if rank is None or not all(isinstance(one, Sequence) for one in (moved, places)):
        return None
    goal = {place % rank: axis % rank for axis, place in zip(moved, places, strict=True)}
    rest = iter([axis for axis in range(rank) if axis not in goal.values()])
    return tuple(goal[place] if place in goal else next(rest) for place in range(rank))


def _mean(facts: Facts) -> Described | None:
    """A mean is a pooling where the channels are not among its axes."""
    axes = facts.call.get(1, "dim", "axis")
    axes = [axes] if isinstance(axes, int) else axes
    if not axes or not isinstance(axes, Sequence) or not all(isinstance(axis, int) for axis in axes):
        return None
    rank = None if facts.before is None else len(facts.before)
    channels = facts.channels
    if channels is None:
        channels = 1 if rank is None or rank > 3 else rank - 1
    if rank is not None:
        axes = tuple(axis % rank for axis in axes)
        pooled = channels % rank not in axes
    else:
        # Of images or sequences, (batch, channels, ...): the last axes, and neither of the first two.
        pooled = channels not in axes and (channels != 1 or all(axis < 0 or axis > 1 for axis in axes))
    return ("avg_pool", {} if rank is None else {"axes": axes}) if pooled else None


def _layer_norm(word: str) -> Rule:
    def rule(facts: Facts) -> Described:
        count = facts.call.get(1, "normalized_shape")
        count = len(count) if isinstance(count, Sequence) else 1
        scale, shift = (one is not None for one in affine_of(facts.call))
        rank = 0 if facts.after is None else len(facts.after)
        return word, {"axes": tuple(range(rank - count, rank)), "scale": scale, "shift": shift}

    return rule


def affine_of(call: Call) -> tuple[Any, Any]:
    """The factor and the shift of a layer, RMS, group or instance normalization; None for one that it has not."""
    first = call.operation == "instance_norm" or call.original == "aten.native_group_norm"
    position = 1 if first else 2
    shift = None if call.operation == "rms_norm" else call.get(position + 1, "bias")
    return call.get(position, "weight"), shift


def _group_norm(facts: Facts) -> Described:
    scale, shift = (one is not None for one in affine_of(facts.call))
    return "group_norm", {"channel_axis": 1, "scale": scale, "shift": shift}


def _matmul(facts: Facts) -> Described | None:
    return ("matmul", {}) if facts.inputs == 2 else None


def axis_of(axis: Any, shape: tuple[int, ...] | None) -> int | None:
    """An axis counted from the front where the number of axes is known."""
    if not isinstance(axis, int):
        return None
    return axis if shape is None or not shape else axis % len(shape)


_RULES: dict[str, Rule] = {
    "leaky_relu": _leaky_relu,
    "prelu": _prelu,
    "hardtanh": _clip(1, 2, (-1.0, 1.0)),
    "relu6": _clip(None, None, (0.0, 6.0)),
    "clamp": _clip(1, 2),
    "clamp_min": _clip(1, None),
    "clamp_max": _clip(None, 1),
    "add": _arithmetic("add"),
    "sub": _arithmetic("sub"),
    "rsub": _arithmetic("sub"),
    "mul": _arithmetic("mul"),
    "div": _arithmetic("div"),
    "cat": _concat,
    **dict.fromkeys(("slice", "select", "narrow"), _take),
    "index_select": lambda facts: ("split", {"axis": axis_of(facts.call.get(1, "dim", default=0), facts.before)}),
    "getitem": _getitem,
    "pad": _pad,
    "constant_pad_nd": _pad_with,
    **{f"{kind}_pad": lambda _: ("pad", {"value": None}) for kind in ("reflection", "replication", "circular")},
    "flatten": _flatten,
    **dict.fromkeys(("view", "reshape", "squeeze", "unsqueeze"), _reshape),
    **dict.fromkeys(TRANSPOSES, _transpose),
    "mean": _mean,
    "sum": _total,
    **dict.fromkeys(("amax", "amin", "max", "min", "maximum", "minimum"), _largest),
    "glu": _glu,
    **dict.fromkeys(("expand", "broadcast_to", "repeat", "repeat_interleave", "tile"), _repeat),
    "neg": lambda _: ("mul", {"constant": True}),
    "stack": _stack,
    "roll": _roll(2),
    "flip": _roll(1),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), _pixel_shuffle),
    "layer_norm": _layer_norm("layer_norm"),
    "rms_norm": _layer_norm("rms_norm"),
    **dict.fromkeys(("group_norm", "instance_norm"), _group_norm),
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
}
