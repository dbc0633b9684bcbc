"""Layers that stay in float, as the setting of the tool that quantizes.

What each tool is told, and with which version that was tried, stands at its function below. All names are put in as
literals, so that a name in a model cannot become code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qvis.addressing import Model, Told, is_onnx, is_tensorflow, module_names, node_names, nothing
from qvis.errors import BadArgumentError, UnknownLayerError, suggest
from qvis.layers import Analysis
from qvis.words import listed_names

HERE = "LAYERS"
"""Where a setting has the layers; the text around it is written here and holds no other."""


@dataclass(frozen=True)
class Exclusion:
    """A setting to paste into a script or a shell."""

    tool: str
    """A key of :data:`TOOLS`."""
    text: str
    """What to paste; empty where the tool cannot be told any of the layers."""
    language: str
    """``python`` or ``shell``."""
    names: tuple[str, ...]
    """What the tool calls the layers: names of nodes, names of modules, or patterns."""
    missing: tuple[str, ...] = ()
    """The layers that the tool cannot be told."""
    note: str = ""
    """What must be known to use it, and why layers are missing; empty for nothing."""


@dataclass(frozen=True)
class Setting:
    """What one tool is told for a model, with a place for any of its layers.

    The text for some layers is ``before``, their :attr:`items`, each once, with ``between`` in between, and ``after``:
    so the page composes it as well.
    """

    text: str
    """With :data:`HERE` where the layers belong."""
    told: Told
    hint: str = ""
    """What must be known to use it."""
    language: str = "python"
    """``python`` or ``shell``."""
    tool: str = ""
    """A key of :data:`TOOLS`."""

    @property
    def before(self) -> str:
        """What stands before the first layer."""
        return self.text.partition(HERE)[0]

    @property
    def between(self) -> str:
        """What parts two layers: in a list of Python, each has a line."""
        if self.language == "shell":
            return ","
        return ",\n" + self.before.rpartition("\n")[2]

    @property
    def after(self) -> str:
        """What follows the last layer."""
        return self.text.partition(HERE)[2]

    def items(self, layer: str) -> tuple[str, ...]:
        """A layer as it is written in the text: literals of its names, so that a name cannot become code."""
        names = self.told.names.get(layer, ())
        return tuple(f"{name}:fp32" for name in names) if self.language == "shell" else tuple(map(repr, names))

    def fill(self, layers: Sequence[str]) -> Exclusion:
        """Put layers in their place."""
        names = tuple(dict.fromkeys(name for layer in layers for name in self.told.names.get(layer, ())))
        items = dict.fromkeys(item for layer in layers for item in self.items(layer))
        missing: dict[str, list[str]] = {}
        for layer in layers:
            if layer in self.told.missing:
                missing.setdefault(self.told.missing[layer], []).append(layer)
        return Exclusion(
            self.tool,
            f"{self.before}{self.between.join(items)}{self.after}" if items else "",
            self.language,
            names,
            tuple(layer for layer in layers if layer in self.told.missing),
            _joined(*(f"{listed_names(those)}: {why}" for why, those in missing.items()), self.hint if items else ""),
        )


def exclusions(analysis: Model, tool: str = "onnxruntime", layers: str | Sequence[str] | None = None) -> Exclusion:
    """Write down how a tool is told to keep layers in float.

    Parameters
    ----------
    analysis
        What :func:`qvis.analyze` found of the model, or the model as it was read. Its framework and its graph tell what
        other tools call its layers.
    tool
        A key of :data:`TOOLS`.
    layers
        Names of layers; by default those that are a problem or unusable, worst first.

    Raises
    ------
    BadArgumentError
        There is no such tool, or no layer is given and none is a problem.
    UnknownLayerError
        A layer is none of the model's.
    """
    setting = find_setting(analysis, tool)
    if layers is None:
        layers = [one.name for one in analysis.problematic_layers] if isinstance(analysis, Analysis) else []
    wanted = (layers,) if isinstance(layers, str) else tuple(dict.fromkeys(layers))
    if not wanted:
        raise BadArgumentError("layers: none are given and none is a problem; name those that stay in float")
    known = [layer.name for layer in analysis.layers]
    for name in wanted:
        if name not in known:
            raise UnknownLayerError(f"layers: no layer is called {name!r}{suggest(name, known)}")
    return setting.fill(wanted)


def find_setting(analysis: Model, tool: str) -> Setting:
    """What a tool is told for a model, with a place for the layers.

    Raises
    ------
    BadArgumentError
        There is no such tool.
    """
    if tool not in TOOLS:
        raise BadArgumentError(f"tool: got {tool!r}, expected one of {', '.join(TOOLS)}")
    return replace(TOOLS[tool](analysis), tool=tool)


# ---------------------------------------------------------------------------------------------------------------------
# Tools that read ONNX files


def _onnxruntime(model: Model) -> Setting:
    """Tried with onnxruntime 1.31: a node that is named so keeps its weight and its inputs in float."""
    text = """\
