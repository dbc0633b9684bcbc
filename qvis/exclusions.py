"""Layers that stay in float, as the setting of the tool that quantizes.

What each tool is told, and with which version that was tried, stands at its function below. All names are put in as
literals, so that a name in a model cannot become code.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qvis.errors import BadArgumentError, UnknownLayerError, suggest
from qvis.layers import Graph, Network
from qvis.words import listed_names


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
class _Part:
    """What a tool is told, before the layers that it cannot be told are named."""

    text: str
    names: tuple[str, ...]
    missing: tuple[str, ...] = ()
    note: str = ""
    language: str = "python"


def exclusions(layers: Sequence[str], network: Network, graph: Graph | None, tool: str) -> Exclusion:
    """Write down how a tool is told to keep layers in float.

    Parameters
    ----------
    layers
        Names of layers of the network.
    network
        The model as it was read; other tools name its layers by its framework.
    graph
        How data flows through it. For ONNX models it tells the names of the nodes; None is as good for all others.
    tool
        A key of :data:`TOOLS`.

    Raises
    ------
    BadArgumentError
        There is no such tool, or no layer is given.
    UnknownLayerError
        A layer is none of the network's.
    """
    if tool not in TOOLS:
        raise BadArgumentError(f"tool: got {tool!r}, expected one of {', '.join(TOOLS)}")
    wanted = (layers,) if isinstance(layers, str) else tuple(dict.fromkeys(layers))
    if not wanted:
        raise BadArgumentError("layers: none are given; name those that stay in float")
    known = [layer.name for layer in network.layers]
    for name in wanted:
        if name not in known:
            raise UnknownLayerError(f"layers: no layer is called {name!r}{suggest(name, known)}")
    part = TOOLS[tool](wanted, network, graph)
    return Exclusion(tool, part.text if part.names else "", part.language, part.names, part.missing, part.note)


# ---------------------------------------------------------------------------------------------------------------------
# Tools that read ONNX files


def _onnxruntime(layers: tuple[str, ...], network: Network, graph: Graph | None) -> _Part:
    """Tried with onnxruntime 1.31: a node that is named so keeps its weight and its inputs in float."""
    names, missing, note = _nodes(layers, network, graph, "onnxruntime")
    text = f"""\
from onnxruntime.quantization import quantize_static

quantize_static(
    "model.onnx",
    "model.int8.onnx",
    calibration_data_reader,
    nodes_to_exclude={_literals(names, 1)},
)
"""
    hint = "give the file that qvis read: quant_pre_process fuses nodes and may name them anew"
    return _Part(text, names, missing, _joined(note, hint if names else ""))


def _tensorrt(layers: tuple[str, ...], network: Network, graph: Graph | None) -> _Part:
    """As the sources of ModelOpt 0.47 have it, which matches patterns from the start of a name; not tried.

    TensorRT 11 knows no precision of layers any more, and takes what is quantized from the file.
    """
    names, missing, note = _nodes(layers, network, graph, "ModelOpt, which quantizes for TensorRT,")
    patterns = tuple(rf"{re.escape(name)}\Z" for name in names)
    text = f"""\
from modelopt.onnx.quantization import quantize

