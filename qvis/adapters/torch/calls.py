"""From one node of a torch.fx graph to one :class:`Call`: the same for exported operations, functions and modules.

A traced model says ``aten.relu_.default``, ``torch.nn.functional.relu(x, inplace=True)`` or "call the module act"; all
of these become the call of ``relu``, with the arguments in the order of ATen's own operation.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qvis.adapters.torch.parts import known_type

if TYPE_CHECKING:
    from torch import fx, nn


@dataclass(frozen=True)
class Held:
    """A value that does not depend on what is given to the model."""

    path: str = ""
    """The parameter or buffer that it is, or that it is made from."""
    flipped: bool = False
    """Whether it was transposed."""
    computed: bool = False
    """Whether it is not the tensor itself, but something made from it."""
    rows: tuple[int, int] | None = None
    """The first of the tensor's rows that it is, and the end of them; None for all of it."""


@dataclass(frozen=True)
class Call:
    """One operation of a traced model."""

    operation: str
    """Such as ``conv2d``; without the mark of an in-place variant, the overload, or the library where it is ATen."""
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    module: str = ""
    """The innermost module that it belongs to."""
    kind: str = ""
    """The class of that module, where it is one of ``torch.nn``."""
    in_place: bool = False
    original: str = ""
    """What the framework calls it."""

    def get(self, position: int, *names: str, default: Any = None) -> Any:
        """An argument, by its position or one of its names."""
        for name in names:
            if name in self.kwargs:
                return self.kwargs[name]
        return self.args[position] if position < len(self.args) else default


Translation = Callable[["nn.Module"], tuple[Any, ...]]

_PLAIN = {
    "ReLU": "relu",
    "SiLU": "silu",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "GELU": "gelu",
    "Hardswish": "hardswish",
    "Hardsigmoid": "hardsigmoid",
    "ELU": "elu",
    "Softmax": "softmax",
    "Softmax2d": "softmax",
    "Identity": "identity",
    "Mish": "mish",
    "Softplus": "softplus",
    "LogSoftmax": "log_softmax",
    "LogSigmoid": "log_sigmoid",
    "SELU": "selu",
    "CELU": "celu",
    "Upsample": "upsample",
    "UpsamplingNearest2d": "upsample",
    "UpsamplingBilinear2d": "upsample",
    "PixelShuffle": "pixel_shuffle",
    "PixelUnshuffle": "pixel_unshuffle",
    "Unflatten": "unflatten",
    "LocalResponseNorm": "local_response_norm",
    **{f"{kind}Pool{n}d": f"{kind.lower()}_pool{n}d" for kind in ("Max", "Avg", "LP") for n in (1, 2, 3)},
    **{f"Adaptive{kind}Pool{n}d": f"adaptive_{kind.lower()}_pool{n}d" for kind in ("Max", "Avg") for n in (1, 2, 3)},
    **{
        f"{kind}Pad{n}d": f"{kind.lower()}_pad{n}d"
        for kind in ("Reflection", "Replication", "Circular")
        for n in (1, 2, 3)
    },
    **dict.fromkeys([f"Dropout{n}" for n in ("", "1d", "2d", "3d")], "dropout"),
    **dict.fromkeys(("AlphaDropout", "FeatureAlphaDropout"), "dropout"),
}
"""The operation that a module of ``torch.nn`` without further arguments is."""

