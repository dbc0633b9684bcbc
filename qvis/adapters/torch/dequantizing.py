"""The weights of quantized programs, which hold integers and turn them into weights when they run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from qvis.adapters.torch.tensors import Source

if TYPE_CHECKING:
    from torch import Tensor

    from qvis.adapters.torch.exported import Program

DEQUANTIZE = {
    "quantized_decomposed.dequantize_per_tensor": False,
    "quantized_decomposed.dequantize_per_channel": True,
}
"""Operations that turn integers into weights, and whether each channel has a step of its own."""


def dequantized(program: Program) -> dict[str, Source]:
    """The integers that a program turns into weights, as these weights, by the paths of the integers."""
    found: dict[str, Source] = {}
    for call in program.calls:
        if call.operation not in DEQUANTIZE:
            continue
        path, step, zero = (
            next((program.origins[one] for one in call.tensors.get(name, ()) if one in program.origins), "")
            for name in ("input", "scales", "zero_points")
        )
        stored = program.source(path)
        if stored is None:
            continue
        steps, zeros = program.source(step), program.source(zero)
        scale = steps.get if steps is not None else partial(_number, call.numbers.get("scale", 1))
        offset = zeros.get if zeros is not None else partial(_number, call.numbers.get("zero_point", 0))
        axis = int(call.numbers.get("axis", 0)) if DEQUANTIZE[call.operation] else None
        most = int(call.numbers.get("quant_max", 127)) - int(call.numbers.get("quant_min", -128))
        kind = str(stored.get().dtype).removeprefix("torch.")
        note = f"dequantized from {kind}"
        if most.bit_length() < 8:
            note += f", of which {most.bit_length()} bits are used"
        get = partial(_dequantize, stored.get, scale, offset, axis)
        found[path] = Source(get, stored.key, (*stored.notes, note), kind)
    for path, stored in program.buffers.items():
        scales = program.buffers.get(f"{path}_scale")
        # the integers of an IntegerLinear, whose products are multiplied by a scale for each output
        if path not in found and scales is not None and str(stored.get().dtype) == "torch.int8":
            get = partial(_dequantize, stored.get, scales.get, partial(_number, 0), 0)
            found[path] = Source(get, stored.key, (*stored.notes, "dequantized from int8"), "int8")
    return found


def _number(value: float) -> Tensor:
    import torch

    return torch.tensor(value)


def _dequantize(
    get: Callable[[], Tensor], scale: Callable[[], Tensor], zero: Callable[[], Tensor], axis: int | None
) -> Tensor:
    codes = get()
    shape = [-1 if one == axis else 1 for one in range(codes.ndim)] if axis is not None else [1] * codes.ndim
    return (codes.float() - zero().float().reshape(shape)) * scale().float().reshape(shape)


def register_quantized_operations() -> None:
    """Make the operations of quantized programs known to torch, without which it cannot load one."""
    from torch.ao.quantization.fx import _decomposed  # noqa: F401

    if find_spec("torchao") is not None:
        import torchao.quantization.pt2e  # noqa: F401
