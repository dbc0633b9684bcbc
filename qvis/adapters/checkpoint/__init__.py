"""Reads bare checkpoints: tensors with names, and no model around them that says what they are for.

A tensor of two or more axes is a layer. Its output channels are along axis 0, as PyTorch has them for everything but
transposed convolutions; a tensor named ``kernel``, as Keras and Flax have it, is read along its last axis. The user can
say otherwise. Tensors of fewer axes, such as biases, count among the parameters and are not shown.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np

from qvis.adapters.checkpoint import folders, npz, packed, pickled, safetensors
from qvis.adapters.checkpoint.scaled import scaled
from qvis.adapters.checkpoint.stored import Array, Contents, Stored, reading, shown
from qvis.errors import BadArgumentError, NotRunnableError
from qvis.layers import FloatArray, Layer, Network, Skipped

_LOADERS = {"safetensors": safetensors.load, "npz": npz.load, "torch": pickled.load}
_SUFFIXES = {".safetensors": "safetensors", ".npz": "npz", **dict.fromkeys((".pt", ".pth", ".bin", ".th"), "torch")}
_SUFFIXES |= dict.fromkeys((".ckpt", ".pkl", ".pickle"), "torch")
_POINTER = b"version https://git-lfs"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "moving_mean", "moving_variance")
"""What BatchNorm keeps beside its parameters."""


def handles(model: object) -> bool:
    """Whether ``model`` is the path of a checkpoint or of a folder with one, judged by what is in it.

    A file that is nothing known goes by its name, so that :func:`read` can say what is wrong with it.
    """
    if not isinstance(model, Path):
        return False
    if model.is_dir():
        return folders.holds_weights(model)
    return model.name.endswith(folders.INDEX) or (_kind(model) or _SUFFIXES.get(model.suffix.lower())) is not None


def _kind(path: Path) -> str | None:
    """What the first bytes of a file, or the names in a zip file, say it is."""
    try:
        with path.open("rb") as file:
            start = file.read(32)
        if start.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
            if any(name.endswith("/data.pkl") for name in names):
                return "torch"
            return "npz" if names and all(name.endswith(".npy") for name in names) else None
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return None
    if safetensors.recognizes(start):  # asked first, as the length of a header may look like the start of a pickle
        return "safetensors"
    pickled = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    return "torch" if pickled else None  # of an old version of torch, or refused


def read(model: Path) -> Network:
    """List the tensors of a checkpoint that are layers. Reads no numbers but what it takes to know what they mean.

    Raises
    ------
    BadArgumentError
        The file, or one of a folder's, is cut short, damaged, or holds more than tensors; a shard is missing.
    """
    chosen = folders.choose(model) if model.is_dir() else model
    sharded = chosen.name.endswith(folders.INDEX)
    contents = _unwrapped(folders.load(chosen, _load) if sharded else _load(chosen))
    tensors, lost = _dequantized(contents.tensors, chosen.parent)
    layers = _Layers(tensors)
    skipped = (*contents.skipped, *lost, *layers.skipped)
    name = model.name if model.is_dir() else model.stem
    found = [_tied(layer, contents.ties, layers.names) for layer in layers.found.values()]
    return Network(name or str(model), contents.framework, tuple(found), skipped, _count(tensors))


def runner(model: Path, network: Network, loss: object = None) -> NoReturn:  # noqa: ARG001
    """A checkpoint holds no code to be run.

    Raises
    ------
    NotRunnableError
        Always, with what to give instead.
    """
    raise NotRunnableError(
        "model: a checkpoint holds weights but no code to run them with; give the model's code as "
        "package.module:factory, and this file with --weights"
    )


def _load(path: Path) -> Contents:
    with reading(path, "no file of weights", "give another"), path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise BadArgumentError(
                f"model: {str(path)!r} is only a pointer of Git LFS; fetch the file with: git lfs pull"
            )
    kind = _kind(path) or _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise BadArgumentError(f"model: {str(path)!r} is no file of weights; give one of type {' '.join(_SUFFIXES)}")
    return _LOADERS[kind](path)


def _unwrapped(contents: Contents) -> Contents:
    """The names without the prefix of a model that was trained in parallel or compiled."""
    for prefix in pickled.WRAPPERS:
        if contents.tensors and all(tensor.name.startswith(prefix) for tensor in contents.tensors):
            tensors = tuple(replace(one, name=one.name.removeprefix(prefix)) for one in contents.tensors)
            ties = {one.removeprefix(prefix): kept.removeprefix(prefix) for one, kept in contents.ties.items()}
            contents = replace(contents, tensors=tensors, ties=ties)
    return contents


def _count(tensors: tuple[Stored, ...]) -> int:
    """The numbers that training could change, tied ones once."""
    sizes: dict[object, int] = {}
    for tensor in tensors:
        if not tensor.obstacle and tensor.name.rpartition(".")[2].rpartition("/")[2] not in _STATISTICS:
            sizes[tensor.name if tensor.key is None else tensor.key] = tensor.size
    return sum(sizes.values())


# ---------------------------------------------------------------------------------------------------------------------
# Weights that are not stored as they are


def _dequantized(tensors: tuple[Stored, ...], folder: Path) -> tuple[tuple[Stored, ...], list[Skipped]]:
    """The tensors with a weight in place of each group of parts that stands for one."""
    by_name = {tensor.name: tensor for tensor in tensors}
    found = packed.find(by_name)
    small = any(tensor.dtype.startswith(("float8", "int8", "uint8")) for tensor in tensors)
    settings = _settings(folder) if found or small else {}
    replaced: dict[str, Stored | None] = {}
    skipped: list[Skipped] = []
    for owner, parts in found.items():
        weight = parts if isinstance(parts, str) else packed.unpacked(owner, parts, settings)
        names = (f"{owner}.{part}".lstrip(".") for part in ("qweight", "qzeros", "scales", "g_idx"))
        replaced.update(dict.fromkeys(names))
        if isinstance(weight, str):
            skipped.append(Skipped(owner or "(root)", weight))
        else:
            replaced[f"{owner}.qweight".lstrip(".")] = weight
    for tensor in tensors:
        outcome = scaled(tensor, by_name, settings)
        if outcome is not None:
            replaced[tensor.name] = outcome.tensor
            replaced.update(dict.fromkeys(outcome.used))
    kept = (replaced.get(tensor.name, tensor) for tensor in tensors)
    return tuple(tensor for tensor in kept if tensor is not None), skipped


def _settings(folder: Path) -> Mapping[str, Any]:
    """What the configuration beside the weights says about their quantization; nothing where there is none."""
    for name, key in (("config.json", "quantization_config"), ("quantize_config.json", ""), ("quant_config.json", "")):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        content = content.get(key) if key and isinstance(content, dict) else content
        if isinstance(content, dict):
            return cast("dict[str, Any]", content)
    return {}


# ---------------------------------------------------------------------------------------------------------------------
# From tensors to layers


class _Layers:
    """The layers of a checkpoint, each tensor once, and what was left out."""

    def __init__(self, tensors: tuple[Stored, ...]) -> None:
        self.shapes = {tensor.name: tensor.shape for tensor in tensors}
        self.found: dict[object, Layer] = {}
        self.names: dict[str, str] = {}
        """The layer's name by the tensor's."""
        self.skipped: list[Skipped] = []
        for tensor in tensors:
            if len(tensor.shape) >= 2:
                self._add(tensor)

    def _add(self, tensor: Stored) -> None:
        name = self._layer_name(tensor.name)
        self.names[tensor.name] = name
        obstacle = tensor.obstacle or ("" if tensor.size else f"has no elements, shape {tensor.shape}")
        if obstacle:
            self.skipped.append(Skipped(name, obstacle))
            return
        for layer in self._parts(tensor, name):
            key = layer.name if tensor.key is None else (tensor.key, layer.name.removeprefix(name))
            known = self.found.get(key)
            self.found[key] = layer if known is None else replace(known, aliases=(*known.aliases, layer.name))

    def _layer_name(self, name: str) -> str:
        """The module's name for its weight, unless something else is called that."""
        if name == "weight":
            return "(root)"
        short = name.removesuffix(".weight")
        return name if short in self.shapes else short

    def _parts(self, tensor: Stored, name: str) -> Iterator[Layer]:
        op, labels = _stacked(tensor, self.shapes)
        if len(labels) < 2:
            last = tensor.name.replace("/", ".").rpartition(".")[2]
            axis = len(tensor.shape) - 1 if last == "kernel" else 0
            layer = _layer(tensor, name, op or tensor.op or f"{len(tensor.shape)}-D weight", axis)
            yield layer if op or tensor.op else replace(layer, along=partial(_turned, tensor, layer))
            return
        count = len(labels)
        for index, label in enumerate(labels):
            yield Layer(
                name=f"{name}.{label}",
                op=op,
                shape=(tensor.shape[0] // count, *tensor.shape[1:]),
                dtype=tensor.dtype,
                read=partial(_block, tensor, index, count),
                channels=f"axis 0, part {index + 1} of {count}",
                notes=tensor.notes,
            )


def _stacked(tensor: Stored, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str]:
    """The type of layer and the labels of the matrices that a tensor of PyTorch holds on top of one another."""
    owner, dot, last = tensor.name.rpartition(".")
    if len(tensor.shape) != 2:
        return "", ""
    if last == "in_proj_weight" and tensor.shape[0] == 3 * tensor.shape[1]:
        return "MultiheadAttention", "qkv"
    if last.startswith(("weight_ih", "weight_hh")):
        # The matrix for the state has as many rows of blocks as there are gates; its own width is one block.
        suffix = last[len("weight_ih") :]
        projected = f"{owner}{dot}weight_hr{suffix}" in shapes
        state = shapes.get(f"{owner}{dot}weight_hh{suffix}", ())
        gates = 4 if projected else state[0] // state[1] if len(state) == 2 and state[1] else 0
        exact = projected or (len(state) == 2 and state[0] == gates * state[1])
        op, labels = {4: ("LSTM", "ifgo"), 3: ("GRU", "rzn"), 1: ("RNN", "")}.get(gates, ("", ""))
        if op and exact and tensor.shape[0] % gates == 0:
            return f"{op}{'' if suffix else 'Cell'}", labels
    return "", ""


def _layer(tensor: Stored, name: str, op: str, axis: int) -> Layer:
    return Layer(
        name=name,
        op=op,
        shape=tensor.shape,
        dtype=tensor.dtype,
        read=partial(_rows, tensor, axis),
        channels=f"axis {axis}",
        notes=tensor.notes,
    )


def _turned(tensor: Stored, layer: Layer, axis: int) -> Layer:
    """The layer read along another axis, which may count from the end."""
    axes = len(tensor.shape)
    if not -axes <= axis < axes:
        raise BadArgumentError(
            f"channel_axis: {layer.name!r} has {axes} axes, shape {tensor.shape}, and got axis {axis}; "
            f"give one from {-axes} to {axes - 1}"
        )
    return _layer(tensor, layer.name, layer.op, axis % axes)


def _rows(tensor: Stored, axis: int) -> FloatArray:
    """``weight (..., out, ...) -> (out, elements)``; shares memory where it can."""
    array = tensor.read()
    return shown(np.moveaxis(array, axis, 0).reshape(tensor.shape[axis], -1))


def _block(tensor: Stored, index: int, count: int) -> FloatArray:
    """``weight (count * out, in) -> (out, in)``."""
    size = tensor.shape[0] // count
    rows: Array = tensor.read()[index * size : (index + 1) * size]
    return shown(rows)


def _tied(layer: Layer, ties: Mapping[str, str], names: Mapping[str, str]) -> Layer:
    """The layer with the names that a file gives to its tensor beside its own."""
    others = [one.removesuffix(".weight") for one, kept in ties.items() if names.get(kept) == layer.name]
    return replace(layer, aliases=(*layer.aliases, *others)) if others else layer