from onnxruntime.quantization import quantize_static

quantize_static(
    "model.onnx",
    "model.int8.onnx",
    calibration_data_reader,
    nodes_to_exclude=[
        LAYERS,
    ],
)
"""
    hint = "give the file that qvis read: quant_pre_process fuses nodes and may name them anew"
    return Setting(text, node_names(model, "onnxruntime"), hint)


def _tensorrt(model: Model) -> Setting:
    """As the sources of ModelOpt 0.47 have it, which matches patterns from the start of a name; not tried.

    TensorRT 11 knows no precision of layers any more, and takes what is quantized from the file.
    """
    told = node_names(model, "ModelOpt, which quantizes for TensorRT,")
    text = """\
from modelopt.onnx.quantization import quantize

quantize(
    "model.onnx",
    calibration_data=calibration_data,
    nodes_to_exclude=[
        LAYERS,
    ],
)
"""
    hint = "this is for TensorRT 10 and later; for implicit quantization with TensorRT up to 10 see trtexec"
    return Setting(text, told.written(lambda name: rf"{re.escape(name)}\Z"), hint)


def _trtexec(model: Model) -> Setting:
    """As the sources of trtexec in TensorRT 10 have it; not tried.

    It parts the list at commas, takes single quotes out, and expands stars. Options for this were removed in 11.
    """
    nodes = node_names(model, "trtexec")
    names = {
        layer: tuple(name for name in every if not re.search(r"[,'*]", name)) for layer, every in nodes.names.items()
    }
    why = "trtexec cannot be told names with commas, quotes or stars"
    unspeakable = {layer: why for layer, some in names.items() if len(some) < len(nodes.names[layer])}
    text = "trtexec --onnx=model.onnx --int8 --precisionConstraints=obey '--layerPrecisions=LAYERS'\n"
    hint = "this is for TensorRT up to 10; TensorRT 11 has no such options, see tensorrt"
    return Setting(text, Told(names, {**unspeakable, **nodes.missing}), hint, "shell")


# ---------------------------------------------------------------------------------------------------------------------
# Tools that take modules of PyTorch


def _torchao(model: Model) -> Setting:
    """Tried with torchao 0.18: the filter is asked for each module, with its full name."""
    text = """\
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

in_float = [
    LAYERS,
]
quantize_(
    model,
    Int8WeightOnlyConfig(),
    filter_fn=lambda module, fqn: isinstance(module, nn.Linear) and fqn not in in_float,
)
"""
    hint = "take the config that you use; the filter lets torchao quantize nn.Linear alone, as it does by default"
    return Setting(text, module_names(model, "torchao"), hint)


def _pt2e(model: Model) -> Setting:
    """Tried with torchao 0.18, of which PT2E quantization is a part: None for a module means float."""
    text = """\
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer

quantizer = x86_inductor_quantizer.X86InductorQuantizer()
quantizer.set_global(x86_inductor_quantizer.get_default_x86_inductor_quantization_config())
for name in [
    LAYERS,
]:
    quantizer.set_module_name_qconfig(name, None)
