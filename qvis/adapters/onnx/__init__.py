"""Reads ONNX models, files and live ``ModelProto`` objects alike; for a file, ONNX itself need not be installed.

A file is read as data: its graph is walked, nothing is computed, and of the weights not one byte is read until someone
asks for them. External data is only read from inside the model's own folder.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

from qvis.adapters.onnx.graph import Walk, named_functions
from qvis.adapters.onnx.protobuf import Message, Schema, scan
from qvis.adapters.onnx.runner import runner as runner
from qvis.adapters.onnx.tensors import InFile, Live, Place
from qvis.adapters.rewritten import Rewritten
from qvis.adapters.values import mapped
from qvis.errors import BadArgumentError, QvisError
from qvis.layers import FloatArray, Graph, Network
from qvis.rewriting import Rewriting
from qvis.running import Batch

_MALFORMED = (ArithmeticError, LookupError, OSError, TypeError, ValueError, RecursionError, struct.error)
"""What comes of reading bytes that are not what they should be."""


def handles(model: object) -> bool:
    """Whether ``model`` is a file with an ONNX graph, or an object that holds one. Does not import onnx.

    Such files have no mark at their beginning, so that one of another name than ``.onnx`` must be ONNX all through.
    """
    if isinstance(model, Path):
        return model.is_file() and (_is_onnx(model) or (model.suffix.lower() == ".onnx" and _kind(model) != "TFLite"))
    return _is_proto(model) or _is_program(model)


def _is_proto(model: object) -> bool:
    onnx = sys.modules.get("onnx")
    return onnx is not None and isinstance(model, onnx.ModelProto)


def _is_program(model: object) -> bool:
    """Whether it is what ``torch.onnx.export`` returns."""
    exporter = sys.modules.get("torch.onnx")
    program = getattr(exporter, "ONNXProgram", None)
    return program is not None and isinstance(model, program)


def read(model: Any) -> Network:
    """List the weights of an ONNX model in the order in which its graph uses them.

    Which tensors are weights, and where their output channels are, follows from the nodes that use them. Layers are
    named after the modules they were exported from where the file tells, else after their tensors or nodes.

    Raises
    ------
    BadArgumentError
        The file is damaged or no ONNX model, or its external data is missing or outside its folder.
    """
    if isinstance(model, Path):
        return _read_file(model)
    if _is_program(model):
        model = model.model_proto
    return _network(model, Live(), model.graph.name or "ModelProto")


def graph(model: Any, example: Batch | None = None) -> Graph:
    """How data flows through the model; ``example`` gives sizes that the model leaves open.

    The model is run on it only where it computes shapes in a way that cannot be followed.

    Raises
    ------
    NoGraphError
        Onnx is not installed, or the model is larger than 2 GB.
    """
    from qvis.adapters.onnx.flow import graph_of

    return graph_of(model, example)


def rewrite(model: Any, network: Network, rewriting: Rewriting, inplace: bool = False) -> Rewritten:
    """Write new numbers into a copy of a model; see :func:`qvis.adapters.onnx.rewriting.rewrite_proto`."""
    from qvis.adapters.onnx.rewriting import rewrite_proto

    return rewrite_proto(model, network, rewriting, inplace)


def affines(model: Any) -> dict[str, tuple[FloatArray | None, FloatArray | None]]:
    """Factor and shift of normalizations; see :func:`qvis.adapters.onnx.rewriting.affines_of`."""
    from qvis.adapters.onnx.rewriting import affines_of

    return affines_of(model)


def load(model: Path) -> Any:
    """The model in a file, as a ModelProto with all its numbers."""
    from qvis.adapters.onnx.protos import load_proto

    return load_proto(model)


def save(model: Any, path: Path, example: Batch | None = None) -> None:  # noqa: ARG001
    """Write a model to an ``.onnx`` file; see :func:`qvis.adapters.onnx.protos.save_proto`."""
    from qvis.adapters.onnx.protos import save_proto

    save_proto(model, path)


def _read_file(path: Path) -> Network:
    try:
        data = mapped(path, 0, path.stat().st_size)
        if not data:
            raise BadArgumentError(f"model: the file {str(path)!r} is empty")
        message = Message(SCHEMA, "Model", data, 0, len(data))
        if not message.HasField("graph"):
            raise ValueError("it holds no graph")
        return _network(message, InFile(path), path.stem)
    except QvisError:
        raise
    except _MALFORMED as error:
        kind = _kind(path)
        what = f"looks like {kind}" if kind else f"is no ONNX model, or was cut short ({error})"
        raise BadArgumentError(f"model: {str(path)!r} {what}; give a file as ONNX's exporters write it") from error


def _network(model: Any, place: Place, name: str) -> Network:
    walk = Walk(place, named_functions(model.functions))
    walk.graph(model.graph)
    layers = walk.finish()
    opsets = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    producer = f"{model.producer_name} {model.producer_version.partition('+')[0]}".strip()[:60]
    framework = f"ONNX opset {opsets[0]}" if opsets else "ONNX"
    if producer:
        framework += f", written by {producer}"
    return Network(name, framework, layers, tuple(walk.skipped.values()), walk.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# What is in a file


def _is_onnx(path: Path) -> bool:
    """Whether the bytes are a model's from the first to the last: known fields only, and a graph with nodes."""
    try:
        data = mapped(path, 0, path.stat().st_size)
        graphs = _spans(data, 0, len(data), "Model", 7)
        return len(graphs) == 1 and bool(_spans(data, *graphs[0], "Graph", 1))
    except _MALFORMED:
        return False


