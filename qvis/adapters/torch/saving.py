"""Writes PyTorch models to files: exported programs, and bare numbers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvis.errors import OutputError
from qvis.running import Batch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

_TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""What safetensors calls the types of torch."""


def save_module(model: nn.Module, path: Path, example: Batch | None = None) -> None:
    """Write a module: exported in evaluation mode to ``.pt2``, the numbers alone to all others.

    Raises
    ------
    OutputError
        The suffix is another, ``.pt2`` is asked for without an example, or the module cannot be exported.
    """
    import torch

    from qvis.adapters.torch import _unwrap

    model = _unwrap(model)
    kind = path.suffix.lower()
    if kind == ".pt2":
        save_program(_exported(model, path, example), path)
    elif kind in (".pt", ".pth"):
        torch.save(model.state_dict(), path)
    elif kind == ".safetensors":
        write_safetensors({name: one for name, one in model.state_dict().items() if hasattr(one, "dtype")}, path)
    else:
        raise OutputError(
            f"path: a module of PyTorch cannot be saved to {path.name!r}; name it .pt2 for a program that runs without "
            "its code, or .pt, .pth or .safetensors for its numbers alone"
        )


def save_program(program: ExportedProgram, path: Path) -> None:
    """Write an exported program.

    Raises
    ------
    OutputError
        The suffix is not ``.pt2``.
    """
    import torch

    if path.suffix.lower() != ".pt2":
        raise OutputError(f"path: an exported program cannot be saved to {path.name!r}; name it .pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, path)


def _exported(model: nn.Module, path: Path, example: Batch | None) -> ExportedProgram:
    """The module as a program, found on a copy in evaluation mode."""
    import torch

    from qvis.adapters.torch.copying import copied
    from qvis.adapters.torch.graph import _first_line, _quiet, _settled, _tensors

    if example is None:
        raise OutputError(
            f"path: {path.name!r} is to hold an exported program, for which the module has to be called; give an "
            "example, or name the file .pt or .safetensors for the numbers alone"
        )
    args, kwargs = _tensors(model, example)
    failures = []
    for strict in (False, True):
        with _settled(model), _quiet():
            try:
                return torch.export.export(copied(model)[0].eval(), args, kwargs, strict=strict)
            except Exception as error:
                failures.append(_first_line(error))
    raise OutputError(
        f"path: the module cannot be exported to {path.name!r} ({failures[0]}); name the file .pt or .safetensors for "
        "the numbers alone"
    )


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors in the format of safetensors: the length of a header, the header as JSON, and the bytes.

    The header has room for texts by name, ``metadata``. Tensors that share their memory are written each for itself.
    """
    import torch

    header: dict[str, Any] = {}
    content: list[Tensor] = []
    position = 0
    # the widest first, so that each lies at a multiple of its own size
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in _TYPES or tensor.layout != torch.strided or tensor.is_quantized:
            raise OutputError(f"path: {name!r} is of type {kind}, which {path.name!r} cannot hold; name the file .pt")
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _TYPES[kind], "shape": list(tensor.shape), "data_offsets": [position, end]}
        content.append(tensor)
        position = end
    text = json.dumps({"__metadata__": {"format": "pt", **(metadata or {})}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in content:
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
