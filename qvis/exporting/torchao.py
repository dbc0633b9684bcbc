"""The widths as a configuration of torchao."""

from __future__ import annotations

from qvis.addressing import module_names
from qvis.exporting.widths import Widths
from qvis.exporting.written import Written
from qvis.layers import Layer, Network
from qvis.noise import Granularity

_OPS = ("Linear", "Embedding")
_MOST_BITS = 8

_BEFORE = """\
from collections import OrderedDict

import torch
from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup, quantize_


def weights(bits, granularity):
    dtype = getattr(torch, f"int{bits}")
    return IntxWeightOnlyConfig(dtype, granularity, MappingType.SYMMETRIC_NO_CLIPPING_ERR)


widths = OrderedDict([
"""
_AFTER = """\
])
quantize_(model, FqnToConfig(widths), filter_fn=None)
"""
_HINTS = (
    "torchao also uses the code -2^(bits-1), so that its step is smaller, by up to 1/2^(bits-1) of it, where the "
    "weight of largest size in a channel or group is negative, and the same elsewhere; nothing is clipped",
    "needs a torchao that has FqnToConfig; older ones call it ModuleFqnToConfig",
)


def write_torchao(widths: Widths) -> Written:
    """A script for a model in memory. Tried with torchao 0.18 on Linear and Embedding.

    The same tensor under two names is two modules to it, so that each of them is named.
    """
    told = module_names(widths.network, "torchao")
    missing: dict[str, str] = {}
    changed: dict[str, str] = {}
    lines: list[str] = []
    for layer, grid in widths.rounded():
        why = told.missing.get(layer.name) or _obstacle(widths.network, layer, grid.bits, grid.granularity)
        if why:
            missing[layer.name] = why
            continue
        if grid.granularity == "tensor":
            changed[layer.name] = "has a grid for each channel, since torchao has none for a whole tensor here"
        sharing = "PerAxis(0)" if isinstance(grid.granularity, str) else f"PerGroup({grid.granularity})"
        config = f"weights({grid.bits}, {sharing})"
        lines += [f"    ({name!r}, {config}),\n" for name in (layer.name, *layer.aliases)]
    return Written(f"{_BEFORE}{''.join(lines)}{_AFTER}" if lines else "", ".py", missing, changed, _HINTS)


def _obstacle(network: Network, layer: Layer, bits: int, granularity: Granularity) -> str:
    """Why torchao cannot round a layer so; empty where it can."""
    if layer.op not in _OPS:
        return f"torchao rounds {' and '.join(_OPS)} to single widths, and this is {layer.op}; it stays in float"
    if bits > _MOST_BITS:
        return f"torchao rounds to {_MOST_BITS} bits at most, and {bits} were chosen; it stays in float"
    row = layer.shape[-1]
    if isinstance(granularity, int) and row % granularity:
        return (
            f"torchao wants rows that groups of {granularity} divide, and these have {row} weights; it stays in float"
        )
    if layer.name.startswith("re:") or layer.name == "_default":
        return "torchao would take its name for a pattern; rename the module"
    parent, _, last = layer.name.rpartition(".")
    if last == "out_proj" and any(_is_attention(one, parent) for one in network.layers):
        return "torchao 0.18 cannot run nn.MultiheadAttention with its out_proj rounded; it stays in float"
    return ""


def _is_attention(layer: Layer, module: str) -> bool:
    return layer.op == "MultiheadAttention" and layer.name.startswith(f"{module}." if module else "")
