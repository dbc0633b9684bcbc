"""Quantizes ONNX models with the quantizers of ONNX Runtime.

``post_training`` puts QuantizeLinear and DequantizeLinear around operators, which ONNX Runtime fuses into operators on
integers. Activations are unsigned: with signed ones it leaves some convolutions in float on x86. Layers that it has no
integers for get integers in the file alone, as all do with ``weight_only``. Biases stay floats in the file, where their
integers would take thrice the bytes with steps and zero points; ONNX Runtime rounds them when it loads the model.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from qvis.adapters.encodings import Array
from qvis.adapters.onnx.inputs import split
from qvis.adapters.onnx.prepared import Prepared, prepare
from qvis.adapters.onnx.sessions import compute, session
from qvis.errors import BadArgumentError, QvisError, UnsupportedModelError
from qvis.quantization.backends.onnx_weights import (
    Ready,
    Weight,
    clip,
    make_ready,
    pack,
    pool_means,
    store_as_integers,
    turn_gemms,
)
from qvis.quantization.methods import FLOAT, Epoch, Job
from qvis.words import listed_names

STATIC = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather")
"""What quantize_static rounds the weights of."""
DYNAMIC = ("Gemm", "MatMul", "LSTM", "Attention", "Gather")
"""What quantize_dynamic is asked to; it could also take Conv, which is then several times slower than in float."""
OTHER = "other"
"""What adapters call a parameter that no known operator applies; it stays in float."""
_NORMS = ("LayerNormalization", "SkipLayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
_COMPUTING = ("Gemm", "MatMul", "LSTM", "Attention")
SATURATION = (
    "on x86 processors without VNNI sums of 8-bit products can saturate; there set ONNX Runtime's session option "
    "session.x64quantprecision to 1"
)


def check(job: Job) -> None:
    """Refuse what ONNX Runtime cannot quantize.

    Raises
    ------
    UnsupportedModelError
        Weights cannot be replaced, are no finite float32, or share a tensor with others of another width; or there is
        nothing that ``dynamic`` could quantize.
    NotRunnableError
        ONNX Runtime cannot load the model.
    BadArgumentError
        The model does not take the calibration data, or what it makes of them is not finite.
    """
    prepared = prepare(job.model, UnsupportedModelError)
    _check_weights(job, prepared)
    if job.cell.method == "dynamic":
        _check_dynamic(job, prepared)
    loaded = session(prepared.model)
    for batch in job.calibration[:1]:
        types = {one.name: one.type for one in loaded.get_inputs()}
        parts, _ = split(prepared, types, batch)
        outputs = compute(loaded, [one.name for one in loaded.get_outputs()], parts[0])
        if any(_is_real(one) and not np.isfinite(one).all() for one in outputs):
            raise BadArgumentError(
                "calibration_data: the model's outputs for them are not finite, so that no range can be found; check "
                "how they are scaled"
            )


def convert(job: Job, target: Path) -> tuple[Epoch, ...]:
    """Write the quantized model; see :class:`qvis.quantization.methods.Backend`."""
    methods = {"weight_only": _weight_only, "dynamic": _dynamic, "post_training": _post_training}
    others = [layer.name for layer in job.network.layers if layer.op == OTHER and job.bits.get(layer.name) != FLOAT]
    bits = {name: width for name, width in job.bits.items() if name not in others}
    if others:
        job.notes.append(f"{listed_names(others)}: in float, since nothing is multiplied by it")
    with TemporaryDirectory() as folder, quiet():
        ready = make_ready(prepare(job.model, UnsupportedModelError), bits, job.granularity, Path(folder), job.steps)
        try:
            methods[job.cell.method](job, ready, target, Path(folder) / "ready.onnx")
        except QvisError:
            raise
        except Exception as error:
            why = " ".join(str(error).split())[:300]
            raise UnsupportedModelError(
                f"model: ONNX Runtime's quantizer fails with {type(error).__name__}: {why}; leave layers in float with "
                "exclude, or choose method='weight_only'"
            ) from error
    return ()


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the quantizers log and warn of; progress is still shown."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _check_weights(job: Job, prepared: Prepared) -> None:
    layers = {layer.name: layer for layer in job.network.layers}
    widths: dict[str, tuple[str, int]] = {}
    for name, width in job.bits.items():
        held = prepared.layers.get(name)
        if held is not None:
            other, known = widths.setdefault(held.tensor, (name, width))
            if known != width:
                raise UnsupportedModelError(
                    f"bits: {other!r} and {name!r} lie in one tensor, {held.tensor!r}, and have {known} and {width} "
                    "bits; give them the same width"
                )
        if width == FLOAT or layers[name].op == OTHER:
            continue
        why = prepared.obstacles.get(name, "" if held is not None else "is not found in the graph")
        if not why and layers[name].dtype != "float32":
            why = f"is stored as {layers[name].dtype}; give the model in float32"
        if not why and not np.isfinite(layers[name].weight).all():
            why = "holds NaN or infinite numbers"
        if why:
            raise UnsupportedModelError(f"model: {name!r} {why}; or leave it in float with exclude=[{name!r}]")


def _check_dynamic(job: Job, prepared: Prepared) -> None:
    kinds = {prepared.nodes[use.node].op_type for use in prepared.uses if job.bits.get(use.layer, FLOAT) != FLOAT}
    if not kinds & set(_COMPUTING):
        found = f"only {listed_names(sorted(kinds))}" if kinds else "none"
        raise UnsupportedModelError(
            f"method: dynamic is for products of matrices ({', '.join(_COMPUTING)}), and of the layers to quantize "
            f"this model has {found}; use method='post_training', or 'weight_only' for a smaller file alone"
        )


def _is_real(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.kind == "f"


# ---------------------------------------------------------------------------------------------------------------------
# Methods


def _weight_only(job: Job, ready: Ready, target: Path, between: Path) -> None:  # noqa: ARG001
    store_as_integers(ready.model, ready.rounded())
    _save(ready.model, target)


def _dynamic(job: Job, ready: Ready, target: Path, between: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic  # type: ignore[import-untyped]

    turn_gemms(ready)
    _save(ready.model, between)  # a model in memory would be changed
    quantize_dynamic(
        between,
        target,
        op_types_to_quantize=list(DYNAMIC),
        per_channel=job.granularity == "channel",
        weight_type=QuantType.QInt8,
        nodes_to_exclude=ready.nodes_in_float(),
    )
    left = [weight for weight in ready.rounded() if not weight.kinds & set(DYNAMIC)]
    slow = [weight for weight in left if "Conv" in weight.kinds]
    if slow:
        job.notes.append(
            f"{_names(slow)}: in float, since convolutions on ranges found at run time are several times slower than "
            "in float; use method='post_training', or 'weight_only' for a smaller file alone"
        )
    others = [weight for weight in left if weight not in slow]
    if others:
        job.notes.append(f"{_names(others)}: in float, since ONNX Runtime's quantize_dynamic has no {_kinds(others)}")
    job.notes.append(SATURATION)


def _post_training(job: Job, ready: Ready, target: Path, between: Path) -> None:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = _feeds(job, ready)

        def get_next(self) -> dict[str, Array] | None:
            return next(self.feeds, None)

    rounded = ready.rounded()
    static = [weight for weight in rounded if weight.kinds <= set(STATIC)]
    pool_means(ready)
    static = clip(ready.model, static)
    _save(ready.model, between)
    attends = _attends(ready)
    quantize_static(
        between,
        target,
        Reader(),
        op_types_to_quantize=list(STATIC) if attends else None,
        per_channel=job.granularity == "channel",
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=ready.nodes_in_float(),
        extra_options={
            "TensorQuantOverrides": {one.tensor: _overrides(one, ready) for one in static},
            "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"] if attends else [],
            "QuantizeBias": False,
        },
    )
    written = onnx.load(target)
    pack(written, static)
    left = [weight for weight in rounded if not weight.kinds <= set(STATIC)]
    store_as_integers(written, left)
    if left:
        job.notes.append(
            f"{_names(left)}: integers in the file alone, since ONNX Runtime's quantize_static has no {_kinds(left)}"
        )
    if attends:
        job.notes.append(
            "it has attention or layer normalization, so that only products are computed with integers, and what lies "
            "between them with floats; method='dynamic' is often closer to the float model there"
        )
    job.notes.append(SATURATION)
    _save(written, target)


def _names(weights: Sequence[Weight]) -> str:
    return listed_names([name for weight in weights for name in weight.layers])


def _kinds(weights: Sequence[Weight]) -> str:
    return listed_names(sorted({kind for weight in weights for kind in weight.kinds}))


def _attends(ready: Ready) -> bool:
    """Whether there are masks that no 8-bit grid holds, and sums whose largest numbers are outliers."""
    graph, constants = ready.model.graph, ready.prepared.constants
    kinds = {node.op_type for node in graph.node}
    products = (node for node in graph.node if node.op_type == "MatMul")
    return bool(kinds & set(_NORMS)) or any(not constants.keys() & set(node.input) for node in products)


def _feeds(job: Job, ready: Ready) -> Iterator[dict[str, Array]]:
    types = {one.name: one.type for one in session(ready.model).get_inputs()}
    for batch in job.track(job.calibration, "Calibrating"):
        yield from split(ready.prepared, types, batch)[0]


def _overrides(weight: Weight, ready: Ready) -> list[dict[str, Any]]:
    """The grid of a tensor. Steps of its own for four bits, in bytes at first, keep the codes within four bits.

    Rows of an embedding are activations too, of one step, and unsigned as all of them.
    """
    from onnxruntime.quantization import QuantType

    array = ready.prepared.read(weight.tensor)
    if "Gather" in weight.kinds:
        (step,) = weight.steps(array)
        middle = np.array(2 ** (weight.bits - 1), dtype=np.uint8)
        return [{"quant_type": QuantType.QUInt8, "zero_point": middle, "scale": step}]
    common: dict[str, Any] = {"quant_type": QuantType.QInt8, "zero_point": np.array(0, dtype=np.int8)}
    if weight.axis is not None:
        common["axis"] = weight.axis
    return [{**common, "scale": step} for step in weight.steps(array)]


def _save(model: Any, target: Path) -> None:
    import onnx

    onnx.save_model(model, str(target))
