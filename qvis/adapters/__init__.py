"""Where models come in: finds the adapter for a model object or a file, and picks the layers that were asked for.

An adapter is a module of this package, or an object that another package offers under the entry point group
``qvis.adapters``. It knows one framework or one file format, and imports it only when it reads.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, cast

from qvis.adapters.rewritten import Rewritten
from qvis.errors import (
    BadArgumentError,
    NoGraphError,
    NotRunnableError,
    OutputError,
    UnknownLayerError,
    UnsupportedModelError,
    suggest,
)
from qvis.layers import FloatArray, Graph, Layer, Network
from qvis.rewriting import Rewriting
from qvis.running import Batch, Runner
from qvis.writing import check_target, replacing

BUILT_IN = ("torch.exported", "keras", "keras.files", "keras.saved_model", "torch", "onnx", "tflite", "checkpoint")
"""Modules of this package, asked in this order. A Keras model on the torch backend is a module too, and some files are
known by what they are named only."""
PLUGINS = "qvis.adapters"
"""The entry point group of adapters from other packages, asked after the built-in ones."""
ACCEPTED = (
    "a torch.nn.Module, a Keras or ONNX model, an exported program, or the path of a .pt2, .keras, .h5, .onnx or "
    ".tflite file, of a SavedModel or of a checkpoint"
)


class Adapter(Protocol):
    """What an adapter offers; a module with these two functions is one."""

    def handles(self, model: Any, /) -> bool:
        """Whether this adapter reads ``model``, an object or a :class:`~pathlib.Path`. Imports no framework."""
        ...

    def read(self, model: Any, /) -> Network:
        """The model's layers. Never changes the model."""
        ...

    # Optional; an adapter without them reads weights only.
    #
    # def graph(model, example: Batch | None) -> Graph
    #     How data flows through the model; raises NoGraphError. ``example`` is a batch that it can be run on.
    #
    # def runner(model, network: Network, loss: object = None) -> Runner
    #     The model made ready to be run; raises NotRunnableError. ``loss`` takes the place of the outputs.
    #
    # def rewrite(model, network: Network, rewriting: Rewriting, inplace: bool = False) -> Rewritten
    #     A copy of the model with new numbers; raises BadArgumentError.
    #
    # def multipliable(model, network: Network) -> Collection[str]
    #     The layers of ``Rewriting.multiplies`` that rewrite takes; all of them without it.
    #
    # def load(model: Path) -> object
    #     The model that a file holds, to be run; raises NotRunnableError.
    #
    # def save(model, path: Path, example: Batch | None) -> None
    #     Writes the model to a new file, whose suffix says in which format; raises OutputError.


def read(
    model: object,
    selected_layers: str | Iterable[str] | None = None,
    *,
    name: str | None = None,
    channel_axis: int | Mapping[str, int] | None = None,
) -> Network:
    """Read the layers of a model.

    Parameters
    ----------
    model
        A model object, or the path of a file.
    selected_layers
        Names of layers, of modules (all layers inside), or glob patterns; case matters. Default: all layers. The order
        stays the model's.
    name
        What to call the model. Default: the name of its class or file.
    channel_axis
        The axis of the output channels for tensors of a bare checkpoint, where nothing says which it is: one number for
        all of them, or numbers by name or pattern, of which a later one overrides an earlier.

    Raises
    ------
    UnsupportedModelError
        ``model`` is nothing that an adapter reads, or it holds no weights.
    UnknownLayerError
        An entry of ``selected_layers`` or ``channel_axis`` matches no layer.
    BadArgumentError
        A path that does not exist, ``selected_layers`` that are no names, or a ``channel_axis`` for a layer whose axis
        is another one for sure.
    """
    adapter, model = _adapter(model)
    network = adapter.read(model)
    if not network.layers:
        left_out = "".join(f"; {skipped.name!r} {skipped.reason}" for skipped in network.skipped[:3])
        raise UnsupportedModelError(f"model: {network.name} holds no weights that could be reported on{left_out}")
    if channel_axis is not None:
        network = replace(network, layers=turn(network, channel_axis))
    if selected_layers is not None:
        network = select(network, selected_layers)
    return network if name is None else replace(network, name=name)


def graph(model: object, example: Batch | None = None) -> Graph:
    """How data flows through a model.

    Parameters
    ----------
    model
        A model object, or the path of a file.
    example
        A batch that the model can be run on. Without one the graph is only found where the code of the model does not
        ask for shapes or numbers.

    Raises
    ------
    NoGraphError
        It cannot be found.
    """
    adapter, model = _adapter(model)
    find_graph = getattr(adapter, "graph", None)
    if find_graph is None:
        raise NoGraphError(f"no graph: {_describe(model)} holds weights without the operations between them")
    return cast(Graph, find_graph(model, example))