def _spans(data: memoryview, start: int, end: int, kind: str, wanted: int) -> list[tuple[int, int]]:
    """Where the fields of one number are, if the message has no field that is unknown."""
    found: list[tuple[int, int]] = []
    for number, wire, first, last in scan(data, start, end):
        if (wire == 0) != (SCHEMA[kind][number][1] == "int"):
            raise ValueError("another kind of field")
        if number == wanted:
            found.append((first, last))
    return found


def _kind(path: Path) -> str:
    """What another file of that name really is, where its first bytes tell."""
    with path.open("rb") as file:
        begin = file.read(64)
    marks = {
        "a zip archive, such as a .pt2, .keras or .npz file": begin.startswith(b"PK\x03\x04"),
        "an HDF5 file": begin.startswith(b"\x89HDF"),
        "TFLite": begin[4:8] == b"TFL3",
        "a model in onnxruntime's own format (.ort)": begin[4:8] == b"ORTM",
        "a pointer of Git LFS instead of the file; fetch it with git lfs pull": begin.startswith(
            b"version https://git"
        ),
        "a safetensors file": begin[8:9] == b"{",
        "a pickled object": begin.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")),
    }
    return next((kind for kind, found in marks.items() if found), "")


SCHEMA: Schema = {
    "Model": {
        1: ("ir_version", "int"),
        2: ("producer_name", "string"),
        3: ("producer_version", "string"),
        4: ("domain", "string"),
        5: ("model_version", "int"),
        6: ("doc_string", "string"),
        7: ("graph", "Graph"),
        8: ("opset_import", "Opset*"),
        14: ("metadata_props", "Entry*"),
        20: ("training_info", "strings"),
        25: ("functions", "Function*"),
        26: ("configuration", "strings"),
    },
    "Opset": {1: ("domain", "string"), 2: ("version", "int")},
    "Entry": {1: ("key", "string"), 2: ("value", "string")},
    "Graph": {
        1: ("node", "Node*"),
        2: ("name", "string"),
        5: ("initializer", "Tensor*"),
        10: ("doc_string", "string"),
        11: ("input", "Info*"),
        12: ("output", "Info*"),
        13: ("value_info", "Info*"),
        14: ("quantization_annotation", "strings"),
        15: ("sparse_initializer", "Sparse*"),
        16: ("metadata_props", "Entry*"),
    },
    "Info": {1: ("name", "string")},
    "Node": {
        1: ("input", "strings"),
        2: ("output", "strings"),
        3: ("name", "string"),
        4: ("op_type", "string"),
        5: ("attribute", "Attribute*"),
        6: ("doc_string", "string"),
        7: ("domain", "string"),
        8: ("overload", "string"),
        9: ("metadata_props", "Entry*"),
    },
    "Attribute": {
        1: ("name", "string"),
        2: ("f", "float"),
        3: ("i", "int"),
        4: ("s", "bytes"),
        5: ("t", "Tensor"),
        6: ("g", "Graph"),
        7: ("floats", "floats"),
        8: ("ints", "ints"),
        9: ("strings", "strings"),
        10: ("tensors", "Tensor*"),
        11: ("graphs", "Graph*"),
        20: ("type", "int"),
        21: ("ref_attr_name", "string"),
        22: ("sparse_tensor", "Sparse"),
    },
    "Tensor": {
        1: ("dims", "ints"),
        2: ("data_type", "int"),
        4: ("float_data", "payload"),
        5: ("int32_data", "payload"),
        6: ("string_data", "payload"),
        7: ("int64_data", "payload"),
        8: ("name", "string"),
        9: ("raw_data", "payload"),
        10: ("double_data", "payload"),
        11: ("uint64_data", "payload"),
        13: ("external_data", "Entry*"),
        14: ("data_location", "int"),
    },
    "Sparse": {1: ("values", "Tensor"), 2: ("indices", "Tensor"), 3: ("dims", "ints")},
    "Function": {
        1: ("name", "string"),
        4: ("input", "strings"),
        5: ("output", "strings"),
        6: ("attribute", "strings"),
        7: ("node", "Node*"),
        10: ("domain", "string"),
        11: ("attribute_proto", "Attribute*"),
        13: ("overload", "string"),
    },
}
"""The part of ONNX's format that qvis reads."""
