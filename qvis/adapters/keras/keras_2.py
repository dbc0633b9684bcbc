"""Lets Keras 3 load whole models in HDF5 files that Keras 2 wrote.

Keras 2 notes down arguments that the layers of Keras 3 do not take. Those that have no effect are left out of a copy of
the file; what would make another model of it is refused. Keras 2 also counts the calls of a model inside of a model
from one, where Keras 3 counts from zero, and lists a single input or output.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ANY = object()
_NO_EFFECT: dict[str, dict[str, Any]] = {
    r"DepthwiseConv\dD|Conv\dDTranspose": {"groups": 1},
    # The last three belong to a kernel that it does not have: its own two have arguments of their own.
    r"SeparableConv\dD": {
        "groups": 1,
        "kernel_initializer": _ANY,
        "kernel_regularizer": _ANY,
        "kernel_constraint": _ANY,
    },
    r"SimpleRNN|LSTM|GRU|RNN|ConvLSTM\dD": {"time_major": False},
    r"SpatialDropout\dD": {"noise_shape": None, "trainable": _ANY},
    # How layers that change pictures at random in training draw.
    r"Random\w+": {"rng_type": _ANY},
}
"""Arguments that Keras 3 does not take, with the value that means nothing there either, by the class of the layer."""


_MODELS = ("Functional", "Model", "Sequential")


def was_written(path: Path) -> bool:
    """Whether it is an HDF5 file with a whole model of Keras 2."""
    import h5py

    if not path.is_file() or not h5py.is_hdf5(path):
        return False
    with h5py.File(path, "r") as file:
        version = _text(file.attrs.get("keras_version", ""))
        return "model_config" in file.attrs and version.startswith(("1.", "2."))


def write_modern(path: Path, folder: Path) -> Path:
    """A copy of the file in a folder, with a configuration that Keras 3 understands.

    Raises
    ------
    ValueError
        It would be another model in Keras 3.
    """
    import h5py

    with h5py.File(path, "r") as file:
        config = json.loads(_text(file.attrs["model_config"]))
    for kind, inner in _layers(config):
        known = next((values for kinds, values in _NO_EFFECT.items() if re.fullmatch(kinds, kind)), {})
        for argument, value in known.items():
            if argument in inner and value is not _ANY and inner[argument] != value:
                raise ValueError(
                    f"its layer {inner.get('name', kind)!r} has {argument}={inner[argument]!r}, and Keras 3 has no "
                    f"{kind} with that"
                )
            inner.pop(argument, None)
        if any("activation" in argument and "hard_sigmoid" in str(value) for argument, value in inner.items()):
            raise ValueError(
                f"its layer {inner.get('name', kind)!r} has the activation hard_sigmoid, which is another function in "
                "Keras 3"
            )
        if "layers" in inner and "output_layers" in inner:
            _count_from_zero(inner)
    copied = folder / path.name
    shutil.copyfile(path, copied)
    with h5py.File(copied, "r+") as file:
        file.attrs["model_config"] = json.dumps(config).encode()
    return copied


def _layers(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The class of each layer in a configuration, and its arguments; layers inside of others too."""
    if isinstance(config, dict):
        kind, inner = config.get("class_name"), config.get("config")
        if isinstance(kind, str) and isinstance(inner, dict):
            yield kind, inner
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from _layers(value)


def _count_from_zero(config: dict[str, Any]) -> None:
    """Let the graph of a model name its nodes as Keras 3 does."""
    kinds = {one.get("name"): one.get("class_name") for one in config["layers"] if isinstance(one, dict)}
    inside = {name for name, kind in kinds.items() if kind in _MODELS}
    for one in config["layers"]:
        one["inbound_nodes"] = _lowered(one.get("inbound_nodes", []), inside)
    # Keras 3 does that itself for the outputs, but for sequential models
    config["output_layers"] = _lowered(
        config["output_layers"], {name for name in inside if kinds[name] == "Sequential"}
    )
    for key in ("input_layers", "output_layers"):
        if isinstance(config[key], list) and len(config[key]) == 1 and isinstance(config[key][0], list):
            config[key] = config[key][0]


def _lowered(nest: Any, names: set[Any]) -> Any:
    """A nest in which the calls of some layers, such as ``["inner", 1, 0]``, are counted from zero."""
    if isinstance(nest, dict):
        return {key: _lowered(value, names) for key, value in nest.items()}
    if not isinstance(nest, list):
        return nest
    if len(nest) > 2 and isinstance(nest[0], str) and nest[0] in names and isinstance(nest[1], int) and nest[1] > 0:
        return [nest[0], nest[1] - 1, *(_lowered(one, names) for one in nest[2:])]
    return [_lowered(one, names) for one in nest]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