quantize(
    "model.onnx",
    calibration_data=calibration_data,
    nodes_to_exclude={_literals(patterns, 1)},
)
"""
    hint = "this is for TensorRT 10 and later; for implicit quantization with TensorRT up to 10 see trtexec"
    return _Part(text, patterns, missing, _joined(note, hint if names else ""))


def _trtexec(layers: tuple[str, ...], network: Network, graph: Graph | None) -> _Part:
    """As the sources of trtexec in TensorRT 10 have it; not tried.

    It parts the list at commas, takes single quotes out, and expands stars. Options for this were removed in 11.
    """
    nodes, missing, note = _nodes(layers, network, graph, "trtexec")
    names = tuple(name for name in nodes if not re.search(r"[,'*]", name))
    if len(names) < len(nodes):
        unspeakable = [name for name in nodes if name not in names]
        note = _joined(note, f"trtexec cannot be told names with commas, quotes or stars: {listed_names(unspeakable)}")
        missing += tuple(one for one in layers if one not in missing and not _said(one, graph, names))
    precisions = ",".join(f"{name}:fp32" for name in names)
    arguments = ("--onnx=model.onnx", "--int8", "--precisionConstraints=obey", f"--layerPrecisions={precisions}")
    text = f"trtexec {' '.join(map(shlex.quote, arguments))}\n"
    hint = "this is for TensorRT up to 10; TensorRT 11 has no such options, see tensorrt"
    return _Part(text, names, missing, _joined(note, hint if names else ""), "shell")


def _said(layer: str, graph: Graph | None, names: tuple[str, ...]) -> bool:
    """Whether all nodes of a layer are among the names."""
    return graph is not None and all(node.original in names for node in graph.calls.get(layer, ()))


def _nodes(
    layers: tuple[str, ...], network: Network, graph: Graph | None, tool: str
) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """The names of the ONNX nodes that apply the layers' weights, the layers that have none, and why."""
    if not _is_onnx(network):
        return (), layers, f"{tool} wants names of nodes, which an exported file has; run qvis on the .onnx file"
    if graph is None:
        why = network.no_graph or "there is no graph"
        return (), layers, f"{tool} wants names of nodes, and they are not known: {why}"
    calls = {layer: graph.calls.get(layer, ()) for layer in layers}
    named = {layer: [node.original for node in nodes] for layer, nodes in calls.items()}
    missing = tuple(layer for layer, names in named.items() if not names or not all(names))
    names = tuple(dict.fromkeys(name for names in named.values() for name in names if name))
    note = f"no node with a name applies {listed_names(missing)}; name the nodes of the file" if missing else ""
    return names, missing, note


# ---------------------------------------------------------------------------------------------------------------------
# Tools that take modules of PyTorch


def _torchao(layers: tuple[str, ...], network: Network, graph: Graph | None) -> _Part:  # noqa: ARG001
    """Tried with torchao 0.18: the filter is asked for each module, with its full name."""
    names, missing, note = _modules(layers, network, "torchao")
    text = f"""\
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

in_float = {_literals(names, 0)}
quantize_(
    model,
    Int8WeightOnlyConfig(),
    filter_fn=lambda module, fqn: isinstance(module, nn.Linear) and fqn not in in_float,
)
"""
    hint = "take the config that you use; the filter lets torchao quantize nn.Linear alone, as it does by default"
    return _Part(text, names, missing, _joined(note, hint if names else ""))


def _pt2e(layers: tuple[str, ...], network: Network, graph: Graph | None) -> _Part:  # noqa: ARG001
    """Tried with torchao 0.18, of which PT2E quantization is a part: None for a module means float."""
    names, missing, note = _modules(layers, network, "PT2E quantization")
    text = f"""\
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer

quantizer = x86_inductor_quantizer.X86InductorQuantizer()
quantizer.set_global(x86_inductor_quantizer.get_default_x86_inductor_quantization_config())
for name in {_literals(names, 0)}:
    quantizer.set_module_name_qconfig(name, None)
"""
    hint = "XNNPACKQuantizer of ExecuTorch takes the same by set_module_name(name, None)"
    return _Part(text, names, missing, _joined(note, hint if names else ""))


def _modules(layers: tuple[str, ...], network: Network, tool: str) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """The layers that are modules of PyTorch, those that are none, and why."""
    if _is_onnx(network) or _is_tensorflow(network):
        return (), layers, f"{tool} takes modules of PyTorch, and this model was read as {network.framework}"
    root = tuple(layer for layer in layers if layer == _ROOT)
    note = f"{tool} cannot be told the model itself, which has no name" if root else ""
    return tuple(layer for layer in layers if layer != _ROOT), root, note


