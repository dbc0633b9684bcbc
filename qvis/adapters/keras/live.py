"""The layers of a Keras model in memory, with their names, and the variables that they hold."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from qvis.adapters.keras.parts import RULES
from qvis.adapters.keras.units import AnyArray, Collector, Unit, Variable

TRACED = ("train_function", "test_function", "predict_function")
"""What Keras compiles of a model once, and keeps."""
_PACKAGES = ("keras", "tf_keras")


def package_of(model: object) -> Any:
    """The package the model's class comes from."""
    for name in _PACKAGES:
        package = sys.modules.get(name)
        layer = getattr(getattr(package, "layers", None), "Layer", None)
        if isinstance(layer, type) and isinstance(model, layer):
            return package
    return None


def collect(model: Any) -> Collector:
    """The weights of a model, with Keras's own layers and variables."""
    found = Collector()
    for place in walk(model):
        found.add(unit(*place))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Which layers there are


def walk(model: Any) -> Iterator[tuple[str, str, Any]]:
    """A model and all its layers, outermost first, as (name, type, layer). One that is in two places comes twice."""
    return _walk(model, "", None, frozenset())


def _walk(layer: Any, name: str, op: str | None, above: frozenset[int]) -> Iterator[tuple[str, str, Any]]:
    op = op or _layer_type(layer)
    yield name, op, layer
    above = above | {id(layer)}
    for child in children(layer):
        if id(child) in above:
            continue
        if child is getattr(layer, "cell", None):  # a recurrent layer and its cell are one to the user
            yield from _walk(child, name, op if op in RULES else None, above)
        else:
            yield from _walk(child, f"{name}/{child.name}" if name else str(child.name), None, above)


def children(layer: Any) -> list[Any]:
    """The layers that a layer holds itself."""
    found: list[Any] = layer._flatten_layers(include_self=False, recursive=False)
    return found


def _layer_type(layer: Any) -> str:
    """The name of the Keras layer that a layer is, or is derived from; else of its own class."""
    for cls in type(layer).__mro__:
        if cls.__module__.partition(".")[0] in _PACKAGES and cls.__name__ in RULES:
            return cls.__name__
    return type(layer).__name__


def _config(layer: Any) -> dict[str, Any]:
    """What the rules ask for; ``get_config`` is the user's own code, and may fail."""
    return {"equation": getattr(layer, "equation", ""), "dtype": {"config": {"mode": _mode(layer)}}}


def _mode(layer: Any) -> str | None:
    mode = getattr(layer, "quantization_mode", None)
    return mode if isinstance(mode, str) else None


def ends(model: Any) -> tuple[Any, Any] | None:
    """The symbolic inputs and outputs of a functional or sequential model, as it nests them; None for others."""
    functional = getattr(model, "_functional", None) or model
    if not hasattr(functional, "_inputs_struct") or not type(model).call.__module__.startswith("keras."):
        return None
    return functional._inputs_struct, functional._outputs_struct


def nodes_of(model: Any) -> list[Any]:
    """The calls that a functional or sequential model is made of."""
    functional = getattr(model, "_functional", None) or model
    return [node for nodes in functional._nodes_by_depth.values() for node in nodes]


def is_compiled(layer: Any) -> bool:
    """Whether the layer's own code is compiled by ``tf.function``, which keeps what it was traced with."""
    tf = sys.modules.get("tensorflow")
    held = {name: one for name, one in vars(layer).items() if name not in TRACED}
    classes = [cls for cls in type(layer).__mro__ if not cls.__module__.startswith(("keras.", "tensorflow."))]
    found = [*held.values(), *(one for cls in classes for one in vars(cls).values())]
    return tf is not None and any(isinstance(one, tf.types.experimental.PolymorphicFunction) for one in found)


# ---------------------------------------------------------------------------------------------------------------------
# Their variables


def unit(name: str, op: str, layer: Any) -> Unit:
    return Unit(name, op, _config(layer), tuple(_variables(layer, op)), layer)


def _variables(layer: Any, op: str) -> Iterator[Variable]:
    is_keras_2 = not hasattr(layer, "_trainable_variables")
    learned = layer._trainable_weights if is_keras_2 else layer._trainable_variables
    kept = layer._non_trainable_weights if is_keras_2 else layer._non_trainable_variables
    merged = _merged(layer)
    for variable in [*learned, *kept]:
        name = str(variable.name).rpartition("/")[2].partition(":")[0]
        if merged is not None and name.startswith("lora_"):
            continue
        is_weight = name in RULES.get(op, {})
        with_update = merged is not None and is_weight
        yield Variable(
            name=name,
            shape=tuple(int(size) for size in variable.shape),
            dtype=_name(variable.dtype),
            key=id(variable),
            read=partial(numbers, layer if with_update else variable, merged if with_update else None),
            notes=("computed with its LoRA update",) if with_update else (),
            learned=is_weight or any(variable is one for one in learned),
            held=variable,
        )


def _merged(layer: Any) -> str | None:
    """The property that holds the kernel together with its low-rank update, None for a layer without one."""
    if not getattr(layer, "lora_enabled", False) or _mode(layer) is not None:
        return None
    return "embeddings" if hasattr(type(layer), "embeddings") else "kernel"


def numbers(holder: Any, attribute: str | None) -> AnyArray:
    value = holder if attribute is None else getattr(holder, attribute)
    inner = getattr(value, "value", None)
    if inner is not None and not callable(inner):  # what a variable of Keras 3 wraps
        value = inner
    if hasattr(value, "detach"):  # a tensor of torch, some types of which NumPy does not know
        value = value.detach().cpu()
        value = value if str(value.dtype) == "torch.float64" else value.float()
    return np.asarray(value.numpy() if hasattr(value, "numpy") else value)


def _name(dtype: object) -> str:
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")
