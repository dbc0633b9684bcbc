"""A tensor in a file, known by name, shape and type before any of its numbers is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvis.errors import BadArgumentError, QvisError
from qvis.layers import Skipped

Array = NDArray[Any]


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """The type it is stored in, as PyTorch spells it."""
    read: Callable[[], Array] = field(repr=False, compare=False)
    """Returns its numbers in :attr:`shape`, floating types as float32 or float64; reads nothing but this tensor."""
    key: Hashable = None
    """Equal for two tensors that are the same numbers in the same place; None where that cannot be."""
    obstacle: str = ""
    """Why its numbers are no weights that can be shown; empty for floating types."""
    op: str = ""
    """The kind of layer, where the way it is stored tells."""
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds."""

    framework: str
    tensors: tuple[Stored, ...]
    """In the order in which layers are to be listed."""
    skipped: tuple[Skipped, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict)
    """Names that stand for a tensor of another name."""


def integers(dtype: str) -> str:
    """The obstacle of a tensor of integers."""
    if dtype in ("int64", "bool"):
        return f"holds indices or a mask ({dtype}), no weights"
    return f"holds integers ({dtype}) that do not say how to turn them back into weights"


@contextmanager
def reading(path: Path, what: str, way_out: str) -> Iterator[None]:
    """Turn whatever goes wrong with a file into one line: each library has its own ways to say that one is damaged."""
    try:
        yield
    except QvisError:
        raise
    except ImportError as error:
        raise BadArgumentError(
            f"model: {str(path)!r} needs the package {error.name!r} to be read; install it"
        ) from error
    except MemoryError as error:
        raise BadArgumentError(f"model: {str(path)!r} holds a tensor that does not fit into memory") from error
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise BadArgumentError(f"model: {str(path)!r} cannot be read: {error.strerror}") from error
        text = " ".join(str(error).split()).partition(". ")[0]
        text = f"{text[:200]}..." if len(text) > 200 else text or type(error).__name__
        raise BadArgumentError(f"model: {str(path)!r} is {what}, or was cut short ({text}); {way_out}") from error


def shown(array: Array) -> Array:
    """The same numbers in an array that cannot be written to; shares memory."""
    array = np.asarray(array)[...]
    array.flags.writeable = False
    return array


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts ``layers.2`` before ``layers.10``."""
    pieces = enumerate(re.split("([0-9]+)", name))
    return [(len(piece.lstrip("0")) if index % 2 else 0, piece) for index, piece in pieces]
