"""ONNX's operators that sum, move and resize, in PyTorch; see :mod:`qvis.adapters.onnx.torch_ops`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import floor, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Attributes = Mapping[str, Any]


def integers(given: Any, default: Sequence[int] = ()) -> list[int]:
    """Axes or sizes, from an attribute or from a tensor."""
    if given is None:
        return list(default)
    return [int(one) for one in (given.reshape(-1).tolist() if isinstance(given, Tensor) else given)]


def pad(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    flat = [one for pair in reversed(pads) for one in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


# ---------------------------------------------------------------------------------------------------------------------
# Sums and shapes


def _reduced(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    def apply(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen = integers(a.get("axes") if axes is None else axes)
        if not chosen and a.get("noop_with_empty_axes", 0):
            return x
        return function(x, chosen or list(range(x.ndim)), bool(a.get("keepdims", 1)))

    return apply


def _arg(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def apply(a: Attributes, x: Tensor) -> Tensor:
        return function(x, dim=a.get("axis", 0), keepdim=bool(a.get("keepdims", 1)))

    return apply


def _reshape(a: Attributes, x: Tensor, shape: Tensor | None = None) -> Tensor:
    sizes = integers(a.get("shape") if shape is None else shape)
    if not a.get("allowzero", 0):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(a: Attributes, x: Tensor) -> Tensor:
    axis = a.get("axis", 1)
    axis += x.ndim if axis < 0 else 0
    return x.reshape(prod(x.shape[:axis]), prod(x.shape[axis:]))


def _squeeze(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = integers(a.get("axes") if axes is None else axes)
    return x.squeeze(tuple(chosen)) if chosen else x.squeeze()


def _unsqueeze(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = integers(a.get("axes") if axes is None else axes)
    for axis in sorted(one % (x.ndim + len(chosen)) for one in chosen):
        x = x.unsqueeze(axis)
    return x


def _transpose(a: Attributes, x: Tensor) -> Tensor:
    return x.permute(integers(a.get("perm"), list(reversed(range(x.ndim)))))


def _split(a: Attributes, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = a.get("axis", 0)
    chosen = integers(a.get("split") if sizes is None else sizes)
    if not chosen:
        return torch.split(x, -(-x.shape[axis] // a["results"]), axis)
    return torch.split(x, chosen, axis)


def _slice(a: Attributes, x: Tensor, *given: Tensor | None) -> Tensor:
    starts, ends, axes, steps = [*given, *[None] * 4][:4]
    first, last = (integers(a.get(n) if one is None else one) for n, one in (("starts", starts), ("ends", ends)))
    chosen = integers(a.get("axes") if axes is None else axes, range(len(first)))
    for axis, start, end, step in zip(chosen, first, last, integers(steps, [1] * len(first)), strict=True):
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
    sizes = integers(shape)
    missing = max(0, x.ndim - len(sizes))
    sizes = [*x.shape[:missing], *sizes]
    whole = [1] * (len(sizes) - x.ndim) + list(x.shape)
    return x.expand([have if want == 1 else want for have, want in zip(whole, sizes, strict=True)])


def _tile(a: Attributes, x: Tensor, repeats: Tensor) -> Tensor:  # noqa: ARG001
    return x.repeat(integers(repeats))


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
    return value.reshape(()).expand(integers(shape)).clone()  # type: ignore[no-any-return]


def _range(a: Attributes, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:  # noqa: ARG001
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _padded(a: Attributes, x: Tensor, *given: Tensor | None) -> Tensor:
    pads, value, axes = [*given, None, None, None][:3]
    sizes = integers(a.get("pads") if pads is None else pads)
    half = len(sizes) // 2
    pairs = [(0, 0)] * x.ndim
    for axis, pair in zip(integers(axes, range(half)), zip(sizes[:half], sizes[half:], strict=True), strict=True):
        pairs[axis] = pair
    mode = a.get("mode", "constant")
    if mode == "constant":
        return pad(x, pairs, a.get("value", 0.0) if value is None else value.item())
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
    axes = integers(a.get("axes"), range(x.ndim))
    wanted = list(x.shape)
    factors = [1.0] * x.ndim
    if sizes is not None and sizes.numel():
        for axis, size in zip(axes, integers(sizes), strict=True):
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

SHAPES: dict[str, Callable[..., Any]] = {
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "Concat": lambda a, *x: torch.cat(x, a["axis"]),
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": lambda a, x, axis: torch.cumsum(x, int(axis.item())),  # noqa: ARG005
    "DepthToSpace": _depth_to_space,
    "Einsum": _einsum,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Pad": _padded,
    "Range": _range,
    "ReduceL2": _reduced(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "ReduceMax": _reduced(lambda x, axes, keep: x.amax(axes, keep)),
    "ReduceMean": _reduced(lambda x, axes, keep: x.mean(axes, keep)),
    "ReduceMin": _reduced(lambda x, axes, keep: x.amin(axes, keep)),
    "ReduceSum": _reduced(lambda x, axes, keep: x.sum(axes, keep)),
    "ReduceSumSquare": _reduced(lambda x, axes, keep: x.square().sum(axes, keep)),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "Upsample": lambda a, x, scales=None: _resize({**a, "opset": 10}, x, scales),
    "Where": _where,
}
