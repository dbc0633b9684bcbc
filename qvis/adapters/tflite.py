"""Reads TensorFlow Lite models. (Being written.)"""

from __future__ import annotations

from qvis.layers import Network


def handles(model: object) -> bool:  # noqa: ARG001
    """Not yet."""
    return False


def read(model: object) -> Network:
    """Not yet."""
    raise NotImplementedError(model)
