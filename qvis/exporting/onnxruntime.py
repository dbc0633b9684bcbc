"""The widths as options of ONNX Runtime's quantization."""

from __future__ import annotations

from qvis.addressing import is_onnx, node_names
from qvis.exporting.widths import Widths, axis_of_channels
from qvis.exporting.written import Written
from qvis.layers import Layer
from qvis.noise import WeightGrid

_WIDTHS = (4, 8, 16)
_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather")

_TEXT = """\
import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import QuantType, quantize_static

widths = {{  # bits of each initializer, and the axis along which each channel has a step of its own
{widths}}}
in_float = [{in_float}]


def overrides(path):
    types = {{4: QuantType.QInt4, 8: QuantType.QInt8, 16: QuantType.QInt16}}
    found = {{}}
    for tensor in onnx.load(path).graph.initializer:
        if tensor.name in widths:
            bits, axis = widths[tensor.name]
            sizes = np.abs(numpy_helper.to_array(tensor))
            sizes = sizes.reshape(1, -1) if axis is None else np.moveaxis(sizes, axis, 0).reshape(sizes.shape[axis], -1)
            steps = sizes.max(axis=1) / (2 ** (bits - 1) - 1)
            common = {{"quant_type": types[bits]}} if axis is None else {{"quant_type": types[bits], "axis": axis}}
            found[tensor.name] = [{{**common, "scale": step or 1, "zero_point": 0}} for step in steps]
    return found


quantize_static(
    "model.onnx",
    "model.quantized.onnx",
    calibration_data_reader,
    nodes_to_exclude=in_float,
    extra_options={{"TensorQuantOverrides": overrides("model.onnx")}},
)
"""
_HINT = (
    "give the file that qvis read, since quant_pre_process may name nodes and initializers anew; quantize_static also "
    "rounds what enters the layers, to 8 bits"
)


def write_onnxruntime(widths: Widths) -> Written:
    """A script for a file. Tried with onnxruntime 1.31.

    Its own rule for steps would be coarser at 4 bits than qvis' grid, and clip: the range is taken to have 15 steps
    around zero, of which only 14 are. Steps are therefore computed in the script.
    """
    missing: dict[str, str] = {}
    changed: dict[str, str] = {}
    lines: list[str] = []
    for layer, grid in widths.rounded():
        why = _obstacle(widths, layer, grid)
        if why:
            missing[layer.name] = why
            continue
        bits = next(bits for bits in _WIDTHS if bits >= grid.bits)
        if bits != grid.bits:
            changed[layer.name] = f"gets {bits} bits in place of {grid.bits}, the next width that ONNX Runtime has"
        axis = axis_of_channels(layer) if grid.granularity == "channel" else None
        lines.append(f"    {layer.tensor!r}: ({bits}, {axis}),\n")
    nodes = node_names(widths.network, "ONNX Runtime")
    kept = [*widths.in_float(), *(layer for layer, _ in widths.rounded() if layer.name in missing)]
    names = dict.fromkeys(name for layer in kept for name in nodes.names.get(layer.name, ()))
    for layer in kept if lines else ():
        if layer.name in nodes.missing and layer.op in _OPS:
            changed[layer.name] = f"gets 8 bits, since it cannot be excluded: {nodes.missing[layer.name]}"
    in_float = "".join(f"\n    {name!r}," for name in names) + ("\n" if names else "")
    text = _TEXT.format(widths="".join(lines), in_float=in_float) if lines else ""
    return Written(text, ".py", missing, changed, (_HINT,))


def _obstacle(widths: Widths, layer: Layer, grid: WeightGrid) -> str:
    """Why ONNX Runtime cannot be told; empty where it can."""
    if not is_onnx(widths.network):
        return "ONNX Runtime wants names of initializers, which an exported file has; run qvis on the .onnx file"
    if layer.op not in _OPS:
        return f"quantize_static rounds the weights of {', '.join(_OPS)}, and this is {layer.op}"
    if not layer.tensor:
        return "no initializer goes into its node just as it is stored; fold constants, or quantize the float model"
    if isinstance(grid.granularity, int):
        return "quantize_static has no groups of a layer's own; choose a grid for each channel"
    if grid.granularity == "channel" and layer.op == "Gather":
        return "quantize_static rounds an embedding on one grid for the tensor; choose that"
    if grid.granularity == "channel" and axis_of_channels(layer) is None:
        return f"quantize_static wants the channels along one axis, and these lie along {layer.channels}"
    return ""
