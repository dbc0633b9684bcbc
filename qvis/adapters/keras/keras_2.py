"""Lets Keras 3 load whole models in HDF5 files that Keras 2 wrote.

Keras 2 notes down arguments that the layers of Keras 3 do not take. Those that have no effect are left out of a copy of
the file; one that has an effect would make another model of it, and is refused.
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
        An argument that Keras 3 does not know has an effect.
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


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
