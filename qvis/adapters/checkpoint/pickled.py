"""Reads what ``torch.save`` wrote, as long as it is tensors in plain containers: nothing in a file is executed."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvis.adapters.checkpoint import storages
from qvis.adapters.checkpoint.stored import Array, Contents, Stored, integers, reading
from qvis.errors import BadArgumentError
from qvis.layers import Skipped

if TYPE_CHECKING:
    from torch import Tensor

NESTED = ("state_dict", "model_state_dict", "model")
"""Where training scripts keep the weights within a checkpoint."""
WRAPPERS = ("module.", "_orig_mod.")
"""What the names start with when the model was trained in parallel, or compiled."""
_WAY_OUT = "save it anew with torch.save(model.state_dict(), ...), or as .safetensors"


def load(path: Path) -> Contents:
    """The tensors of a state dict, in its order; mapped into memory where the file is of today's format.

    Raises
    ------
    BadArgumentError
        The file is cut short, damaged, of another kind, or holds more than tensors.
    """
    zipped = _is_zipped(path)
    if zipped:
        _check_kind(path)
    held = unpickled(path)
    from qvis.adapters.torch.tensors import framework

    skipped: list[Skipped] = []
    found = list(_tensors(held, path, skipped))
    with reading(path, "no PyTorch file", _WAY_OUT):
        again = storages.readers(path, (tensor for _, tensor in found)) if zipped else {}
        tensors = tuple(_stored(name, tensor, again.get(id(tensor))) for name, tensor in found)
    return Contents(framework(), tensors, tuple(skipped))


def _is_zipped(path: Path) -> bool:
    """Whether it is of the format since torch 1.6; judged as torch does."""
    with reading(path, "no PyTorch file", _WAY_OUT), path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_kind(path: Path) -> None:
    """Refuse what is a zip file with another format of torch in it."""
    with reading(path, "no PyTorch file", _WAY_OUT), zipfile.ZipFile(path) as archive:
        names = {name.partition("/")[2] for name in archive.namelist()}
        if any(entry.flag_bits & 1 for entry in archive.infolist()):
            raise ValueError("it is encrypted")
    if "constants.pkl" in names:
        raise BadArgumentError(
            f"model: {str(path)!r} holds a TorchScript program; load it with torch.jit.load and pass the module"
        )


def unpickled(path: Path) -> Any:
    """What a file holds, as tensors on the CPU in plain containers."""
    with reading(path, "no PyTorch file", _WAY_OUT):
        if not path.stat().st_size:
            raise BadArgumentError(f"model: {str(path)!r} is empty; {_WAY_OUT}")
        from qvis.adapters.torch.tensors import unpickle

        try:
            if path.suffix.lower() == ".safetensors":  # torch would go by that name
                with path.open("rb") as file:
                    return unpickle(file)
            return unpickle(path, mapped=_is_zipped(path))
        except pickle.UnpicklingError as error:
            raise BadArgumentError(
                f"model: {str(path)!r} is damaged or holds more than tensors, and reading that could run code; if you "
                "trust it, load it yourself with torch.load and pass the model, or save its state_dict()"
            ) from error


def _tensors(held: object, path: Path, skipped: list[Skipped]) -> Iterator[tuple[str, Tensor]]:
    """The tensors by name: of the state dict where there is one, else of all dictionaries inside one another."""
    import torch

    for key in NESTED:
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if isinstance(held, torch.Tensor):
        held = {"weight": held}
    if not isinstance(held, Mapping):
        raise BadArgumentError(
            f"model: {str(path)!r} holds a {type(held).__name__}; expected a dictionary of tensors by name"
        )
    yield from _walk("", held, skipped)


def _walk(prefix: str, held: Mapping[Any, Any], skipped: list[Skipped]) -> Iterator[tuple[str, Tensor]]:
    import torch

    for key, value in held.items():
        name = f"{prefix}{key}"
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, Mapping) and value:
            if name.startswith("optim"):
                skipped.append(Skipped(name, "is the state of an optimizer"))
            else:
                yield from _walk(f"{name}.", value, skipped)


def _stored(name: str, tensor: Tensor, again: Callable[[], Array] | None) -> Stored:
    from qvis.adapters.torch.tensors import identity

    dtype = str(tensor.dtype).removeprefix("torch.")
    quantized = tensor.is_quantized
    return Stored(
        name,
        tuple(tensor.shape),
        dtype,
        again or partial(_numbers, tensor),
        key=identity(tensor),
        obstacle=_obstacle(tensor, dtype),
        notes=(f"dequantized from {dtype}",) if quantized else (),
    )


def _obstacle(tensor: Tensor, dtype: str) -> str:
    import torch

    if tensor.is_meta:
        return "has a shape but no numbers (meta device)"
    if tensor.layout != torch.strided:
        return f"is sparse ({str(tensor.layout).removeprefix('torch.')})"
    if tensor.is_quantized:
        return ""
    if tensor.dtype.is_complex:
        return f"is complex ({dtype}), and qvis reads real weights"
    if tensor.dtype.is_floating_point:
        packed = tensor.dtype.itemsize == 1 and "float8" not in dtype
        return f"packs several numbers into a byte ({dtype}), which PyTorch cannot convert" if packed else ""
    return integers(dtype)


def _numbers(tensor: Tensor) -> Array:
    import torch

    with torch.no_grad():
        tensor = tensor.detach()
        if tensor.is_quantized:
            tensor = tensor.dequantize()
        if tensor.dtype.is_floating_point and tensor.dtype != torch.float64:
            tensor = tensor.to(torch.float32)
        array: Array = tensor.resolve_neg().numpy()
        return array