_DETAILED: dict[str, tuple[str, Translation]] = {
    "ReLU6": ("hardtanh", lambda _: (0.0, 6.0)),
    "Hardtanh": ("hardtanh", lambda module: (module.min_val, module.max_val)),
    "LeakyReLU": ("leaky_relu", lambda module: (module.negative_slope,)),
    "PReLU": ("prelu", lambda _: (Held("weight"),)),
    "Flatten": ("flatten", lambda module: (module.start_dim, module.end_dim)),
    "LayerNorm": ("layer_norm", lambda module: (module.normalized_shape, *_affine(module), module.eps)),
    "RMSNorm": ("rms_norm", lambda module: (module.normalized_shape, *_affine(module)[:1], module.eps)),
    "GroupNorm": ("group_norm", lambda module: (module.num_groups, *_affine(module), module.eps)),
    **{f"InstanceNorm{n}d": ("instance_norm", lambda module: _affine(module)) for n in (1, 2, 3)},
    "Linear": ("linear", lambda module: _affine(module)),
    **{f"ZeroPad{n}d": ("pad", lambda module: (module.padding, "constant", 0)) for n in (1, 2, 3)},
    **{f"ConstantPad{n}d": ("pad", lambda module: (module.padding, "constant", module.value)) for n in (1, 2, 3)},
    **{
        f"Conv{n}d": (
            f"conv{n}d",
            lambda module: (*_affine(module), module.stride, module.padding, module.dilation, module.groups),
        )
        for n in (1, 2, 3)
    },
    **{
        f"ConvTranspose{n}d": (
            f"conv_transpose{n}d",
            lambda module: (*_affine(module), module.stride, module.padding, module.output_padding, module.groups),
        )
        for n in (1, 2, 3)
    },
    **{
        name: (
            "batch_norm",
            lambda module: (*_affine(module), *_statistics(module), not _is_fixed(module), module.momentum, module.eps),
        )
        for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")
    },
}
"""Modules with arguments, and what they are after the input."""


def _affine(module: nn.Module) -> tuple[Held | None, Held | None]:
    return tuple(None if getattr(module, name, None) is None else Held(name) for name in ("weight", "bias"))  # type: ignore[return-value]


def _statistics(module: nn.Module) -> tuple[Held | None, Held | None]:
    return (Held("running_mean"), Held("running_var")) if _is_fixed(module) else (None, None)


def _is_fixed(module: nn.Module) -> bool:
    """Whether a batch normalization uses the running statistics in evaluation mode."""
    return module.running_mean is not None and module.running_var is not None


def single_operation(kind: str) -> str:
    """The operation that a whole module of ``torch.nn`` is; empty where it is more than one."""
    if kind in _DETAILED:
        return _DETAILED[kind][0]
    return "embedding" if kind == "Embedding" else _PLAIN.get(kind, "")


def type_of(cls: type) -> str:
    """The class of ``torch.nn`` whose forward pass an object of this class runs; empty where it has one of its own."""
    forward = getattr(cls, "forward", None)
    for base in cls.__mro__:
        if base.__module__.startswith("torch.nn.modules.") and base.__dict__.get("forward") is not None:
            return _known_base(cls) if base.__dict__["forward"] is forward else ""
    return ""


def _known_base(cls: type) -> str:
    """The first class that is known by its name; else the first one of torch."""
    bases = [base.__name__ for base in cls.__mro__ if base.__module__.startswith("torch.nn.modules.")]
    return next((name for name in bases if single_operation(name) or known_type("torch", name)), bases[0])


def call_module(node: fx.Node, path: str, module: nn.Module) -> Call:
    """The call of a module that was not looked into."""
    kind = type_of(type(module))
    given = tuple(node.args) or tuple(node.kwargs.values())
    marks: dict[str, Any] = {"module": path, "kind": kind, "in_place": bool(getattr(module, "inplace", False))}
    if kind == "Embedding":
        return Call("embedding", (Held(_inside(path, "weight")), *given), **marks)
    if kind in _PLAIN:
        return Call(_PLAIN[kind], given[:1], original=f"nn.{kind}", **marks)
    if kind in _DETAILED:
        operation, arguments = _DETAILED[kind]
        held = [Held(_inside(path, one.path)) if isinstance(one, Held) else one for one in arguments(module)]
        return Call(operation, (*given[:1], *held), original=f"nn.{kind}", **marks)
    name = kind or type(module).__name__
    return Call(f"nn.{name}", tuple(node.args), node.kwargs, path, kind, original=f"nn.{name}")


