"""Finds the layers in an HDF5 file of Keras: the numbered arrays of Keras 3, and the named ones of Keras 2.

Arrays are found now and read later, one by one. Links are not followed: they could point at other files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from qvis.adapters.checkpoint.stored import natural
from qvis.adapters.keras.config import Spec
from qvis.adapters.keras.guess import identify
from qvis.adapters.keras.parts import RULES, inside_attention, owners, position, type_named, variable_names
from qvis.adapters.keras.units import AnyArray, Unit, Variable

if TYPE_CHECKING:
    import h5py

    Guard = AbstractContextManager[None]

_NO_LAYERS = {"vars", "optimizer", "_optimizer", "metrics", "_metrics", "_compile_metrics", "_loss_tracker"}
_DEPTH = 100
_OLD_LAYERS = "_layer_checkpoint_dependencies"
"""What the group of a model's layers is called in files of Keras 2.12."""


class File:
    """An open file, and what is known about its layers."""

    def __init__(self, root: h5py.File, specs: Sequence[Spec], guard: Any) -> None:
        self.root = root
        self.specs = specs
        self.guard = guard
        """Makes a context in which a failure to read becomes an error about the file."""
        self.by_place = {spec.place: spec for spec in reversed(specs)}
        self.order = {spec.place: index for index, spec in reversed(list(enumerate(specs)))}
        self.by_name: dict[str, Spec] = {}
        for spec in specs:
            if spec.name not in self.by_name or self.by_name[spec.name].op not in RULES:
                self.by_name[spec.name] = spec

    def units(self) -> list[Unit] | None:
        """The layers with arrays; None where the file is not one of Keras."""
        if "model_weights" in self.root:
            return list(self._named(child(self.root, "model_weights")))
        if attribute(self.root, "layer_names") is not None:
            return list(self._named(self.root))
        found = list(self._numbered(self.root, "", "", "", 0))
        return found or None

    # -----------------------------------------------------------------------------------------------------------------
    # Keras 3: layers/conv2d/vars/0

    def _numbered(self, group: h5py.Group, place: str, name: str, op: str, depth: int) -> Iterator[Unit]:
        if depth > _DEPTH:
            raise ValueError("groups are nested too deeply")
        spec = self.by_place.get(place)
        held = child(group, "vars") if "vars" in group else {}
        keys = sorted(held, key=natural)
        if keys:
            arrays = [child(held, key) for key in keys]
            config = dict(spec.config) if spec else {}
            op = spec.op if spec else op
            names = variable_names(op, config, len(keys)) if all(key.isdigit() for key in keys) else keys
            yield self._unit(name, op, config, dict(zip(names, arrays, strict=True)), known=spec is not None)
        skipped = _NO_LAYERS if depth == 0 else {"vars"}
        inside = [(key, child(group, key)) for key in group if key not in skipped]
        found = []
        for key, one in inside:
            if hasattr(one, "keys"):
                where = self._place(place, key)
                title, kind, known = self._describe(one, where, key, name, op)
                rank = self.order[known.place] if known else len(self.order)
                found.append((rank, position(key), natural(key), one, known.place if known else where, title, kind))
        for *_, one, where, title, kind in sorted(found, key=lambda entry: entry[:3]):
            yield from self._numbered(one, where, title, kind, depth + 1)

    def _place(self, place: str, key: str) -> str:
        key = "layers" if key == _OLD_LAYERS else key
        return f"{place}/{key}" if place else key

    def _describe(self, group: h5py.Group, place: str, key: str, name: str, op: str) -> tuple[str, str, Spec | None]:
        """A layer's name and type by the configuration, or else by its group's own name and that of the one around."""
        spec = self.by_place.get(place)
        if spec is not None:
            return spec.name, spec.op, spec
        if "vars" not in group:  # a list of layers, or a layer without arrays
            return name, op, None
        own = attribute(child(group, "vars"), "name")
        own = own if isinstance(own, str) and own else inside_attention(key)
        if key == "cell":
            return name, op if op in RULES else type_named(own) or "", None
        title = f"{name}/{own}" if name else own
        spec = self.by_name.get(title)  # a class may have another name in the configuration
        if spec is not None:
            return title, spec.op, spec
        return title, type_named(key) or type_named(own) or "", None

    # -----------------------------------------------------------------------------------------------------------------
    # Keras 2, and Keras 3 for .h5 files of whole models: conv1/conv1/kernel:0

    def _named(self, root: h5py.Group) -> Iterator[Unit]:
        for layer in [*_texts(root, "layer_names"), "top_level_model_weights"]:
            if layer not in root:
                continue
            group = child(root, layer)
            arrays: dict[tuple[str, ...], dict[str, Any]] = {}
            for path in _texts(group, "weight_names"):
                array = group
                for step in path.split("/"):
                    array = child(array, step) if step else array
                owner, _, variable = path.rpartition("/")
                title = self._owner(layer, owner.split("/") if owner else [])
                arrays.setdefault(tuple(title), {})[variable.partition(":")[0]] = array
            titles = owners(arrays)
            for steps, held in arrays.items():
                yield self._titled(titles[steps], held)

    def _titled(self, title: str, arrays: dict[str, Any]) -> Unit:
        spec = self.by_name.get(title)
        if spec is not None and spec.op == "TimeDistributed":  # Keras 2 leaves out the layer inside
            spec = next((one for one in self.specs if one.name.startswith(f"{title}/")), spec)
            title = spec.name
        return self._unit(title, spec.op if spec else "", dict(spec.config) if spec else {}, arrays, known=bool(spec))

    def _owner(self, layer: str, steps: list[str]) -> list[str]:
        """The path of the layer that an array is of; ``steps`` may leave out nested models, or start with the whole."""
        if layer == "top_level_model_weights":
            return steps[1:]
        for end in range(len(steps), 0, -1):
            names = [name for name in self.by_name if _is_inside(name, layer) and name.split("/")[-1] == steps[end - 1]]
            if names:
                best = max(names, key=lambda name: len(set(name.split("/")) & set(steps)))
                return [*best.split("/"), *steps[end:]]
        if layer in steps:
            steps = steps[steps.index(layer) + 1 :]
        return [layer, *steps]

    # -----------------------------------------------------------------------------------------------------------------

    def _unit(self, name: str, op: str, config: dict[str, Any], arrays: Mapping[str, Any], *, known: bool) -> Unit:
        for array in arrays.values():
            if not hasattr(array, "shape") or array.shape is None:
                raise ValueError(f"{array.name!r} is no array")
        shapes = {key: tuple(array.shape) for key, array in arrays.items()}
        notes: tuple[str, ...] = ()
        if not known:
            op, config, notes = identify(name, shapes, op)
        if not known and op in RULES and "0" in arrays:
            names = variable_names(op, config, len(arrays))
            arrays = dict(zip(names, arrays.values(), strict=True))
        return Unit(name, op, config, tuple(self._variable(op, key, one, notes) for key, one in arrays.items()))

    def _variable(self, op: str, name: str, array: h5py.Dataset, notes: tuple[str, ...]) -> Variable:
        import h5py

        stem, _, number = name.rpartition("_")
        if number.isdigit() and stem in RULES.get(op, {}):  # Keras 2 numbers the variables of some copied layers
            name = stem
        dtype = _dtype(array)

        def read() -> AnyArray:
            with self.guard():
                values: AnyArray = array[...]
                if dtype == "bfloat16":
                    words: AnyArray = values.view("<u2").astype(np.uint32) << np.uint32(16)
                    values = words.view(np.float32)
                return values

        key = h5py.h5o.get_info(array.id).addr
        return Variable(name, tuple(array.shape), dtype, key, read, notes)


