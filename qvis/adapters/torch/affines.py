"""Finds the factors and shifts of normalizations by numbers of their own input: layer, RMS, group and instance.

Also of those that are written out, such as ``self.weight * x * torch.rsqrt(...)``.

They are named as their nodes in the graph. Left out are those of which a number is held under several names, or is used
for something else too: writing it would change that as well.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from qvis.adapters.torch.calls import type_of
from qvis.adapters.torch.tensors import identity
from qvis.layers import FloatArray

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qvis.adapters.torch.exported import Program

Affine = tuple["FloatArray | None", "FloatArray | None"]
"""Factor and shift, (channels,) each, float64 as it is, all others as float32; None for one that it has not."""

_MODULES = ("LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d")
_OPERATIONS = {"aten.layer_norm", "aten.native_layer_norm", "aten.rms_norm", "aten._fused_rms_norm"}
_OPERATIONS |= {"aten.group_norm", "aten.native_group_norm", "aten.instance_norm"}


def affines_of_module(model: nn.Module) -> dict[str, Affine]:
    """Of the modules that torch has for it, of those derived from them, and of those that write it out."""
    from torch import nn

    from qvis.adapters.torch import _walk

    kinds = tuple(getattr(nn, name) for name in _MODULES)
    walked = list(_walk(model))
    names = Counter(identity(one) for _, module in walked for one in module._parameters.values() if one is not None)
    found: dict[str, Affine] = {}
    for name, module in walked:
        scale, shift = (module._parameters.get(one) for one in ("weight", "bias"))
        alone = all(one is None or names[identity(one)] == 1 for one in (scale, shift))
        if (isinstance(module, kinds) or _may_write_out(module)) and scale is not None and alone:
            found[name or "(root)"] = _numbers(scale), None if shift is None else _numbers(shift)
    return found


def _may_write_out(module: nn.Module) -> bool:
    """Whether a module's forward pass is its own, and all its parameters are a factor and maybe a shift.

    Whether it is a normalization is for the graph to tell.
    """
    held = {key: one for key, one in module._parameters.items() if one is not None}
    vectors = set(held) <= {"weight", "bias"} and all(one.ndim == 1 for one in held.values())
    return vectors and "bias" not in module._buffers and not type_of(type(module))


def affines_of_program(program: Program) -> dict[str, Affine]:
    """Of the operations whose numbers are the ``weight`` and the ``bias`` of one module."""
    uses = Counter(value for call in program.calls for values in call.tensors.values() for value in values)
    names = Counter(source.key for source in {**program.parameters, **program.buffers}.values())
    found: dict[str, Affine] = {}
    for call in program.calls:
        if call.operation not in _OPERATIONS or not call.tensors.get("weight"):
            continue
        values = [*call.tensors["weight"], *call.tensors.get("bias", ())]
        paths = [program.origins.get(value, "") if uses[value] == 1 else "" for value in values]
        owner = paths[0].rpartition(".")[0]
        sources = [program.source(path) for path in paths]
        alone = all(one is not None and names[one.key] == 1 for one in sources)
        if alone and paths == [".".join(filter(None, (owner, one))) for one in ("weight", "bias")[: len(paths)]]:
            scale, *shift = (_numbers(one.get()) for one in sources if one is not None)
            found[owner or "(root)"] = scale, shift[0] if shift else None
    return found


def _numbers(tensor: Tensor) -> FloatArray:
    import torch

    kind = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    numbers: FloatArray = tensor.detach().cpu().to(kind).numpy()
    return numbers
