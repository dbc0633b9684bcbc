"""How data flows through a Keras model."""

from __future__ import annotations

from typing import Any

from qvis.errors import NoGraphError
from qvis.layers import Graph
from qvis.running import Batch


def graph(model: Any, example: Batch | None = None) -> Graph:  # noqa: ARG001
    """How data flows through a model."""
    raise NoGraphError("no graph: not of Keras models yet")