def child(group: Any, name: str) -> Any:
    """What a group holds under a name, as long as it lies in the same file."""
    import h5py

    link = group.get(name, getlink=True)
    if link is None:
        raise KeyError(f"{name!r} is missing in {group.name!r}")
    if not isinstance(link, h5py.HardLink):
        raise ValueError(f"{name!r} in {group.name!r} is a link, which could point outside the file")
    found = group[name]
    if isinstance(found, h5py.Dataset) and (found.external or found.is_virtual):
        raise ValueError(f"{found.name!r} keeps its numbers in another file")
    return found


def attribute(group: Any, name: str) -> Any:
    """An attribute, text as text; those that Keras splits are found by their first part."""
    attributes = group.attrs
    value = attributes.get(name, attributes.get(f"{name}0"))
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _texts(group: h5py.Group, name: str) -> list[str]:
    """An attribute that is a list of texts, put together from its parts."""
    parts = [group.attrs[name]] if name in group.attrs else []
    while not parts or len(parts) <= len(group.attrs):
        key = f"{name}{len(parts)}"
        if name in group.attrs or key not in group.attrs:
            break
        parts.append(group.attrs[key])
    texts = [text for part in parts for text in np.asarray(part).reshape(-1).tolist()]
    return [text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text) for text in texts]


def _dtype(array: h5py.Dataset) -> str:
    if attribute(array, "dtype") == "bfloat16" or array.dtype == np.dtype("V2"):
        return "bfloat16"
    return str(array.dtype.name)


def _is_inside(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}/")
