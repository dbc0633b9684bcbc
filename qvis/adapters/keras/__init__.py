"""Reads a Keras model in memory: Keras 3 on any backend, and Keras 2 (``tf_keras``).

Layers are named as Keras names them, by the path inside the model: ``encoder/attention/query``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qvis.adapters.keras.graph import graph as graph
from qvis.adapters.keras.live import package_of, unit, walk
from qvis.adapters.keras.parts import RULES
from qvis.adapters.keras.runner import runner as runner
from qvis.adapters.keras.units import Collector
from qvis.adapters.rewritten import Rewritten
from qvis.errors import UnsupportedModelError
from qvis.layers import FloatArray, Network
from qvis.rewriting import Rewriting
from qvis.running import Batch

_ATTENTION = ("MultiHeadAttention", "GroupedQueryAttention", "GroupQueryAttention")


def handles(model: object) -> bool:
    """Whether ``model`` is a Keras model or layer. Does not import Keras: without it there is no such object."""
    return package_of(model) is not None


def read(model: Any) -> Network:
    """List the weights of a model in the order of its layers, each layer once however often it is used.

    Nothing of the model is touched: not its weights, trainable flags or optimizer, and not the state of the random
    generators; no layer is called.

    Raises
    ------
    UnsupportedModelError
        The model was not built yet, so that it has no weights.
    """
    found, empty = Collector(), []
    for name, op, layer in walk(model):
        one = unit(name, op, layer)
        found.add(one)
        if not one.variables and not layer.built and (op in RULES or op in _ATTENTION):
            empty.append((name, op))
    if (empty and not (model.built and found.layers)) or not (model.built or found.sizes):
        raise UnsupportedModelError(
            f"model: the Keras model {model.name!r} is not built yet, so that it has no weights; "
            "call it once on an example input, or model.build(input_shape), then pass it again"
        )
    for name, op in empty:
        found.skip(name or "(root)", f"is a {op} that was never called, so that it has no weights yet")
    return found.network(str(model.name), _framework(model))


def rewrite(model: Any, network: Network, rewriting: Rewriting, inplace: bool = False) -> Rewritten:
    """Write numbers and operations into a copy of a model; see :func:`qvis.adapters.keras.rewriting.rewrite_model`."""
    from qvis.adapters.keras.rewriting import rewrite_model

    return rewrite_model(model, network, rewriting, inplace)


def affines(model: Any) -> dict[str, tuple[FloatArray | None, FloatArray | None]]:
    """Factor and shift of normalizations; see :func:`qvis.adapters.keras.rewriting.affines_of`."""
    from qvis.adapters.keras.rewriting import affines_of

    return affines_of(model)


def multipliable(model: Any, network: Network) -> list[str]:
    """The layers before which :func:`rewrite` can put a multiplication, by name."""
    from qvis.adapters.keras.rewriting import multipliable

    return multipliable(model, network)


def save(model: Any, path: Path, example: Batch | None = None) -> None:  # noqa: ARG001
    """Write a model to a file; see :func:`qvis.adapters.keras.rewriting.save_model`."""
    from qvis.adapters.keras.rewriting import save_model

    save_model(model, path)


def _framework(model: object) -> str:
    return f"Keras {getattr(package_of(model), '__version__', '')}".strip()