def _inside(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


_OPERATORS = {"truediv": "div", "itruediv": "div", "true_divide": "div", "iadd": "add", "isub": "sub", "imul": "mul"}
_SPELLINGS = {
    **_OPERATORS,
    "multiply": "mul",
    "divide": "div",
    "subtract": "sub",
    "concat": "cat",
    "concatenate": "cat",
    "clip": "clamp",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "_softmax": "softmax",
    "_safe_softmax": "softmax",
    "_unsafe_view": "view",
    "_prelu_kernel": "prelu",
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
    "fused_rms_norm": "rms_norm",
    "_fused_rms_norm": "rms_norm",
    "native_batch_norm": "batch_norm",
    "cudnn_batch_norm": "batch_norm",
    "_native_batch_norm_legit": "batch_norm",
    "_scaled_dot_product_flash_attention": "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu": "scaled_dot_product_attention",
    "_scaled_dot_product_efficient_attention": "scaled_dot_product_attention",
}
"""Other names of the same operations."""


def call_operation(node: fx.Node, module: str, kind: str) -> Call:
    """The call of an operation of ATen, of a function, or of a method."""
    from torch._ops import OpOverload
    from torch.nn import functional

    target, args, kwargs = node.target, tuple(node.args), dict(node.kwargs)
    in_place = False
    if isinstance(target, OpOverload):
        library, _, name = target._schema.name.partition("::")
        if library != "aten":
            return Call(f"{library}.{name}", args, kwargs, module, kind, original=f"{library}.{name}")
    elif isinstance(target, str):
        name = target
    else:
        name = getattr(target, "__name__", str(target))
        in_place = name in ("iadd", "isub", "imul", "itruediv", "setitem") or _says_inplace(target, args, kwargs)
    if name.endswith("_") and not name.endswith("__"):
        name, in_place = name[:-1], True
    original = f"aten.{name}"
    name = _SPELLINGS.get(name, name)
    if target is functional.batch_norm:
        order = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
        given = _bound(target, args, kwargs)
        args, kwargs = tuple(given.get(one) for one in order), {}
    elif target is functional.instance_norm:
        given = _bound(target, args, kwargs)
        args, kwargs = tuple(given.get(one) for one in ("input", "weight", "bias")), {}
    elif target is functional.embedding:
        given = _bound(target, args, kwargs)
        args, kwargs = (given["weight"], given["input"]), {}
    elif name == "_native_batch_norm_legit_no_training":
        name, args = "batch_norm", (*args[:5], False, *args[5:])
    elif name in ("convolution", "_convolution"):
        name, args = _plain_convolution(args)
    return Call(name, args, kwargs, module, kind, in_place, original)


def _says_inplace(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return getattr(target, "__module__", "") == "torch.nn.functional" and bool(
        _bound(target, args, kwargs).get("inplace", False)
    )


def _bound(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a Python function by name, with the defaults of those that were left out."""
    try:
        bound = inspect.signature(target).bind(*args, **kwargs)
    except (TypeError, ValueError):  # built in, without a signature
        return dict(kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _plain_convolution(args: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
    """``convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)``."""
    data, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args[:9]
    if transposed:
        return f"conv_transpose{len(stride)}d", (data, weight, bias, stride, padding, output_padding, groups, dilation)
    return f"conv{len(stride)}d", (data, weight, bias, stride, padding, dilation, groups)


def spatial_axes(operation: str) -> int:
    """How many axes a convolution moves along.

    >>> spatial_axes("conv_transpose3d")
    3
    """
    found = re.search(r"(\d)d$", operation)
    return int(found[1]) if found else 0


def is_padded(padding: Any, kernel: Iterable[int]) -> bool:
    """Whether a convolution adds anything around what it takes."""
    if isinstance(padding, str):
        return padding == "same" and any(size != 1 for size in kernel)
    return any(size != 0 for size in (padding if isinstance(padding, (tuple, list)) else (padding,)))
