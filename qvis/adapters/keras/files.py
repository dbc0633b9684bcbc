"""Reads ``.keras`` and ``.h5`` files of Keras 3 and Keras 2, whole models and weights alone, without Keras.

Nothing in them is executed. The weights are arrays, and the configuration that says what they are for is JSON.
"""

from __future__ import annotations

import io
import json
import mmap
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from qvis.adapters.checkpoint.stored import reading
from qvis.adapters.keras import config as keras_config
from qvis.adapters.keras.units import Collector, Unit
from qvis.adapters.quiet import quietly
from qvis.adapters.rewritten import Rewritten
from qvis.errors import BadArgumentError, NoGraphError, NotRunnableError, UnsupportedModelError
from qvis.layers import FloatArray, Graph, Network
from qvis.rewriting import Rewriting
from qvis.running import Batch, Runner

if TYPE_CHECKING:
    import h5py

_HDF5 = b"\x89HDF\r\n\x1a\n"
_CONFIG, _WEIGHTS, _METADATA = "config.json", "model.weights.h5", "metadata.json"
_SUFFIXES = (".keras", ".h5", ".hdf5")
_LARGEST_CONFIG = 1 << 28
_WAY_OUT = "save it anew with model.save, or pass the model itself"


def handles(model: object) -> bool:
    """Whether it is a file, or an unpacked ``.keras`` folder, of Keras: by what it holds, and only then by its name."""
    if not isinstance(model, Path):
        return False
    if model.is_dir():
        return (model / _WEIGHTS).is_file() and (model / _CONFIG).is_file()
    try:
        with model.open("rb") as file:
            start = file.read(len(_HDF5))
        if start == _HDF5:
            return True
        if zipfile.is_zipfile(model):
            with zipfile.ZipFile(model) as archive:
                names = set(archive.namelist())
            others = any(name.endswith((".npy", "data.pkl")) for name in names)
            return {_CONFIG, _WEIGHTS} <= names or (model.suffix.lower() == ".keras" and not others)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        pass
    return model.suffix.lower() in _SUFFIXES


def read(model: Path) -> Network:
    """List the weights of a file in the order of the model's layers; the optimizer's are left out.

    Raises
    ------
    BadArgumentError
        The file is damaged, encrypted, holds no weights or is of another kind.
    """
    with reading(model, "damaged, or no file of Keras", _WAY_OUT):
        return _network(model, *_opened(model))


def stored_bytes(model: Path) -> dict[str, int]:
    """How many bytes the variables of a file's layers take, by type; the optimizer's are left out.

    Raises
    ------
    BadArgumentError
        See :func:`read`.
    """
    found: dict[str, int] = {}
    with reading(model, "damaged, or no file of Keras", _WAY_OUT):
        root, config, _ = _opened(model)
        units, _ = _units(model, root, config)
    variables = {one.key: one for unit in units for one in unit.variables}
    for one in variables.values():
        width = 2 if one.dtype == "bfloat16" else np.dtype(one.dtype).itemsize
        found[one.dtype] = found.get(one.dtype, 0) + one.size * width
    return found


def _opened(model: Path) -> tuple[h5py.File, Any, Any]:
    """The file of the weights, the configuration, and what else the file says about itself."""
    if model.is_dir():
        config, version = _text(model / _CONFIG), _text(model / _METADATA)
        return _open(model / _WEIGHTS), config, version
    with model.open("rb") as file:
        start = file.read(len(_HDF5))
    if start == _HDF5:
        return _with_config(_open(model))
    if not start.startswith(b"PK"):
        what = "is empty" if not start else "is neither a .keras nor an HDF5 file, whatever its name says"
        raise BadArgumentError(f"model: {str(model)!r} {what}; {_WAY_OUT}")
    with zipfile.ZipFile(model) as archive:
        return _unpack(model, archive)


def graph(model: Path, example: Batch | None = None) -> Graph:
    """How data flows through the model in a file, which is loaded by Keras for that.

    So it is only done with samples, for a model that is to be run: a file that is merely read makes no layers.

    Raises
    ------
    NoGraphError
        There is no example, or Keras cannot load it.
    """
    from qvis.adapters.keras.graph import graph as graph_of

    if example is None:
        raise NoGraphError(
            "no graph: a file of Keras is read without Keras; load it with keras.models.load_model and pass the model, "
            "or give samples"
        )
    return graph_of(_load(model, lambda reason: NoGraphError(f"no graph: {reason}")), example)


def runner(model: Path, network: Network, loss: object = None) -> Runner:
    """The model in a file made ready to be run, loaded by Keras.

    Raises
    ------
    NotRunnableError
        Keras cannot load it.
    """
    from qvis.adapters.keras.runner import runner as runner_of

    return runner_of(_load(model, lambda reason: NotRunnableError(f"model: {reason}")), network, loss)


def load(model: Path) -> Any:
    """The model in a file, loaded by Keras.

    Raises
    ------
    NotRunnableError
        Keras cannot load it.
    """
    return _load(model, lambda reason: NotRunnableError(f"model: {reason}"))


def rewrite(model: Path, network: Network, rewriting: Rewriting, inplace: bool = False) -> Rewritten:
    """Write new numbers into the model in a file, which Keras loads in its safe mode; the file stays as it is.

    Raises
    ------
    BadArgumentError
        See :func:`qvis.adapters.keras.rewriting.rewrite_model`; or ``inplace`` is asked of a file.
    UnsupportedModelError
        Keras cannot load it.
    """
    from qvis.adapters.keras.rewriting import rewrite_model

    if inplace:
        raise BadArgumentError(f"inplace: the file {str(model)!r} is never changed; save what is returned")
    loaded = _load(model, lambda reason: UnsupportedModelError(f"model: {reason}"))
    return rewrite_model(loaded, network, rewriting, is_fresh=True)