def runner(model: object, network: Network, loss: object = None) -> Runner:
    """The model made ready to be run on other weights than its own.

    Parameters
    ----------
    model
        A model object, or the path of a file.
    network
        What :func:`read` returned for it; weights of other layers are not exchanged.
    loss
        What takes the place of the outputs; see :func:`qvis.sensitivity`.

    Raises
    ------
    NotRunnableError
        It cannot be run.
    """
    adapter, model = _adapter(model)
    make = getattr(adapter, "runner", None)
    if make is None:
        raise NotRunnableError(f"model: {_describe(model)} can be read, but not run; give the model itself")
    return cast(Runner, make(model, network, loss))


def load(model: object) -> object:
    """The model that a file holds, as an object of its framework; an object is returned as it is.

    A ``.pt2`` file is loaded with ``torch.export.load`` and a file of Keras with Keras: unlike for reading, it must be
    one that you trust.

    Raises
    ------
    NotRunnableError
        The file holds no model that could be run, or its framework cannot load it.
    """
    adapter, model = _adapter(model)
    if not isinstance(model, Path):
        return model
    open_file = getattr(adapter, "load", None)
    if open_file is None:
        raise NotRunnableError(f"model: {_describe(model)} can be read, but not run; give the model itself")
    return open_file(model)


def rewrite(model: object, network: Network, rewriting: Rewriting, *, inplace: bool = False) -> Rewritten:
    """A copy of a model with new numbers in it.

    Parameters
    ----------
    model
        A model object, or the path of a file. A ``.pt2`` file is loaded with ``torch.export.load`` and a file of Keras
        with Keras: unlike for reading, it must be one that you trust.
    network
        What :func:`read` returned for it.
    rewriting
        The numbers; what it does not name stays.
    inplace
        Whether to write into ``model`` itself in place of a copy. Nothing is written where something is wrong.

    Returns
    -------
    Rewritten
        The new model, of the kind that was given, and notes on what else is different in it. Of a file, what it holds.

    Raises
    ------
    BadArgumentError
        Names, shapes or numbers do not fit the model; the message says which.
    UnsupportedModelError
        Only the weights of the model can be read.
    """
    adapter, model = _adapter(model)
    write = getattr(adapter, "rewrite", None)
    if write is None:
        raise UnsupportedModelError(
            f"model: {_describe(model)} can be read, but no copy of it can be made with other numbers; "
            "give the model itself"
        )
    return cast(Rewritten, write(model, network, rewriting, inplace))


def affines(model: object) -> Mapping[str, tuple[FloatArray | None, FloatArray | None]]:
    """Factor and shift of the layer, RMS and group normalizations that :func:`rewrite` can write, by name."""
    adapter, model = _adapter(model)
    find_affines = getattr(adapter, "affines", None)
    if find_affines is None:
        return {}
    return cast("Mapping[str, tuple[FloatArray | None, FloatArray | None]]", find_affines(model))


def multipliable(model: object, network: Network) -> Collection[str]:
    """The layers before which :func:`rewrite` can insert a multiplication of what enters them, by name."""
    adapter, model = _adapter(model)
    find_multipliable = getattr(adapter, "multipliable", None)
    if find_multipliable is None:
        return [layer.name for layer in network.layers]
    return cast("Collection[str]", find_multipliable(model, network))


def save(model: object, path: str | PathLike[str], *, example: Batch | None = None, source: object = None) -> Path:
    """Write a model to a file of its framework. A file that is there is replaced, once the new one is complete.

    Parameters
    ----------
    model
        A model object.
    path
        Where to; the suffix says in which format. ``.pt2``, ``.pt``, ``.pth`` or ``.safetensors`` for PyTorch (the last
        three hold the numbers alone), ``.keras`` or ``.h5`` for Keras, ``.onnx`` for ONNX, with a file beside it where
        it is larger than 2 GB.
    example
        A batch that the model can be run on, with which a module of PyTorch is exported for ``.pt2``.
    source
        The model that all began with; where it is a file, that is never overwritten.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    OutputError
        The suffix does not go with the model, ``path`` is the file that the model came from, or it cannot be written.
    """
    target = Path(path)
    if isinstance(model, (str, PathLike)):
        raise BadArgumentError(f"model: expected a model object to save, not the path {os.fspath(model)!r}")
    if isinstance(source, (str, PathLike)) and target.exists() and target.samefile(source):
        raise OutputError(f"path: {str(target)!r} is the file that the model came from; choose another name")
    check_target(target, "path")
    adapter, model = _adapter(model)
    write = getattr(adapter, "save", None)
    if write is None:
        raise OutputError(f"model: {_describe(model)} cannot be saved by qvis; save it with its own framework")
    with replacing(target, "path") as file:
        write(model, file, example)
    return target


def _adapter(model: object) -> tuple[Adapter, object]:
    """The adapter for a model, and the model as the adapter takes it."""
    if isinstance(model, (str, PathLike)):
        model = _existing(model)
    failures: list[str] = []
    adapter = find(model, failures)
    if adapter is None:
        raise UnsupportedModelError("; ".join([f"model: cannot read {_describe(model)}; give {ACCEPTED}", *failures]))
    return adapter, model


def _existing(model: str | PathLike[str]) -> Path:
    path = Path(model)
    if not path.exists():
        raise BadArgumentError(f"model: there is no file {str(model)!r}; give {ACCEPTED}")
    return path


