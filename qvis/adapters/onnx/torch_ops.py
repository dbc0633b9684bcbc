"""ONNX's operators in PyTorch, so that derivatives can be taken: one function for each, by its name.

A function gets the node's attributes, with ``opset`` and the number of ``results`` among them, and its inputs, None for
one that is left out. What they compute is specified in ONNX's operator reference; the runner compares a graph's outputs
with onnxruntime's before it relies on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, floor, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Attributes = Mapping[str, Any]


def _ints(given: Any, default: Sequence[int] = ()) -> list[int]:
    """Axes or sizes, from an attribute or from a tensor."""
    if given is None:
        return list(default)
    return [int(one) for one in (given.reshape(-1).tolist() if isinstance(given, Tensor) else given)]


# ---------------------------------------------------------------------------------------------------------------------
# Convolutions and pools


def _pads(a: Attributes, sizes: Sequence[int], kernel: Sequence[int]) -> list[tuple[int, int]]:
    """How much is put before and behind each axis in space."""
    n = len(kernel)
    strides, dilations = (_ints(a.get(name), [1] * n) for name in ("strides", "dilations"))
    mode = a.get("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        pads = []
        for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
            total = max(0, (ceil(size / s) - 1) * s + d * (k - 1) + 1 - size)
            less, more = total // 2, total - total // 2
            pads.append((less, more) if mode == "SAME_UPPER" else (more, less))
        return pads
    given = [0] * 2 * n if mode == "VALID" else _ints(a.get("pads"), [0] * 2 * n)
    return list(zip(given[:n], given[n:], strict=True))


def _pad(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    flat = [one for pair in reversed(pads) for one in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def _conv(a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    n = w.ndim - 2
    function = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    x = _pad(x, _pads(a, x.shape[2:], w.shape[2:]))
    strides, dilations = (_ints(a.get(name), [1] * n) for name in ("strides", "dilations"))
    return function(x, w, b, strides, 0, dilations, a.get("group", 1))


def _conv_transpose(a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    n = w.ndim - 2
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
    strides, dilations = (_ints(a.get(name), [1] * n) for name in ("strides", "dilations"))
    more = _ints(a.get("output_padding"), [0] * n)
    # PyTorch wants less output padding than stride or dilation, so that zeros are added here
    whole = function(x, w, None, strides, 0, 0, a.get("group", 1), dilations)
    whole = _pad(whole, [(0, one) for one in more])
    pads = _pads({**a, "auto_pad": "NOTSET"}, x.shape[2:], w.shape[2:])
    mode = a.get("auto_pad", "NOTSET")
    wanted = _ints(a.get("output_shape"))[-n:]
    if not wanted and mode.startswith("SAME"):
        wanted = [size * s for size, s in zip(x.shape[2:], strides, strict=True)]
    if wanted:
        totals = [max(0, have - want) for have, want in zip(whole.shape[2:], wanted, strict=True)]
        pads = [(t // 2, t - t // 2) if mode == "SAME_UPPER" else (t - t // 2, t // 2) for t in totals]
    for axis, (before, behind) in enumerate(pads, 2):
        whole = whole.narrow(axis, before, whole.shape[axis] - before - behind)
    return whole if b is None else whole + b.reshape(-1, *[1] * n)


def _pooled_pads(a: Attributes, x: Tensor) -> tuple[list[int], list[int], list[tuple[int, int]], list[tuple[int, int]]]:
    """Kernel, strides, the pads, and the pads with what rounding the size up adds behind."""
    kernel = _ints(a["kernel_shape"])
    n = len(kernel)
    strides, dilations = (_ints(a.get(name), [1] * n) for name in ("strides", "dilations"))
    pads = _pads(a, x.shape[2:], kernel)
    reached = []
    for (before, behind), size, k, s, d in zip(pads, x.shape[2:], kernel, strides, dilations, strict=True):
        span = size + before + behind - d * (k - 1) - 1
        steps = -(-span // s) if a.get("ceil_mode", 0) else span // s
        if a.get("ceil_mode", 0) and steps * s >= size + before:
            steps -= 1  # a window must not begin behind the input
        reached.append((before, behind + max(0, steps * s - span)))
    return kernel, strides, pads, reached


def _max_pool(a: Attributes, x: Tensor) -> Tensor:
    if a["results"] > 1:
        raise NotImplementedError("MaxPool with indices")
    kernel, strides, _, reached = _pooled_pads(a, x)
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    dilations = _ints(a.get("dilations"), [1] * len(kernel))
    return function(_pad(x, reached, -torch.inf), kernel, strides, 0, dilations)


def _average_pool(a: Attributes, x: Tensor) -> Tensor:
    kernel, strides, pads, reached = _pooled_pads(a, x)
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    counted = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype)
    rest = [(0, more - behind) for (_, behind), (_, more) in zip(pads, reached, strict=True)]
    counted = _pad(_pad(counted, pads, float(a.get("count_include_pad", 0))), rest)
    average = function(_pad(x, reached), kernel, strides)
    return average / function(counted, kernel, strides)


def _in_space(x: Tensor) -> list[int]:
    return list(range(2, x.ndim))


# ---------------------------------------------------------------------------------------------------------------------
# Products and normalizations


def _gemm(a: Attributes, x: Tensor, w: Tensor, c: Tensor | None = None) -> Tensor:
    product = (x.T if a.get("transA", 0) else x) @ (w.T if a.get("transB", 0) else w)
    product = product * a["alpha"] if a.get("alpha", 1.0) != 1.0 else product
    return product if c is None else product + (c * a["beta"] if a.get("beta", 1.0) != 1.0 else c)


def _fused_matmul(a: Attributes, x: Tensor, w: Tensor) -> Tensor:
    product = (x.mT if a.get("transA", 0) else x) @ (w.mT if a.get("transB", 0) else w)
    return product * float(a.get("alpha", 1.0))


def _batch_norm(a: Attributes, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return F.batch_norm(x, mean, variance, scale, shift, False, 0.0, a.get("epsilon", 1e-5))


def _layer_norm(a: Attributes, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    axes = list(range(a.get("axis", -1) % x.ndim, x.ndim))
    centered = x - x.mean(axes, keepdim=True)
    normed = centered * torch.rsqrt(centered.square().mean(axes, keepdim=True) + a.get("epsilon", 1e-5)) * scale
    return normed if shift is None else normed + shift


def _rms_norm(a: Attributes, x: Tensor, scale: Tensor) -> Tensor:
    axes = list(range(a.get("axis", -1) % x.ndim, x.ndim))
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + a.get("epsilon", 1e-5)) * scale


def _skip_norm(a: Attributes, x: Tensor, skip: Tensor, *rest: Tensor | None) -> Tensor:
    scale, shift, bias = [*rest, None, None, None][:3]
    assert scale is not None
    return _layer_norm({**a, "axis": -1}, x + skip if bias is None else x + skip + bias, scale, shift)


def _instance_norm(a: Attributes, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=shift, eps=a.get("epsilon", 1e-5))


def _group_norm(a: Attributes, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    groups = a["num_groups"]
    if a["opset"] < 21:  # one number for each group
        scale, shift = (one.repeat_interleave(x.shape[1] // groups) for one in (scale, shift))
    return F.group_norm(x, groups, scale, shift, a.get("epsilon", 1e-5))


def _local_response(a: Attributes, x: Tensor) -> Tensor:
    return F.local_response_norm(x, a["size"], a.get("alpha", 1e-4), a.get("beta", 0.75), a.get("bias", 1.0))


def _softmax(a: Attributes, x: Tensor, function: Callable[..., Tensor]) -> Tensor:
    if a["opset"] >= 13:
        return function(x, dim=a.get("axis", -1))
    axis = a.get("axis", 1) % x.ndim  # all axes from this one on together
    return function(x.reshape(prod(x.shape[:axis]), -1), dim=1).reshape(x.shape)


def _attention(a: Attributes, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> Tensor:
    if a["results"] > 1 or len(rest) > 1 or q.ndim != 4 or a.get("softcap", 0.0):
        raise NotImplementedError("Attention with a cache, or of three axes")
    mask = rest[0] if rest else None
    shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=bool(a.get("is_causal", 0)), scale=a.get("scale"), enable_gqa=shared
    )


# ---------------------------------------------------------------------------------------------------------------------
# Functions of each number


def _gelu(a: Attributes, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=a.get("approximate", "none"))


def _clip(a: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    lowest, highest = (a.get(name) if one is None else one for name, one in (("min", low), ("max", high)))
    return x if lowest is None and highest is None else torch.clamp(x, lowest, highest)


def _prelu(a: Attributes, x: Tensor, slope: Tensor) -> Tensor:  # noqa: ARG001
    return torch.where(x < 0, x * slope, x)


def _hard_sigmoid(a: Attributes, x: Tensor) -> Tensor:
    return torch.clamp(x * a.get("alpha", 0.2) + a.get("beta", 0.5), 0, 1)


def _elu(a: Attributes, x: Tensor) -> Tensor:
    return F.elu(x, a.get("alpha", 1.0))


def _div(a: Attributes, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _mod(a: Attributes, x: Tensor, y: Tensor) -> Tensor:
    return torch.fmod(x, y) if a.get("fmod", 0) else torch.remainder(x, y)


def _pow(a: Attributes, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001
    return torch.pow(x, y.item() if y.numel() == 1 else y.to(x.dtype)).to(x.dtype)


def _cast(a: Attributes, x: Tensor) -> Tensor:
    return x.to(_DTYPES[a["to"]])


_DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """For an operator of any number of inputs."""

    def apply(a: Attributes, *x: Tensor) -> Tensor:  # noqa: ARG001
        result = x[0]
        for one in x[1:]:
            result = function(result, one)
        return result

    return apply


# ---------------------------------------------------------------------------------------------------------------------
# Sums and shapes


def _reduced(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    def apply(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen = _ints(a.get("axes") if axes is None else axes)
        if not chosen and a.get("noop_with_empty_axes", 0):
            return x
        return function(x, chosen or list(range(x.ndim)), bool(a.get("keepdims", 1)))

    return apply


def _arg(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def apply(a: Attributes, x: Tensor) -> Tensor:
        return function(x, dim=a.get("axis", 0), keepdim=bool(a.get("keepdims", 1)))

    return apply


def _reshape(a: Attributes, x: Tensor, shape: Tensor | None = None) -> Tensor:
    sizes = _ints(a.get("shape") if shape is None else shape)
    if not a.get("allowzero", 0):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(a: Attributes, x: Tensor) -> Tensor:
    axis = a.get("axis", 1)
    axis += x.ndim if axis < 0 else 0
    return x.reshape(prod(x.shape[:axis]), prod(x.shape[axis:]))


def _squeeze(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = _ints(a.get("axes") if axes is None else axes)
    return x.squeeze(tuple(chosen)) if chosen else x.squeeze()


def _unsqueeze(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = _ints(a.get("axes") if axes is None else axes)
    for axis in sorted(one % (x.ndim + len(chosen)) for one in chosen):
        x = x.unsqueeze(axis)
    return x


def _transpose(a: Attributes, x: Tensor) -> Tensor:
    return x.permute(_ints(a.get("perm"), list(reversed(range(x.ndim)))))


def _split(a: Attributes, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = a.get("axis", 0)
    chosen = _ints(a.get("split") if sizes is None else sizes)
    if not chosen:
        return torch.split(x, -(-x.shape[axis] // a["results"]), axis)
    return torch.split(x, chosen, axis)


def _slice(a: Attributes, x: Tensor, *given: Tensor | None) -> Tensor:
    starts, ends, axes, steps = [*given, *[None] * 4][:4]
    first, last = (_ints(a.get(n) if one is None else one) for n, one in (("starts", starts), ("ends", ends)))
    chosen = _ints(a.get("axes") if axes is None else axes, range(len(first)))
    for axis, start, end, step in zip(chosen, first, last, _ints(steps, [1] * len(first)), strict=True):
        places = range(x.shape[axis])[start:end:step]
        if step == 1:
            x = x.narrow(axis, places.start, len(places))
        else:
            x = x.index_select(axis, torch.tensor(list(places), dtype=torch.int64))
    return x


def _gather(a: Attributes, x: Tensor, index: Tensor) -> Tensor:
    axis = a.get("axis", 0) % x.ndim
    index = torch.where(index < 0, index + x.shape[axis], index).long()
    chosen = x.index_select(axis, index.reshape(-1))
    return chosen.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _gather_elements(a: Attributes, x: Tensor, index: Tensor) -> Tensor:
    axis = a.get("axis", 0)
    return x.gather(axis, torch.where(index < 0, index + x.shape[axis], index).long())


def _expand(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:  # noqa: ARG001
    sizes = _ints(shape)
    missing = max(0, x.ndim - len(sizes))
    sizes = [*x.shape[:missing], *sizes]
    whole = [1] * (len(sizes) - x.ndim) + list(x.shape)
    return x.expand([have if want == 1 else want for have, want in zip(whole, sizes, strict=True)])


def _tile(a: Attributes, x: Tensor, repeats: Tensor) -> Tensor:  # noqa: ARG001
    return x.repeat(_ints(repeats))


def _shape(a: Attributes, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape)[a.get("start", 0) : a.get("end")], dtype=torch.int64)


def _constant(a: Attributes) -> Tensor:
    name = next(name for name in a if name.startswith("value"))
    value = a[name]
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float32 if "float" in name else torch.int64)


def _constant_of_shape(a: Attributes, shape: Tensor) -> Tensor:
    value = a.get("value", torch.zeros(1))
    return value.reshape(()).expand(_ints(shape)).clone()  # type: ignore[no-any-return]


def _range(a: Attributes, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:  # noqa: ARG001
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _padded(a: Attributes, x: Tensor, *given: Tensor | None) -> Tensor:
    pads, value, axes = [*given, None, None, None][:3]
    sizes = _ints(a.get("pads") if pads is None else pads)
    half = len(sizes) // 2
    pairs = [(0, 0)] * x.ndim
    for axis, pair in zip(_ints(axes, range(half)), zip(sizes[:half], sizes[half:], strict=True), strict=True):
        pairs[axis] = pair
    mode = a.get("mode", "constant")
    if mode == "constant":
        return _pad(x, pairs, a.get("value", 0.0) if value is None else value.item())
    while pairs and pairs[0] == (0, 0) and len(pairs) > max(1, x.ndim - 2):
        pairs = pairs[1:]  # PyTorch reflects along the last axes only
    names = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    return F.pad(x, [one for pair in reversed(pairs) for one in pair], mode=names[mode])


def _where(a: Attributes, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001
    return torch.where(condition, x, y)


def _depth_to_space(a: Attributes, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = a["blocksize"]
    if a.get("mode", "DCR") == "CRD":
        return x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // b**2, h * b, w * b)
    return x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // b**2, h * b, w * b)


def _einsum(a: Attributes, *x: Tensor) -> Tensor:
    return torch.einsum(a["equation"], *x)


def _trilu(a: Attributes, x: Tensor, k: Tensor | None = None) -> Tensor:
    diagonal = 0 if k is None else int(k.item())
    return torch.triu(x, diagonal) if a.get("upper", 1) else torch.tril(x, diagonal)


# ---------------------------------------------------------------------------------------------------------------------
# Resizing


def _resize(a: Attributes, x: Tensor, *given: Tensor | None) -> Tensor:
    _, scales, sizes = [*given, None, None, None][:3] if a["opset"] > 10 else (None, *[*given, None, None][:2])
    axes = _ints(a.get("axes"), range(x.ndim))
    wanted = list(x.shape)
    factors = [1.0] * x.ndim
    if sizes is not None and sizes.numel():
        for axis, size in zip(axes, _ints(sizes), strict=True):
            wanted[axis], factors[axis] = size, size / x.shape[axis]
    else:
        listed = a["scales"] if scales is None else scales.reshape(-1).tolist()
        for axis, factor in zip(axes, listed, strict=True):
            wanted[axis], factors[axis] = floor(x.shape[axis] * factor), factor
    for axis, (size, factor) in enumerate(zip(wanted, factors, strict=True)):
        if size != x.shape[axis] or factor != 1.0:
            x = _resize_axis(a, x, axis, size, factor)
    return x


def _resize_axis(a: Attributes, x: Tensor, axis: int, size: int, factor: float) -> Tensor:
    length = x.shape[axis]
    out = torch.arange(size, dtype=torch.float64)
    default = "half_pixel" if a["opset"] > 10 else "asymmetric"
    mode = a.get("coordinate_transformation_mode", default)
    places = {
        "half_pixel": (out + 0.5) / factor - 0.5,
        "pytorch_half_pixel": (out + 0.5) / factor - 0.5 if size > 1 else out * 0,
        "asymmetric": out / factor,
        "align_corners": out * (length - 1) / max(1, size - 1),
    }[mode]
    if a.get("mode", "nearest") == "nearest":
        default = "round_prefer_floor" if a["opset"] > 10 else "floor"
        rounding = {
            "round_prefer_floor": torch.ceil(places - 0.5),
            "round_prefer_ceil": torch.floor(places + 0.5),
            "floor": torch.floor(places),
            "ceil": torch.ceil(places),
        }[a.get("nearest_mode", default)]
        return x.index_select(axis, rounding.clamp(0, length - 1).long())
    if a["mode"] != "linear":
        raise NotImplementedError(f"Resize of mode {a['mode']}")
    places = places.clamp(0, length - 1)
    low = places.floor().long()
    share = (places - low).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1 - axis))
    high = (low + 1).clamp(max=length - 1)
    return x.index_select(axis, low) * (1 - share) + x.index_select(axis, high) * share


# ---------------------------------------------------------------------------------------------------------------------


def _each(function: Callable[..., Any]) -> Callable[..., Any]:
    """For an operator without attributes."""
    return lambda a, *x: function(*x)  # noqa: ARG005


_SIMPLE: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs, "Add": torch.add, "And": torch.logical_and, "Ceil": torch.ceil, "Cos": torch.cos,
    "Equal": torch.eq, "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "Greater": torch.gt,
    "GreaterOrEqual": torch.ge, "HardSwish": F.hardswish, "Identity": lambda x: x, "IsNaN": torch.isnan,
    "Less": torch.lt, "LessOrEqual": torch.le, "Log": torch.log, "MatMul": torch.matmul, "Mish": F.mish,
    "Mul": torch.mul, "Neg": torch.neg, "Not": torch.logical_not, "Or": torch.logical_or,
    "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Round": torch.round, "Sigmoid": torch.sigmoid,
    "Sign": torch.sign, "Sin": torch.sin, "Size": lambda x: torch.tensor(x.numel()), "Softplus": F.softplus,
    "Softsign": F.softsign, "Sqrt": torch.sqrt, "Sub": torch.sub, "Tan": torch.tan, "Tanh": torch.tanh,
}  # fmt: skip
_STANDARD: dict[str, Callable[..., Any]] = {
    **{name: _each(function) for name, function in _SIMPLE.items()},
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "Attention": _attention,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "CastLike": lambda a, x, y: x.to(y.dtype),  # noqa: ARG005
    "Clip": _clip,
    "Concat": lambda a, *x: torch.cat(x, a["axis"]),
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "CumSum": lambda a, x, axis: torch.cumsum(x, int(axis.item())),  # noqa: ARG005
    "DepthToSpace": _depth_to_space,
    "Div": _div,
    "Dropout": lambda a, x, *_: (x, torch.ones_like(x, dtype=torch.bool)),  # noqa: ARG005
    "Einsum": _einsum,
    "Elu": _elu,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda a, x: x.mean(_in_space(x), keepdim=True),  # noqa: ARG005
    "GlobalMaxPool": lambda a, x: x.amax(_in_space(x), keepdim=True),  # noqa: ARG005
    "GroupNormalization": _group_norm,
    "HardSigmoid": _hard_sigmoid,
    "InstanceNormalization": _instance_norm,
    "LRN": _local_response,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda a, x: F.leaky_relu(x, a.get("alpha", 0.01)),
    "LogSoftmax": lambda a, x: _softmax(a, x, F.log_softmax),
    "Max": _folded(torch.maximum),
    "MaxPool": _max_pool,
    "Mean": lambda a, *x: _folded(torch.add)(a, *x) / len(x),
    "Min": _folded(torch.minimum),
    "Mod": _mod,
    "PRelu": _prelu,
    "Pad": _padded,
    "Pow": _pow,
    "RMSNormalization": _rms_norm,
    "Range": _range,
    "ReduceL2": _reduced(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "ReduceMax": _reduced(lambda x, axes, keep: x.amax(axes, keep)),
    "ReduceMean": _reduced(lambda x, axes, keep: x.mean(axes, keep)),
    "ReduceMin": _reduced(lambda x, axes, keep: x.amin(axes, keep)),
    "ReduceSum": _reduced(lambda x, axes, keep: x.sum(axes, keep)),
    "ReduceSumSquare": _reduced(lambda x, axes, keep: x.square().sum(axes, keep)),
    "Reshape": _reshape,
    "Resize": _resize,
    "Selu": lambda a, x: a.get("gamma", 1.0507010221481323) * F.elu(x, a.get("alpha", 1.6732631921768188)),
    "Shape": _shape,
    "Slice": _slice,
    "Softmax": lambda a, x: _softmax(a, x, F.softmax),
    "Split": _split,
    "Squeeze": _squeeze,
    "Sum": _folded(torch.add),
    "Swish": lambda a, x: x * torch.sigmoid(x * a.get("alpha", 1.0)),
    "ThresholdedRelu": lambda a, x: F.threshold(x, a.get("alpha", 1.0), 0.0),
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "Upsample": lambda a, x, scales=None: _resize({**a, "opset": 10}, x, scales),
    "Where": _where,
}
OPERATORS: dict[str, dict[str, Callable[..., Any]]] = {
    "": _STANDARD,
    "com.microsoft": {
        "FusedMatMul": _fused_matmul,
        "Gelu": _gelu,
        "FastGelu": lambda a, x, b=None: F.gelu(x if b is None else x + b, approximate="tanh"),  # noqa: ARG005
        "BiasGelu": lambda a, x, b: F.gelu(x + b),  # noqa: ARG005
        "QuickGelu": lambda a, x: x * torch.sigmoid(x * a.get("alpha", 1.702)),
        "LayerNormalization": _layer_norm,
        "SkipLayerNormalization": _skip_norm,
    },
}
"""By the operator's domain and its name."""
