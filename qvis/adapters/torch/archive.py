"""Reads a ``.pt2`` file as the data it is.

``torch.export.load`` unpickles parts of such a file and evaluates expressions in it, so that opening a file from
elsewhere may run what its author likes. The weights and the graph are plain bytes and JSON, and that is all qvis needs.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvis.adapters.torch.exported import Call, Program
from qvis.adapters.torch.tensors import Source, unpickle
from qvis.errors import BadArgumentError, QvisError

if TYPE_CHECKING:
    from torch import Tensor

_MALFORMED = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError, struct.error)
"""What comes of reading JSON and bytes that are not what they should be."""


def load(path: Path) -> Program:
    """The program in a file that ``torch.export.save`` wrote.

    Raises
    ------
    BadArgumentError
        The file is truncated, of another kind, or needs unpickling.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _load(_Archive(path, archive))
    except QvisError:
        raise
    except ImportError as error:
        raise BadArgumentError(f"model: {str(path)!r} needs PyTorch to be read; install torch") from error
    except zipfile.BadZipFile as error:
        raise BadArgumentError(
            f"model: {str(path)!r} is no .pt2 file, or was cut short ({error}); save it anew with torch.export.save"
        ) from error
    except _MALFORMED as error:
        raise BadArgumentError(
            f"model: {str(path)!r} is damaged or of an unknown version ({type(error).__name__}: {error}); "
            "save it anew with torch.export.save"
        ) from error


