"""From one PyTorch tensor to one :class:`~qvis.layers.Layer`: what the module reader and the graph reader share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from qvis.adapters.torch.parts import Part
from qvis.errors import UnsupportedModelError
from qvis.layers import FloatArray, Layer, Network, Skipped

if TYPE_CHECKING:
    from torch import Tensor

    from qvis.adapters.torch.parts import View


SCALE = "input_scale"
"""The buffer by which a Linear that qvis has made multiplies what enters it."""


@dataclass(frozen=True)
class Source:
    """Where the numbers of a tensor come from."""

    get: Callable[[], Tensor]
    """Returns the tensor, or computes it; never changes the model."""
    key: Hashable
    """Equal for two tensors exactly when they are the same numbers in the same memory."""
    notes: tuple[str, ...] = ()
    stored: str = ""
    """The type that is stored, where :attr:`get` computes another."""

    @classmethod
    def of(cls, tensor: Tensor) -> Source:
        """A tensor that the model holds."""
        return cls(lambda: tensor, identity(tensor))


def identity(tensor: Tensor) -> Hashable:
    """The tensor's place in memory, or the object itself where it has none (wrappers of other tensors)."""
    from torch.nn.parameter import is_lazy

    if is_lazy(tensor):
        return id(tensor)
    try:
        place = tensor.data_ptr()
    except RuntimeError:
        place = 0
    if place == 0:
        return id(tensor)
    return str(tensor.device), place, tensor.dtype, tuple(tensor.shape), tensor.stride()


def count(parameters: Iterable[Tensor]) -> int:
    """How many numbers the parameters hold, tied ones once and uninitialized ones not at all."""
    from torch.nn.parameter import is_lazy

    return sum({identity(one): one.numel() for one in parameters if not is_lazy(one)}.values())


def unpickle(file: Path | BinaryIO, *, mapped: bool = False) -> Any:
    """What ``torch.save`` wrote, as long as it is tensors in plain containers; ``mapped`` into memory, not copied.

    Raises ``pickle.UnpicklingError`` for anything else, without running it.
    """
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about a file before it refuses it
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


def framework() -> str:
    """The installed PyTorch, such as ``PyTorch 2.13.0``."""
    import torch

    return f"PyTorch {torch.__version__.partition('+')[0]}"


@dataclass
class Collector:
    """Gathers the layers of one model: each tensor once, further names of it as aliases."""

    layers: dict[Hashable, Layer] = field(default_factory=dict)
    skipped: dict[str, Skipped] = field(default_factory=dict)

    def add(self, name: str, source: Source, part: Part, bias: tuple[Source, Part] | None = None) -> None:
        """Add one matrix of a tensor; ``name`` is that of the layer, which may add a ``bias`` to its channels."""
        key = (source.key, part.label)
        known = self.layers.get(key)
        if known is not None:
            self.layers[key] = _with_alias(known, name, part)
            return
        tensor = source.get()
        reason = _obstacle(tensor, name, part.op)
        if reason is not None:
            self.skip(name, reason)
            return
        stored = _stored_type(tensor)
        self.layers[key] = Layer(
            name=name,
            op=part.op,
            shape=_shape(tensor, part),
            dtype=source.stored or stored or _name(tensor.dtype),
            read=lambda: _array(source.get(), part.view),
            channels=part.channels,
            notes=source.notes + ((f"dequantized from {stored}",) if stored else ()),
            bias=None if bias is None else lambda: _array(bias[0].get(), bias[1].view),
        )

    def skip(self, name: str, reason: str) -> None:
        """Say why a weight is not among the layers."""
        self.skipped.setdefault(name, Skipped(name, reason))

    def network(self, name: str, framework: str, parameters: int) -> Network:
        """What was gathered, in the order it came."""
        return Network(name, framework, tuple(self.layers.values()), tuple(self.skipped.values()), parameters)


def _with_alias(layer: Layer, name: str, part: Part) -> Layer:
    if name == layer.name or name in layer.aliases:
        return layer
    notes = layer.notes
    if part.channels != layer.channels:
        # A decoder that shares the encoder's weight reads it along the other axis: one entry can only show one of them.
        notes = (*notes, f"{name} ({part.op}) uses the same tensor with its output channels along {part.channels}")
    return replace(layer, aliases=(*layer.aliases, name), notes=notes)


def _obstacle(tensor: Tensor, name: str, op: str) -> str | None:
    """Raise for a tensor without readable numbers; return why one is to be skipped; None for a good one."""
    import torch
    from torch.nn.parameter import is_lazy

    def refuse(what: str, way_out: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"model: the weight of layer {name!r} ({op}) {what}; {way_out}")

    if is_lazy(tensor):
        raise refuse("is not initialized yet", "run the model once on an example input, then pass it again")
    kinds = {cls.__name__ for cls in type(tensor).__mro__}
    if "DTensor" in kinds:
        raise refuse("is spread over several devices (DTensor)", "gather it first, for example with .full_tensor()")
    if tensor.is_meta or "FakeTensor" in kinds:
        raise refuse("has a shape but no numbers (meta device)", "load the weights first, then pass the model")
    if tensor.layout != torch.strided:
        raise refuse(f"is sparse ({_name(tensor.layout)})", "make it dense first, with .to_dense()")
    if tensor.ndim < 2:
        return f"has {tensor.ndim} axes where {op} has at least 2: it is packed or sharded"
    if tensor.numel() == 0:
        return f"has no elements, shape {tuple(tensor.shape)}"
    if tensor.dtype.is_complex:
        return f"is complex ({_name(tensor.dtype)}), and qvis reads real weights"
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1 and "float8" not in str(tensor.dtype):
        return f"packs several numbers into a byte ({_name(tensor.dtype)}), which PyTorch cannot convert"
    if _stored_type(tensor) is None and not tensor.dtype.is_floating_point:
        return f"holds integers ({_name(tensor.dtype)}) that do not say how to turn them back into weights"
    return None


def _stored_type(tensor: Tensor) -> str | None:
    """The type a quantized tensor stores, None for a tensor that holds its numbers as they are."""
    import torch

    if tensor.is_quantized:
        return _name(tensor.dtype)
    if type(tensor).dequantize is not torch.Tensor.dequantize:
        return type(tensor).__name__
    return None


def _shape(tensor: Tensor, part: Part) -> tuple[int, ...]:
    """The tensor's own shape; of one matrix among several, that matrix's."""
    if not part.label:
        return tuple(tensor.shape)
    import torch

    return tuple(part.view(torch.empty(tensor.shape, device="meta")).shape)


def _array(tensor: Tensor, view: View) -> FloatArray:
    """The numbers that ``view`` makes of a tensor, float64 as it is and all others as float32; read-only."""
    import torch

    with torch.no_grad():
        tensor = tensor.detach()
        if _stored_type(tensor) is not None:
            tensor = tensor.dequantize()
        tensor = tensor.cpu()
        if tensor.dtype != torch.float64:
            tensor = tensor.to(torch.float32)
        array: FloatArray = view(tensor).resolve_neg().numpy()
    array.flags.writeable = False
    return array


def _name(kind: object) -> str:
    return str(kind).removeprefix("torch.")
