"""ONNX's operators in PyTorch, so that derivatives can be taken: one function for each, by its name.

A function gets the node's attributes, with ``opset`` and the number of ``results`` among them, and its inputs, None for
one that is left out. What they compute is specified in ONNX's operator reference; the runner compares a graph's outputs
with onnxruntime's before it relies on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qvis.adapters.onnx.torch_shapes import SHAPES, Attributes, integers, pad

# ---------------------------------------------------------------------------------------------------------------------
# Convolutions and pools


def _pads(a: Attributes, sizes: Sequence[int], kernel: Sequence[int]) -> list[tuple[int, int]]:
    """How much is put before and behind each axis in space."""
    n = len(kernel)
    strides, dilations = (integers(a.get(name), [1] * n) for name in ("strides", "dilations"))
    mode = a.get("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        pads = []
        for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
            total = max(0, (ceil(size / s) - 1) * s + d * (k - 1) + 1 - size)
            less, more = total // 2, total - total // 2
            pads.append((less, more) if mode == "SAME_UPPER" else (more, less))
        return pads
    given = [0] * 2 * n if mode == "VALID" else integers(a.get("pads"), [0] * 2 * n)
    return list(zip(given[:n], given[n:], strict=True))


def _conv(a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    n = w.ndim - 2
    function = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    x = pad(x, _pads(a, x.shape[2:], w.shape[2:]))
    strides, dilations = (integers(a.get(name), [1] * n) for name in ("strides", "dilations"))
    return function(x, w, b, strides, 0, dilations, a.get("group", 1))


def _conv_transpose(a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    n = w.ndim - 2
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
    strides, dilations = (integers(a.get(name), [1] * n) for name in ("strides", "dilations"))
    more = integers(a.get("output_padding"), [0] * n)
    # PyTorch wants less output padding than stride or dilation, so that zeros are added here
    whole = function(x, w, None, strides, 0, 0, a.get("group", 1), dilations)
    whole = pad(whole, [(0, one) for one in more])
    pads = _pads({**a, "auto_pad": "NOTSET"}, x.shape[2:], w.shape[2:])
    mode = a.get("auto_pad", "NOTSET")
    wanted = integers(a.get("output_shape"))[-n:]
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
    kernel = integers(a["kernel_shape"])
    n = len(kernel)
    strides, dilations = (integers(a.get(name), [1] * n) for name in ("strides", "dilations"))
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
    dilations = integers(a.get("dilations"), [1] * len(kernel))
    return function(pad(x, reached, -torch.inf), kernel, strides, 0, dilations)


def _average_pool(a: Attributes, x: Tensor) -> Tensor:
    kernel, strides, pads, reached = _pooled_pads(a, x)
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    counted = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype)
    rest = [(0, more - behind) for (_, behind), (_, more) in zip(pads, reached, strict=True)]
    counted = pad(pad(counted, pads, float(a.get("count_include_pad", 0))), rest)
    average = function(pad(x, reached), kernel, strides)
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
    **SHAPES,
    "Attention": _attention,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "CastLike": lambda a, x, y: x.to(y.dtype),  # noqa: ARG005
    "Clip": _clip,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Div": _div,
    "Dropout": lambda a, x, *_: (x, torch.ones_like(x, dtype=torch.bool)),  # noqa: ARG005
    "Elu": _elu,
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
    "Pow": _pow,
    "RMSNormalization": _rms_norm,
    "Selu": lambda a, x: a.get("gamma", 1.0507010221481323) * F.elu(x, a.get("alpha", 1.6732631921768188)),
    "Softmax": lambda a, x: _softmax(a, x, F.softmax),
    "Sum": _folded(torch.add),
    "Swish": lambda a, x: x * torch.sigmoid(x * a.get("alpha", 1.0)),
    "ThresholdedRelu": lambda a, x: F.threshold(x, a.get("alpha", 1.0), 0.0),
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