def affines(model: Path) -> dict[str, tuple[FloatArray | None, FloatArray | None]]:
    """Factor and shift of normalizations in a file; none where Keras cannot load it."""
    from qvis.adapters.keras.rewriting import affines_of

    try:
        return affines_of(_load(model, UnsupportedModelError))
    except UnsupportedModelError:
        return {}


def multipliable(model: Path, network: Network) -> list[str]:
    """The layers of the model in a file before which :func:`rewrite` can put a multiplication, by name.

    Raises
    ------
    UnsupportedModelError
        Keras cannot load it.
    """
    from qvis.adapters.keras.rewriting import multipliable

    return multipliable(_load(model, lambda reason: UnsupportedModelError(f"model: {reason}")), network)


def _load(path: Path, refuse: Callable[[str], Exception]) -> Any:
    """The model in a file. Keras runs no code out of a file in its safe mode, and then loads only classes it knows."""
    from qvis.adapters.keras import keras_2

    try:
        with quietly():
            import keras
    except ImportError as error:
        raise refuse(f"{str(path)!r} can only be run with Keras; install keras and tensorflow") from error
    try:
        with quietly(), TemporaryDirectory() as folder:
            file = keras_2.write_modern(path, Path(folder)) if keras_2.was_written(path) else path
            return keras.models.load_model(file, compile=False, safe_mode=True)
    except Exception as error:
        from qvis.adapters.keras.outputs import first_line

        raise refuse(
            f"Keras cannot load {str(path)!r}: {first_line(error)}; load it in your own code, with its custom objects, "
            "and pass the model"
        ) from error


def _unpack(path: Path, archive: zipfile.ZipFile) -> tuple[h5py.File, Any, Any]:
    entries = {entry.filename: entry for entry in archive.infolist()}
    if any(entry.flag_bits & 1 for entry in entries.values()):
        raise BadArgumentError(f"model: {str(path)!r} is encrypted; unpack it with its password, then pack it without")
    if _WEIGHTS not in entries:
        kind = "weights in a form that qvis does not read" if "model.weights.npz" in entries else "no weights"
        raise BadArgumentError(f"model: {str(path)!r} holds {kind} (no {_WEIGHTS!r}); {_WAY_OUT}")

    def text(name: str) -> Any:
        if name not in entries:
            return None
        if entries[name].file_size > _LARGEST_CONFIG:
            raise ValueError(f"{name} is too large")
        return json.loads(archive.read(entries[name]))

    weights = _Section.of(path, entries[_WEIGHTS]) or io.BytesIO(archive.read(entries[_WEIGHTS]))
    return _open(weights), text(_CONFIG), text(_METADATA)


def _units(path: Path, root: h5py.File, config: Any) -> tuple[list[Unit], list[keras_config.Spec]]:
    """The layers with weights, and what the configuration says of all layers."""
    from qvis.adapters.keras.h5 import File

    specs = keras_config.specs(config) if config is not None else []
    units = File(root, specs, partial(reading, path, "damaged", _WAY_OUT)).units()
    if units is None:
        raise BadArgumentError(f"model: {str(path)!r} is an HDF5 file without weights that Keras wrote; {_WAY_OUT}")
    return units, specs


def _network(path: Path, root: h5py.File, config: Any, metadata: Any) -> Network:
    from qvis.adapters.keras.h5 import attribute

    units, specs = _units(path, root, config)
    found = Collector()
    for spec in specs:
        if spec.op == "Lambda":
            found.skip(spec.name, "is a Lambda layer: its code is not run, and it has no weights of its own")
    for unit in units:
        found.add(unit)
    name = keras_config.model_name(config) or attribute(root.get("vars", root), "name")
    if not isinstance(name, str) or not name:
        name = path.name.removesuffix(path.suffix).removesuffix(".weights")
    version = metadata.get("keras_version") if isinstance(metadata, dict) else None
    version = version or attribute(root, "keras_version") or attribute(root.get("model_weights", root), "keras_version")
    return found.network(name, f"Keras {version}" if isinstance(version, str) else "Keras")


def _with_config(root: h5py.File) -> tuple[h5py.File, Any, Any]:
    """An HDF5 file that is all there is, with the configuration that it holds."""
    from qvis.adapters.keras.h5 import attribute

    stored = attribute(root, "model_config")
    return root, json.loads(stored) if isinstance(stored, str) else None, None


def _text(path: Path) -> Any:
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def _open(file: Path | io.RawIOBase | io.BytesIO) -> h5py.File:
    import h5py

    return h5py.File(file, "r")


class _Section(io.RawIOBase):
    """A part of a file as a file of its own, so that HDF5 reads from the archive only what it is asked for."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.position = 0

    @classmethod
    def of(cls, path: Path, entry: zipfile.ZipInfo) -> _Section | None:
        """The bytes of an entry that is not compressed."""
        if entry.compress_type != zipfile.ZIP_STORED:
            return None
        with path.open("rb") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        # The entry's own header repeats its name, and may be padded otherwise than the directory says.
        name_length, extra_length = struct.unpack_from("<HH", mapped, entry.header_offset + 26)
        start = entry.header_offset + 30 + name_length + extra_length
        if start + entry.file_size > len(mapped):
            raise ValueError(f"{entry.filename} reaches beyond the end of the file")
        return cls(mapped[start : start + entry.file_size])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: len(self.data)}[whence]
        self.position = base + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        piece = self.data[self.position : self.position + len(target)]
        target[: len(piece)] = piece
        self.position += len(piece)
        return len(piece)