class _Archive:
    """The entries of a zip file, found by their names without the folder that torch puts around them."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path = path
        self.archive = archive
        self.entries = {entry.filename: entry for entry in archive.infolist()}
        roots = {name.partition("/")[0] for name in self.entries}
        if len(roots) == 1 and "models" not in roots:
            self.entries = {name.partition("/")[2]: entry for name, entry in self.entries.items()}

    def json(self, name: str) -> Any:
        return json.loads(self.archive.read(self.entries[name]))

    def bytes(self, name: str) -> bytes:
        return self.archive.read(self.entries[name])

    def opener(self, name: str) -> Callable[[], memoryview]:
        """A function that returns the entry's bytes: those of the file itself, as torch does not compress them."""
        entry = self.entries[name]
        if entry.compress_type != zipfile.ZIP_STORED:
            content = self.bytes(name)
            return lambda: memoryview(bytearray(content))
        with self.path.open("rb") as file:
            # The entry's own header repeats its name, and may be padded otherwise than the directory says.
            file.seek(entry.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            size = file.seek(0, os.SEEK_END)
        start = entry.header_offset + 30 + name_length + extra_length
        if start + entry.file_size > size:
            raise ValueError(f"{name} reaches beyond the end of the file")
        return partial(mapped, self.path, start, entry.file_size)


def mapped(path: Path, start: int, size: int) -> memoryview:
    """A part of a file as memory, whose pages come in when they are looked at and go with the last reference."""
    skipped = start % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        # Copy on write, only because torch wants memory that could be written.
        mapped = mmap.mmap(file.fileno(), size + skipped, access=mmap.ACCESS_COPY, offset=start - skipped)
    return memoryview(mapped)[skipped:]


def _load(archive: _Archive) -> Program:
    models = [name for name in archive.entries if name.startswith("models/") and name.endswith(".json")]
    legacy = "serialized_exported_program.json"
    if models:
        model = "models/model.json" if "models/model.json" in models else models[0]
        name = model[len("models/") : -len(".json")]
        weights = _payload(archive, f"data/weights/{name}_weights_config.json", f"data/weights/{name}.pt")
        constants = _payload(archive, f"data/constants/{name}_constants_config.json", f"data/constants/{name}.pt")
    elif legacy in archive.entries:  # before torch 2.8
        model = legacy
        weights = _payload(archive, "", "serialized_state_dict.pt")
        constants = _payload(archive, "", "serialized_constants.pt")
    else:
        compiled = any(name.startswith("data/aotinductor/") for name in archive.entries)
        what = "a compiled model (AOTInductor)" if compiled else "no exported program"
        raise BadArgumentError(
            f"model: {str(archive.path)!r} holds {what}; give a file that torch.export.save wrote, "
            "or a weights file together with the function that makes the model"
        )
    return _program(archive.json(model)["graph_module"], weights, constants)


def _payload(archive: _Archive, config: str, pickled: str) -> dict[str, Source]:
    """The tensors by name: described by a JSON file, or in older files as one pickled dictionary."""
    if config in archive.entries:
        folder = config.rpartition("/")[0]
        return {
            name: _source(archive, f"{folder}/{entry['path_name']}", entry)
            for name, entry in archive.json(config)["config"].items()
            if not entry["path_name"].startswith(("custom_obj", "opaque_obj"))
        }
    held = _unpickle(archive, pickled) if pickled in archive.entries else {}
    return {name: Source.of(tensor) for name, tensor in held.items()}


def _source(archive: _Archive, name: str, entry: dict[str, Any]) -> Source:
    import torch

    if entry["use_pickle"]:
        return Source.of(_unpickle(archive, name))
    meta = entry["tensor_meta"]
    dtype: torch.dtype = getattr(torch, _DTYPES[meta["dtype"]])
    sizes, strides = (tuple(int(one["as_int"]) for one in meta[key]) for key in ("sizes", "strides"))
    offset = int(meta["storage_offset"]["as_int"])
    read = archive.opener(name)

    def get() -> Tensor:
        if 0 in sizes:
            return torch.empty(sizes, dtype=dtype)
        data = read()
        flat = torch.frombuffer(data, dtype=dtype, count=len(data) // dtype.itemsize)
        return flat.as_strided(sizes, strides, offset)

    get()  # finds out at once whether the sizes fit the bytes
    return Source(get, (name, dtype, sizes, strides, offset))


def _unpickle(archive: _Archive, name: str) -> Any:
    try:
        return unpickle(io.BytesIO(archive.bytes(name)))
    except pickle.UnpicklingError as error:
        raise BadArgumentError(
            f"model: {name!r} in {str(archive.path)!r} holds pickled objects, which could run code when they are read; "
            "load the file yourself with torch.export.load, if you trust it, and pass the program"
        ) from error


_DTYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float16",
    7: "float32",
    8: "float64",
    9: "complex32",
    10: "complex64",
    11: "complex128",
    12: "bool",
    13: "bfloat16",
    28: "uint16",
    29: "float8_e4m3fn",
    30: "float8_e5m2",
    31: "float8_e4m3fnuz",
    32: "float8_e5m2fnuz",
    33: "float8_e8m0fnu",
    34: "uint32",
    35: "uint64",
}
"""The numbers that torch's export format has for types of numbers."""


def _program(module: dict[str, Any], weights: dict[str, Source], constants: dict[str, Source]) -> Program:
    origins: dict[str, str] = {}
    parameters: dict[str, Source] = {}
    for spec in module["signature"]["input_specs"]:
        for kind, (key, held) in _INPUTS.items():
            if spec.get(kind):
                path = spec[kind][key]
                origins[spec[kind]["arg"]["name"]] = path
                if held:
                    parameters[path] = weights[path]
    rest = {path: source for path, source in {**constants, **weights}.items() if path not in parameters}
    program = Program(parameters, rest, origins)
    for node in module["graph"]["nodes"]:
        program.note_modules(_stack(node["metadata"].get("nn_module_stack", "")))
        program.calls.append(_call(node))
    return program


_INPUTS = {
    "parameter": ("parameter_name", True),
    "buffer": ("buffer_name", False),
    "tensor_constant": ("tensor_constant_name", False),
}


def _stack(text: str) -> Iterator[tuple[str, str]]:
    """``key,name,class;key,name,class`` from the outside in; a name may hold commas, a class does not."""
    for entry in text.split(";"):
        _, _, rest = entry.partition(",")
        name, _, cls = rest.rpartition(",")
        if cls:
            yield name, cls


def _call(node: dict[str, Any]) -> Call:
    tensors: dict[str, list[str]] = {}
    numbers: dict[str, float] = {}
    for given in node["inputs"]:
        (kind, value), name = next(iter(given["arg"].items())), given["name"]
        if kind == "as_tensor":
            tensors[name] = [value["name"]]
        elif kind == "as_tensors":
            tensors[name] = [one["name"] for one in value]
        elif kind in ("as_int", "as_bool"):
            numbers[name] = int(value)
        elif kind == "as_float":
            numbers[name] = float(value)
    outputs = [output["as_tensor"]["name"] for output in node["outputs"] if output.get("as_tensor")]
    operation = ".".join(node["target"].removeprefix("torch.ops.").split(".")[:2])
    return Call(operation, tensors, numbers, outputs[0] if outputs else "")