def find(model: object, failures: list[str] | None = None) -> Adapter | None:
    """The adapter that handles ``model``. What fails in a plugin is added to ``failures``."""
    for name in BUILT_IN:
        adapter = cast(Adapter, import_module(f"{__name__}.{name}"))
        if adapter.handles(model):
            return adapter
    found = (_plugin(plugin, model, [] if failures is None else failures) for plugin in entry_points(group=PLUGINS))
    return next(filter(None, found), None)


def _plugin(plugin: EntryPoint, model: object, failures: list[str]) -> Adapter | None:
    """The plugin's adapter when it handles the model. One that fails must not hide that nothing else does."""
    try:
        adapter: Adapter = plugin.load()
        return adapter if adapter.handles(model) else None
    except Exception as error:
        failures.append(f"the plugin {plugin.name!r} failed with {type(error).__name__}: {error}")
        return None


def _describe(model: object) -> str:
    if isinstance(model, Path):
        return f"the {'folder' if model.is_dir() else 'file'} {str(model)!r}"
    if isinstance(model, type):
        return f"the class {_spell(model)}, only an instance of it"
    return f"an object of type {_spell(type(model))}"


def _spell(cls: type) -> str:
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def select(network: Network, selected_layers: str | Iterable[str]) -> Network:
    """The network with the layers alone that at least one of the names or patterns means, in their own order."""
    wanted = [selected_layers] if isinstance(selected_layers, str) else list(selected_layers)
    if not wanted or not all(isinstance(one, str) for one in wanted):
        raise BadArgumentError(
            f"selected_layers: expected names of layers or patterns such as 'conv*', not {wanted!r}; "
            "leave it out to take all layers"
        )
    names = {layer.name: set(_spellings(layer)) for layer in network.layers}
    chosen: set[str] = set()
    for one in wanted:
        chosen |= _matching(network, names, one, "selected_layers")
    return replace(network, layers=tuple(layer for layer in network.layers if layer.name in chosen))


def _matching(network: Network, names: dict[str, set[str]], wanted: str, argument: str) -> set[str]:
    """The layers that a name or pattern means, by what each answers to."""
    # A name may hold brackets or stars, so that it is only taken for a pattern when it is nobody's name.
    matched = {layer for layer, spellings in names.items() if wanted in spellings}
    matched = matched or {layer for layer in names if _lies_on(wanted.removeprefix(f"{network.name}/"), layer)}
    matched = matched or {layer for layer, known in names.items() if any(fnmatchcase(n, wanted) for n in known)}
    if not matched:
        raise UnknownLayerError(f"{argument}: no layer matches {wanted!r}{_explain(network, wanted)}")
    return matched


def turn(network: Network, channel_axis: int | Mapping[str, int]) -> tuple[Layer, ...]:
    """The layers with their output channels along the axes that were asked for."""
    given: dict[str, Any] = dict(channel_axis) if isinstance(channel_axis, Mapping) else {"": channel_axis}
    if not all(isinstance(one, str) and type(axis) is int for one, axis in given.items()):
        raise BadArgumentError(
            f"channel_axis: expected an axis such as 1, or axes by name or pattern such as {{'conv*': 1}}, "
            f"not {channel_axis!r}"
        )
    layers = {layer.name: layer for layer in network.layers}
    names = {layer.name: set(_spellings(layer)) for layer in network.layers}
    for one, axis in given.items():
        matched = _matching(network, names, one, "channel_axis") if one else set(layers)
        if one == "" and not any(layer.along for layer in layers.values()):
            matched = {network.layers[0].name}  # refused by its name
        for name in [name for name in layers if name in matched]:
            layer = layers[name]
            if layer.along is not None:
                layers[name] = replace(layer.along(axis), aliases=layer.aliases, along=layer.along)
            elif one or len(matched) == 1:
                _check_known(layer, axis)
    return tuple(layers[layer.name] for layer in network.layers)


def _check_known(layer: Layer, axis: int) -> None:
    """Accept no other axis than the one that the model says it is."""
    if layer.channels != f"axis {axis % len(layer.shape)}":
        raise BadArgumentError(
            f"channel_axis: {layer.name!r} ({layer.op}) has its output channels along {layer.channels} for sure; "
            "leave it out, it is for bare checkpoints"
        )


def _spellings(layer: Layer) -> Iterator[str]:
    """All that a layer answers to: its names, and the modules around them."""
    for name in (layer.name, *layer.aliases):
        for mark in "./":
            parts = name.split(mark)
            yield from (mark.join(parts[:end]) for end in range(1, len(parts) + 1))


def _lies_on(path: str, layer: str) -> bool:
    """Whether a layer of Keras is, or is inside, the one that ``path`` means without the models around it."""
    return "/" in layer and f"/{path}/" in f"/{layer}/"


def _explain(network: Network, wanted: str) -> str:
    for skipped in network.skipped:
        if skipped.name == wanted:
            return f": it was skipped because it {skipped.reason}"
    return suggest(wanted, [name for layer in network.layers for name in (layer.name, *layer.aliases)])
