"""Weights of integers as torchao has them: made, written to ``.safetensors`` and read again without pickle.

A file of them has the layout of torchao's own ``flatten_tensor_state_dict``, which Transformers writes too: for
``layer.weight`` the parts ``layer._weight_qdata``, ``layer._weight_scale`` and ``layer._weight_zero_point``, and in the
metadata of the file what they are parts of.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvis.adapters.torch.graph import _quiet
from qvis.adapters.torch.saving import write_safetensors
from qvis.adapters.torch.tensors import identity

if TYPE_CHECKING:
    from torch import Tensor, nn

LISTED = "tensor_names"
"""What the metadata of such a file always have: the names of the tensors."""


def weight_in_integers(weight: Tensor, bits: int, granularity: str) -> Tensor:
    """A weight (out, ...) in integers of 2 to 8 bits, one step for each ``channel`` or for the whole ``tensor``.

    The grid is symmetric and covers all numbers, as ``IntxWeightOnlyConfig`` with ``SYMMETRIC_NO_CLIPPING_ERR`` has it.
    """
    with _quiet():
        import torch
        from torchao.quantization import IntxUnpackedToInt8Tensor, MappingType

    shape = tuple(weight.shape)
    block = (1, *shape[1:]) if granularity == "channel" else shape
    found: Tensor = IntxUnpackedToInt8Tensor.from_hp(
        weight.detach(), block, getattr(torch, f"int{bits}"), mapping_type=MappingType.SYMMETRIC_NO_CLIPPING_ERR
    )
    return found


def dynamic_weight(weight: Tensor, bits: int) -> Tensor:
    """A weight of a Linear in integers of 7 or 8 bits for each channel, which rounds what it meets to as many."""
    with _quiet():
        from torchao.quantization import Int8Tensor, PerRow
        from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    reduce = bits < 8
    found: Tensor = Int8Tensor.from_hp(
        weight.detach(),
        granularity=PerRow(),
        act_quant_kwargs=QuantizeTensorToInt8Kwargs(granularity=PerRow(), reduce_range=reduce),
        reduce_range=reduce,
    )
    return found


def is_quantized(tensor: object) -> bool:
    """Whether a tensor is one of those."""
    return type(tensor).__name__ in ("IntxUnpackedToInt8Tensor", "Int8Tensor")


def save_quantized(model: nn.Module, path: Path) -> None:
    """Write the numbers of a module, some of them torchao's tensors. What several names share is written once."""
    with _quiet():
        import torch
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    kept: dict[Any, str] = {}
    ties: dict[str, str] = {}
    inside: dict[str, Tensor] = {}
    outside: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            continue
        first = kept.setdefault(identity(tensor), name)
        if first != name:
            ties[name] = first
            continue
        plain = tensor.data if is_quantized(tensor) else tensor.detach().as_subclass(torch.Tensor)
        # torchao wants names with a module in them, and hands back those that it was not told of
        (inside if "." in name else outside)[name] = plain
    parts, metadata = flatten_tensor_state_dict(inside)
    write_safetensors({**outside, **parts}, path, {**ties, **metadata})


def load_quantized(path: Path) -> dict[str, Tensor] | None:
    """The tensors of such a file by name; None for a ``.safetensors`` file of another kind. Nothing is unpickled."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if LISTED not in metadata:
            return None
        parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    with _quiet():
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    names = json.loads(metadata[LISTED])
    found, others = unflatten_tensor_state_dict(parts, {LISTED: metadata[LISTED], **{n: metadata[n] for n in names}})
    return {**found, **others}