"""
    hint = "XNNPACKQuantizer of ExecuTorch takes the same by set_module_name(name, None)"
    return Setting(text, module_names(model, "PT2E quantization"), hint)


# ---------------------------------------------------------------------------------------------------------------------
# Tools of other kinds


def _openvino(model: Model) -> Setting:
    """Tried with NNCF 3.4 and OpenVINO 2026.4, on modules of PyTorch, ONNX models, and ONNX files read by OpenVINO.

    NNCF calls an operation in a module ``a/0/linear/0``. OpenVINO parts a Conv or Gemm with a bias in two, of which the
    second has the node's name; ignoring that alone has no effect, and no error.
    """
    if is_onnx(model):
        told = node_names(model, "NNCF").written(lambda name: rf"^{re.escape(name)}(/WithoutBiases)?\Z")
    else:
        told = module_names(model, "NNCF").written(lambda name: f"^{re.escape(name.replace('.', '/'))}/")
    text = """\
import nncf

quantized = nncf.quantize(
    model,
    nncf.Dataset(calibration_data),
    ignored_scope=nncf.IgnoredScope(patterns=[
        LAYERS,
    ]),
)
"""
    return Setting(text, told)


def _tflite(model: Model) -> Setting:
    """Tried with TensorFlow 2.21: nodes are the names of output tensors, which the converter makes up of layers' names.

    It numbers scopes and tensors (``net_1/conv_2/convolution1``), so that they are only known once it has run.
    """
    if not is_tensorflow(model):
        why = f"TFLite's converter takes Keras models, and this was read as {model.framework}"
        return Setting("", nothing(model, why))
    text = """\
import csv
import io
import re

import tensorflow as tf

patterns = [
    LAYERS,
]
debugger = tf.lite.experimental.QuantizationDebugger(converter=converter, debug_dataset=representative_dataset)
debugger.run()
table = io.StringIO(newline="")
debugger.layer_statistics_dump(table)
table.seek(0)
tensors = [row["tensor_name"] for row in csv.DictReader(table)]
for pattern in patterns:
    if not any(re.search(pattern, tensor) for tensor in tensors):
        raise ValueError(f"nothing matches {pattern!r}; put a pattern for one of these in its place: {tensors}")
options = tf.lite.experimental.QuantizationDebugOptions(
    denylisted_nodes=[tensor for tensor in tensors if any(re.search(pattern, tensor) for pattern in patterns)],
)
debugger = tf.lite.experimental.QuantizationDebugger(
    converter=converter, debug_dataset=representative_dataset, debug_options=options
)
quantized = debugger.get_nondebug_quantized_model()
"""
    hint = (
        "the converter may name the last layer after the model's output, such as StatefulPartitionedCall:0; the text"
        " then lists the names to choose from"
    )
    return Setting(text, Told({layer.name: (_tensors(layer.name),) for layer in model.layers}), hint)


def _tensors(layer: str) -> str:
    """A pattern: a separator, the layer with its models around it, each maybe numbered, and a separator or the end."""
    path = r"(_\d+)?/".join(map(re.escape, layer.split("/")))
    return rf"(^|[/;]){path}(_\d+)?([/;]|\d*\Z)"


TOOLS: dict[str, Callable[[Model], Setting]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "nncf": _openvino,
    "tensorrt": _tensorrt,
    "trtexec": _trtexec,
    "torchao": _torchao,
    "pt2e": _pt2e,
    "tflite": _tflite,
}
"""The tools that can be told which layers stay in float, each with what writes its setting."""

TITLES = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO (NNCF)",
    "nncf": "NNCF",
    "tensorrt": "TensorRT 10 and later (ModelOpt)",
    "trtexec": "TensorRT up to 10 (trtexec)",
    "torchao": "torchao",
    "pt2e": "PyTorch PT2E",
    "tflite": "TensorFlow Lite",
}


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))
