"""Unpacks weights of 2, 4 or 8 bits that GPTQ and AWQ store as 32-bit integers.

Both keep four tensors in place of a Linear's ``weight (out, in)``; ``n = 32 / bits`` codes share an integer:

- GPTQ (AutoGPTQ, GPTQModel): ``qweight (in/n, out)``, where an integer holds n consecutive inputs, the first in its
  lowest bits; ``qzeros (groups, out/n)``, alike along the outputs; ``scales (groups, out)``; ``g_idx (in,)``, the group
  of each input. Format "gptq" stores zero points less one, "gptq_v2" as they are.
- AWQ (AutoAWQ, version "gemm"): ``qweight (in, out/8)`` and ``qzeros (groups, out/8)``, where an integer holds the
  outputs 0, 2, 4, 6, 1, 3, 5, 7 of each eight, from its lowest bits on; ``scales (groups, out)``.

The weight is (code - zero point) * scale. The code that writes them describes the formats: ``pack`` of AutoGPTQ's
``qlinear_cuda_old.py`` and of AutoAWQ's ``gemm.py``, and by Transformers' ``GPTQConfig`` and ``AwqConfig``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from qvis.adapters.checkpoint.stored import Array, Stored

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output, among eight, that each four bits of an integer belong to."""
_ROWS = 256
"""Outputs that are dequantized at a time."""


class Parts(NamedTuple):
    """The tensors that stand for one weight."""

    codes: Stored
    zeros: Stored
    scales: Stored
    groups: Stored | None


@dataclass(frozen=True)
class Scheme:
    """How one weight is packed."""

    method: str
    """``GPTQ`` or ``AWQ``."""
    bits: int
    inputs: int
    outputs: int
    groups: int
    group_size: int
    offset: int
    """What is to be added to a stored zero point."""


def find(tensors: Mapping[str, Stored]) -> dict[str, Parts | str]:
    """The packed weights by the name of their module; of those that lack a part, the reason to skip them."""
    found: dict[str, Parts | str] = {}
    for name, codes in tensors.items():
        owner, _, last = name.rpartition(".")
        if last == "qweight":
            zeros, scales = (tensors.get(f"{owner}.{part}".lstrip(".")) for part in ("qzeros", "scales"))
            if zeros is None or scales is None:
                found[owner] = "is packed, and has no 'qzeros' or no 'scales' beside it"
            else:
                found[owner] = Parts(codes, zeros, scales, tensors.get(f"{owner}.g_idx".lstrip(".")))
    return found


def unpacked(owner: str, parts: Parts, settings: Mapping[str, Any]) -> Stored | str:
    """The weight that the parts stand for, or the reason why they cannot be read.

    ``settings`` are those of the quantization, as the model's configuration has them.
    """
    scheme = _scheme(parts, settings)
    if isinstance(scheme, str):
        return scheme
    how = f"in groups of {scheme.group_size} inputs" if scheme.group_size else f"in {scheme.groups} groups of inputs"
    return Stored(
        f"{owner}.weight".lstrip("."),
        (scheme.outputs, scheme.inputs),
        f"int{scheme.bits}",
        partial(dequantize, parts, scheme),
        op="Linear",
        notes=(f"dequantized from {scheme.method}, {scheme.bits} bits {how}",),
    )


def _scheme(parts: Parts, settings: Mapping[str, Any]) -> Scheme | str:
    codes, zeros, scales, groups = parts
    if not codes.dtype == zeros.dtype == "int32" or scales.obstacle:
        return f"is packed in a way that qvis does not know ({codes.dtype} codes, {scales.dtype} scales)"
    if not all(len(one.shape) == 2 and one.size for one in (codes, zeros, scales)):
        return "is packed in a way that qvis does not know (its parts are no matrices)"
    count, outputs = scales.shape
    bits = _exactly(32 * zeros.shape[1], outputs)
    method = str(settings.get("quant_method", "")).lower()
    known = {2, 4, 8} if codes.shape[1] == outputs else {4}
    if zeros.shape[0] != count or bits not in known or settings.get("bits", settings.get("w_bit", bits)) != bits:
        return f"is packed in a way that qvis does not know (scales {scales.shape}, zero points {zeros.shape})"
    if codes.shape[1] == outputs and method in ("", "gptq"):
        inputs = codes.shape[0] * 32 // bits
        offset = _offset(zeros, bits, str(settings.get("checkpoint_format", "" if not settings else "gptq")))
        if isinstance(offset, str):
            return offset
        group_size = _group_size(inputs, count, settings)
        if groups is not None and (groups.shape != (inputs,) or not _all_below(groups, count)):
            return "is packed by GPTQ, and its g_idx does not give the group of each input"
        if groups is None and not group_size:
            return f"is packed by GPTQ, and {inputs} inputs do not divide into {count} groups"
        return Scheme("GPTQ", bits, inputs, outputs, count, group_size, offset)
    if codes.shape[1] * 8 == outputs and method in ("", "awq"):
        if str(settings.get("version", "gemm")).lower() != "gemm":
            return f"is packed by AWQ for {settings['version']!r}, of which qvis does not know the order"
        inputs = codes.shape[0]
        group_size = _group_size(inputs, count, settings)
        if not group_size:
            return f"is packed by AWQ, and {inputs} inputs do not divide into {count} groups"
        return Scheme("AWQ", 4, inputs, outputs, count, group_size, 0)
    return f"is packed in a way that qvis does not know (codes {codes.shape}, scales {scales.shape})"