# ---------------------------------------------------------------------------------------------------------------------
# Tools of other kinds


def _openvino(layers: tuple[str, ...], network: Network, graph: Graph | None) -> _Part:
    """Tried with NNCF 3.4 and OpenVINO 2026.4, on modules of PyTorch, ONNX models, and ONNX files read by OpenVINO.

    NNCF calls an operation in a module ``a/0/linear/0``. OpenVINO parts a Conv or Gemm with a bias in two, of which the
    second has the node's name; ignoring that alone has no effect, and no error.
    """
    if _is_onnx(network):
        names, missing, note = _nodes(layers, network, graph, "NNCF")
        patterns = tuple(rf"^{re.escape(name)}(/WithoutBiases)?\Z" for name in names)
    else:
        names, missing, note = _modules(layers, network, "NNCF")
        patterns = tuple(f"^{re.escape(name.replace('.', '/'))}/" for name in names)
    text = f"""\
import nncf

quantized = nncf.quantize(
    model,
    nncf.Dataset(calibration_data),
    ignored_scope=nncf.IgnoredScope(patterns={_literals(patterns, 1)}),
)
"""
    return _Part(text, patterns, missing, note)


def _tflite(layers: tuple[str, ...], network: Network, graph: Graph | None) -> _Part:  # noqa: ARG001
    """Tried with TensorFlow 2.21: nodes are the names of output tensors, which the converter makes up of layers' names.

    It numbers scopes and tensors (``net_1/conv_2/convolution1``), so that they are only known once it has run.
    """
    if not _is_tensorflow(network):
        return _Part("", (), layers, f"TFLite's converter takes Keras models, and this was read as {network.framework}")
    # A separator, the layer with its models around it, each maybe numbered, and a separator or the end.
    paths = {layer: r"(_\d+)?/".join(map(re.escape, layer.split("/"))) for layer in layers}
    patterns = tuple(rf"(^|[/;]){path}(_\d+)?([/;]|\d*\Z)" for path in paths.values())
    text = f"""\
import csv
import io
import re

import tensorflow as tf

patterns = {_literals(patterns, 0)}
debugger = tf.lite.experimental.QuantizationDebugger(converter=converter, debug_dataset=representative_dataset)
debugger.run()
table = io.StringIO(newline="")
debugger.layer_statistics_dump(table)
table.seek(0)
tensors = [row["tensor_name"] for row in csv.DictReader(table)]
for pattern in patterns:
    if not any(re.search(pattern, tensor) for tensor in tensors):
        raise ValueError(f"nothing matches {{pattern!r}}; put a pattern for one of these in its place: {{tensors}}")
options = tf.lite.experimental.QuantizationDebugOptions(
    denylisted_nodes=[tensor for tensor in tensors if any(re.search(pattern, tensor) for pattern in patterns)],
)
debugger = tf.lite.experimental.QuantizationDebugger(
    converter=converter, debug_dataset=representative_dataset, debug_options=options
)
quantized = debugger.get_nondebug_quantized_model()
"""
    return _Part(
        text,
        patterns,
        note="the converter may name the last layer after the model's output, such as StatefulPartitionedCall:0; "
        "the text then lists the names to choose from",
    )


TOOLS: dict[str, Callable[[tuple[str, ...], Network, Graph | None], _Part]] = {
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

_ROOT = "(root)"
"""What a layer is called that is the whole model."""


def _is_onnx(network: Network) -> bool:
    return network.framework.startswith("ONNX")


def _is_tensorflow(network: Network) -> bool:
    return network.framework.startswith(("Keras", "TensorFlow", "TFLite"))


def _literals(names: Sequence[str], depth: int) -> str:
    """A list of Python, with a line for each name."""
    indent = "    " * depth
    return "[\n" + "".join(f"{indent}    {name!r},\n" for name in names) + f"{indent}]"


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))
