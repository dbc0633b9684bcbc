"""What the configuration in a Keras file says about its layers: their names, types, and where their arrays lie.

A configuration is read as the JSON it is. No class is looked up by it, and no code in it is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qvis.adapters.keras.parts import RULES, Config, snake

CUSTOM = "(custom)"
"""The type of a layer whose class is not one of Keras."""
_DEPTH = 100
_RECURRENT = {op for op in RULES if op.startswith(("LSTM", "GRU", "SimpleRNN", "ConvLSTM")) and "Cell" not in op}


@dataclass(frozen=True)
class Spec:
    """One layer of a configuration."""

    place: str
    """The path of its group in a ``.weights.h5`` file."""
    name: str
    """The names of the layers around it and its own, joined by slashes."""
    op: str
    config: Config


def specs(model: Any) -> list[Spec]:
    """All layers of a model, in its own order; nothing of what the file says is relied on to be well-formed."""
    return list(_specs(model, "", "", 0))


def model_name(model: Any) -> str | None:
    """The name that the model was given."""
    name = _config(model).get("name")
    return name if isinstance(name, str) and name else None


def _specs(node: Any, place: str, name: str, depth: int) -> Iterator[Spec]:
    config, op = _config(node), _type(node)
    yield Spec(place, name, op, config)
    if depth > _DEPTH:
        return
    if op in _RECURRENT:
        yield Spec(_join(place, "cell"), name, op, config)
    for key, child in _children(node, config, op):
        # A recurrent layer and its cell are one to the user.
        inner = name if key == "cell" else _join(name, _name(child, key.rpartition("/")[2]))
        yield from _specs(child, _join(place, key), inner, depth + 1)


def _children(node: Any, config: Config, op: str) -> Iterator[tuple[str, Any]]:
    """The layers directly inside, with the names that Keras has for them in files."""
    if op == "Bidirectional":
        forward = config.get("layer")
        backward = config.get("backward_layer") or forward
        yield "forward_layer", _renamed(forward, "forward_")
        yield "backward_layer", _renamed(backward, "backward_")
        return
    held = node["config"] if isinstance(node, dict) else None
    if isinstance(held, list):  # a sequential model of early Keras
        config = {"layers": held}
    for key, value in config.items():
        if isinstance(value, list):
            used: dict[str, int] = {}
            for one in value:
                if _is_layer(one):
                    base = snake(str(one["class_name"]))
                    used[base] = used.get(base, -1) + 1
                    yield f"{key}/{base}_{used[base]}" if used[base] else f"{key}/{base}", one
        elif key != "dtype" and _is_layer(value):
            yield key, value


def _is_layer(node: Any) -> bool:
    """Whether it describes a layer, and not an operation, an initializer or the like."""
    if not isinstance(node, dict) or not isinstance(node.get("class_name"), str):
        return False
    if ".ops." in str(node.get("module")):
        return False
    return isinstance(node.get("config"), list) or isinstance(_config(node).get("name"), str)


def _config(node: Any) -> Config:
    config = node.get("config") if isinstance(node, dict) else None
    return config if isinstance(config, dict) else {}


def _type(node: Any) -> str:
    """The class, as long as it is one of Keras: files of Keras 2 do not say so for those that are."""
    if not isinstance(node, dict):
        return CUSTOM
    module, registered = node.get("module"), node.get("registered_name")
    package = str(module or "").partition(".")[0]
    of_keras = package in ("keras", "tf_keras", "tensorflow") if module else not registered
    return str(node.get("class_name")) if of_keras else CUSTOM


def _name(node: Any, otherwise: str) -> str:
    name = _config(node).get("name")
    if not isinstance(name, str):
        name = node.get("name") if isinstance(node, dict) else None
    return name if isinstance(name, str) and name else otherwise


def _renamed(node: Any, prefix: str) -> Any:
    """The layer as Bidirectional calls it."""
    if not isinstance(node, dict):
        return node
    config = _config(node)
    name = str(config.get("name", ""))
    return {**node, "config": {**config, "name": name if name.startswith(prefix) else f"{prefix}{_plain(name)}"}}


def _plain(name: str) -> str:
    return name.removeprefix("forward_").removeprefix("backward_")


def _join(first: str, second: str) -> str:
    return f"{first}/{second}" if first and second else first or second