def _exactly(one: int, other: int) -> int:
    """The quotient, 0 where there is a remainder."""
    return 0 if one % other else one // other


def _group_size(inputs: int, count: int, settings: Mapping[str, Any]) -> int:
    """Inputs in a group, 0 where that is not certain; only the last group may be smaller, and only if so configured."""
    size = settings.get("group_size", settings.get("q_group_size"))
    if type(size) is int and size > 0:
        return size if -(-inputs // size) == count else 0
    return _exactly(inputs, count)


def _all_below(groups: Stored, count: int) -> bool:
    index = groups.read()
    return index.dtype.kind in "iu" and bool((index >= 0).all() and (index < count).all())


def _offset(zeros: Stored, bits: int, checkpoint_format: str) -> int | str:
    """What is to be added to stored zero points. Without a configuration only symmetric ones tell it by themselves."""
    if checkpoint_format in ("gptq", "gptq_v2"):
        return int(checkpoint_format == "gptq")
    if checkpoint_format:
        return f"is packed by GPTQ in the format {checkpoint_format!r}, which qvis does not know"
    stored = _along_columns(zeros.read(), bits)
    for offset in (1, 0):
        if (stored == 2 ** (bits - 1) - offset).all():
            return offset
    return (
        "is packed by GPTQ, and without a quantization_config in a config.json beside it nothing says whether its "
        "zero points are stored less one"
    )


def dequantize(parts: Parts, scheme: Scheme) -> Array:
    """The weight (out, in) as float32."""
    shifts = np.arange(0, 32, scheme.bits, dtype=np.uint32)
    mask = np.uint32(2**scheme.bits - 1)
    if scheme.method == "GPTQ":
        packed = np.ascontiguousarray(parts.codes.read().view(np.uint32).T)  # (out, in / n)
        codes = np.empty((scheme.outputs, scheme.inputs), dtype=np.uint8)
        for place, shift in enumerate(shifts):
            codes[:, place :: len(shifts)] = (packed >> shift) & mask
        zeros = _along_columns(parts.zeros.read(), scheme.bits)
    else:
        codes = np.ascontiguousarray(_awq_order(parts.codes.read()).T)
        zeros = _awq_order(parts.zeros.read())
    # With a format that stores zero points less one, zero itself is stored as all ones.
    zero_points = ((zeros + scheme.offset) & mask).astype(np.float32).T  # (out, groups)
    scales = parts.scales.read().astype(np.float32, copy=False).T
    group = np.arange(scheme.inputs) // scheme.group_size if parts.groups is None else parts.groups.read()
    weight = np.empty((scheme.outputs, scheme.inputs), dtype=np.float32)
    with np.errstate(all="ignore"):
        for start in range(0, scheme.outputs, _ROWS):
            rows = slice(start, start + _ROWS)
            np.subtract(codes[rows], zero_points[rows][:, group], out=weight[rows])
            weight[rows] *= scales[rows][:, group]
    return weight


def _along_columns(packed: Array, bits: int) -> Array:
    """``(rows, columns) -> (rows, columns * n)``, the first code in the lowest bits."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes: Array = (packed.view(np.uint32)[:, :, None] >> shifts) & np.uint32(2**bits - 1)
    return codes.astype(np.uint8).reshape(packed.shape[0], -1)


def _awq_order(packed: Array) -> Array:
    """``(rows, columns) -> (rows, columns * 8)``, each code at its own output."""
    codes = np.empty((*packed.shape, 8), dtype=np.uint8)
    for place, output in enumerate(AWQ_ORDER):
        codes[:, :, output] = (packed.view(np.uint32) >> np.uint32(4 * place)) & np.uint32(15)
    return codes.reshape(packed.shape[0], -1)
