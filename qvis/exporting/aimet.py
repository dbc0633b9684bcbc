"""The widths as encodings that AIMET loads."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from qvis.addressing import is_onnx, module_names
from qvis.exporting.widths import Widths, axis_of_channels, scales_of
from qvis.exporting.written import Written
from qvis.layers import Layer
from qvis.noise import WeightGrid

_MODULES = ("Linear", "Embedding", *(f"Conv{kind}{n}d" for kind in ("", "Transpose") for n in (1, 2, 3)))
_NODES = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather")

_TORCH_HINT = (
    'AIMET fixes the shapes of its quantizers when it makes them: give them those under "quantizers" before '
    "load_encodings, as the documentation shows, and none to what is not there, which stays in float"
)
_ONNX_HINT = (
    "load it with aimet_onnx.quantsim.load_encodings_to_sim(sim, path, strict=False); all that is not in it stays in "
    "float, what enters the layers too, unless disable_missing_quantizers=False"
)


def write_aimet(widths: Widths) -> Written:
    """Encodings of parameters, for aimet-torch or, of a model that was read from ONNX, for aimet-onnx."""
    return _for_onnx(widths) if is_onnx(widths.network) else _for_torch(widths)


def _for_torch(widths: Widths) -> Written:
    """Tried with aimet-torch 2.42, whose load_encodings takes this form alone: a list for each parameter.

    It reads the ends of the range; 2^bits - 1 steps lie between them, so that there is one more code than qvis' grid
    has, and no weight gets it.
    """
    told = module_names(widths.network, "AIMET")
    missing: dict[str, str] = {}
    encodings: dict[str, list[dict[str, Any]]] = {}
    quantizers: dict[str, dict[str, Any]] = {}
    for layer, grid in widths.rounded():
        why = told.missing.get(layer.name) or _obstacle(layer, grid, _MODULES)
        if why:
            missing[layer.name] = why
            continue
        scales = scales_of(layer, grid)
        for name in (layer.name, *layer.aliases):
            encodings[f"{name}.weight"] = [_encoding(float(scale), grid.bits) for scale in scales.reshape(-1)]
            quantizers[f"{name}.weight"] = _quantizer(layer, grid, scales.shape)
    document = {
        "version": "0.6.1",
        "activation_encodings": {},
        "param_encodings": encodings,
        "quantizers": quantizers,
    }
    return Written(_dumped(document) if encodings else "", ".json", missing, {}, (_TORCH_HINT,))


def _encoding(scale: float, bits: int) -> dict[str, Any]:
    lowest = -(2 ** (bits - 1))
    return {
        "bitwidth": bits,
        "dtype": "int",
        "is_symmetric": "True",
        "min": lowest * scale,
        "max": (-lowest - 1) * scale,
        "scale": scale,
        "offset": lowest,
    }


def _quantizer(layer: Layer, grid: WeightGrid, scales: tuple[int, ...]) -> dict[str, Any]:
    """The shape that a quantizer must have to take the scales in their order."""
    if grid.granularity == "tensor":
        shape: list[int] = []
    elif grid.granularity == "channel":
        shape = [scales[0] if axis == axis_of_channels(layer) else 1 for axis in range(len(layer.shape))]
    else:
        return {"bits": grid.bits, "shape": list(scales), "block_size": [1, grid.granularity]}
    return {"bits": grid.bits, "shape": shape, "block_size": None}


def _for_onnx(widths: Widths) -> Written:
    """Tried with aimet-onnx 2.42."""
    missing: dict[str, str] = {}
    encodings: list[dict[str, Any]] = []
    for layer, grid in widths.rounded():
        why = _obstacle(layer, grid, _NODES)
        if not why and not layer.tensor:
            why = "no initializer goes into its node just as it is stored; fold constants, or give the float model"
        if not why and layer.op == "Gather" and grid.granularity != "tensor":
            why = "AIMET rounds an embedding in ONNX on one grid for the tensor; choose that"
        if why:
            missing[layer.name] = why
        else:
            encodings.append(_encoding_2(layer, grid))
    document = {"version": "2.0.0", "encodings": encodings}
    return Written(_dumped(document) if encodings else "", ".json", missing, {}, (_ONNX_HINT,))


def _encoding_2(layer: Layer, grid: WeightGrid) -> dict[str, Any]:
    scales, axis = scales_of(layer, grid), axis_of_channels(layer)
    encoding: dict[str, Any] = {"name": layer.tensor, "output_dtype": f"int{grid.bits}"}
    if grid.granularity == "tensor":
        return {**encoding, "y_scale": float(scales)}
    if grid.granularity == "channel":
        return {**encoding, "y_scale": scales.tolist(), "axis": axis}
    # of a matrix, whose blocks lie along the other axis
    arranged = scales if axis == 0 else np.swapaxes(scales, 0, 1)
    return {**encoding, "y_scale": arranged.tolist(), "axis": 1 - (axis or 0), "block_size": grid.granularity}


def _obstacle(layer: Layer, grid: WeightGrid, ops: tuple[str, ...]) -> str:
    """Why AIMET cannot be told; empty where it can."""
    if layer.op not in ops:
        return f"AIMET is told of {', '.join(ops)}, and this is {layer.op}"
    if grid.granularity != "tensor" and axis_of_channels(layer) is None:
        return f"AIMET wants the channels along one axis, and these lie along {layer.channels}"
    if isinstance(grid.granularity, int):
        if len(layer.shape) != 2:
            return "AIMET's blocks hold input channels alone, and groups of a convolution run over its kernel as well"
        elements = layer.weight.shape[1]
        if elements % grid.granularity:
            return f"AIMET wants rows that blocks of {grid.granularity} divide, and these have {elements} weights"
    return ""


def _dumped(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1, allow_nan=False) + "\n"
