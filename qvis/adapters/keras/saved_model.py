"""Reads what TensorFlow saves: SavedModel folders, the checkpoints inside them, and ``tf.Module`` objects in memory.

There the layers are gone, so that the names and shapes of the variables tell what each is for. By TensorFlow's
convention the last axis is the output, of a depthwise kernel the last two.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from qvis.adapters.checkpoint.stored import natural, reading
from qvis.adapters.keras.guess import identify
from qvis.adapters.keras.parts import owners
from qvis.adapters.keras.tf_bundle import GRAPH, MAGIC, Bundle, Entry
from qvis.adapters.keras.units import AnyArray, Collector, Unit, Variable
from qvis.errors import BadArgumentError, NoGraphError, NotRunnableError
from qvis.layers import Graph, Network
from qvis.running import Batch, Runner

_INDEX = Path("variables", "variables.index")
_MODELS = ("saved_model.pb", "saved_model.pbtxt")
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_NOT_THE_MODEL = re.compile(
    r"_?optimizer/|keras_api/|_?metrics/|save_counter|global_step|.*/\.OPTIMIZER_SLOT/|_CHECKPOINT"
)
_WITHOUT_LAYERS = (
    "what TensorFlow saved, or a tf.Module, has no layers that could be given other weights; pass the Keras model that "
    "it was made from, or its .keras file"
)
_WAY_OUT = "save it anew with tf.saved_model.save or model.export"


def handles(model: object) -> bool:
    """Whether it is a SavedModel folder, the index of a checkpoint or a ``tf.Module``. Does not import TensorFlow."""
    if not isinstance(model, Path):
        module = getattr(sys.modules.get("tensorflow"), "Module", None)
        return isinstance(module, type) and isinstance(model, module)
    if model.is_dir():
        return any((model / name).is_file() for name in _MODELS)
    return model.name.endswith(".index") and _ends_as_index(model)


def graph(model: Any, example: Batch | None = None) -> Graph:  # noqa: ARG001
    """Raises :class:`~qvis.errors.NoGraphError`: the layers are gone, and with them how they are connected."""
    raise NoGraphError(f"no graph: {_WITHOUT_LAYERS}")


def runner(model: Any, network: Network, loss: object = None) -> Runner:  # noqa: ARG001
    """Raises :class:`~qvis.errors.NotRunnableError`: its functions do not take other weights."""
    raise NotRunnableError(f"model: {_WITHOUT_LAYERS}")


def _ends_as_index(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(-len(MAGIC), 2)
            return file.read() == MAGIC
    except OSError:
        return False


def read(model: Any) -> Network:
    """List the variables of a model under their own names; the optimizer's are left out.

    Raises
    ------
    BadArgumentError
        The folder is damaged, or its weights are no variables.
    """
    if not isinstance(model, Path):
        return _gather(dict(_held(model)), type(model).__name__, f"TensorFlow {sys.modules['tensorflow'].__version__}")
    index = model / _INDEX if model.is_dir() else model
    if not index.is_file():
        raise BadArgumentError(
            f"model: {str(model)!r} is a SavedModel without variables (no {str(_INDEX)!r}), so that its weights are "
            "constants of the graph; give the model it was made from, or its .tflite or .onnx file"
        )
    with reading(model, "damaged, or no checkpoint of TensorFlow", _WAY_OUT):
        bundle = Bundle(index)
        variables = dict(_stored(bundle, model))
    name = model.resolve().name if model.is_dir() else bundle.prefix.name
    return _gather(variables, name, "TensorFlow")


def _stored(bundle: Bundle, path: Path) -> Iterator[tuple[str, Variable]]:
    """The variables of a checkpoint by name, each once however often it is listed."""
    names, slots = bundle.graph()
    found: dict[str, Entry] = {}
    # Keras lists its variables twice, the second time under private names and in no order.
    for key, entry in sorted(bundle.entries.items(), key=lambda one: (one[0].startswith("_"), natural(one[0]))):
        parent = key.rpartition("/")[0]
        is_slot = key in slots or (GRAPH not in bundle.entries and parent in bundle.entries)
        if is_slot or _NOT_THE_MODEL.match(key) or entry.dtype == "string":
            continue
        name = names.get(key) or key.removesuffix(_VALUE)
        if name in found and found[name].digest != entry.digest:
            name = key.removesuffix(_VALUE)
        found.setdefault(name, entry)
    for name, entry in found.items():
        yield name, Variable(name, entry.shape, entry.dtype, (name,), partial(_numbers, bundle, entry, path))


def _numbers(bundle: Bundle, entry: Entry, path: Path) -> AnyArray:
    with reading(path, "damaged", _WAY_OUT):
        return bundle.read(entry)


def _held(module: Any) -> Iterator[tuple[str, Variable]]:
    """The variables of a ``tf.Module`` by the attributes that lead to them."""
    tf = sys.modules["tensorflow"]
    for path, variable in module._flatten(predicate=lambda one: isinstance(one, tf.Variable), with_path=True):
        name = "/".join(map(str, path))
        shape = tuple(int(size) for size in variable.shape)
        yield name, Variable(name, shape, variable.dtype.name, id(variable), variable.numpy)


def _gather(variables: dict[str, Variable], name: str, framework: str) -> Network:
    """The layers that the names of variables speak of: all but the last step of a name is the layer's."""
    steps = {name: name.partition(":")[0].split("/") for name in variables}
    layers = {tuple(path[:-1]) for path in steps.values()}
    # The name of the whole model, which Keras puts first.
    prefixed = len({path[:1] for path in layers}) == 1 and len(layers) > 1 and min(map(len, layers)) > 1
    titles = owners(path[prefixed:] for path in layers)
    units: dict[str, list[tuple[str, Variable]]] = {}
    for one, path in steps.items():
        units.setdefault(titles[tuple(path[prefixed:-1])], []).append((path[-1], variables[one]))
    found = Collector()
    for title, held in units.items():
        shapes = {variable: one.shape for variable, one in held}
        op, config, notes = identify(title, shapes)
        found.add(
            Unit(
                title,
                op,
                config,
                tuple(
                    Variable(variable, one.shape, one.dtype, one.key, one.read, notes if len(one.shape) > 1 else ())
                    for variable, one in held
                ),
            )
        )
    return found.network(name, framework)
