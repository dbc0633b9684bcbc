"""What really is in a quantized file: found by opening it, not by trusting who wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Arithmetic(str, Enum):
    """What an operation computes with in the engine that runs the file."""

    INTEGER = "integer"
    """Integers go in, integers come out."""
    HYBRID = "hybrid"
    """Integer weights meet activations that are floats in the file, rounded at run time or not at all."""
    FLOAT = "float"
    """Nothing but floats."""
    NONE = "none"
    """It computes nothing: it moves numbers, or takes them from floats to integers and back."""


@dataclass(frozen=True)
class Operation:
    """One operation of a quantized file."""

    name: str
    """As the file has it."""
    kind: str
    """As the engine calls it: ``CONV_2D``, ``QLinearConv``, ``aten.conv2d``."""
    arithmetic: Arithmetic
    layer: str = ""
    """The layer whose weight it uses; empty for one that has no weight."""


@dataclass(frozen=True)
class Contents:
    """What a file holds, as the engine that runs it sees it."""

    operations: tuple[Operation, ...]
    """Empty for files that hold weights alone."""
    bytes_by_type: Mapping[str, int]
    """Bytes of the stored numbers, by their type: ``int8``, ``int4``, ``float32``, ..."""
    file_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def computing(self) -> tuple[Operation, ...]:
        """The operations that compute."""
        return tuple(one for one in self.operations if one.arithmetic is not Arithmetic.NONE)

    @property
    def integer_operations(self) -> float:
        """The share of the operations that compute which do so in integers; NaN where there are none."""
        found = self.computing
        return sum(one.arithmetic is Arithmetic.INTEGER for one in found) / len(found) if found else float("nan")

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all stored numbers."""
        return sum(self.bytes_by_type.values())

    @property
    def integer_bytes(self) -> float:
        """The share of the stored bytes that are integers; NaN where there are none."""
        integers = sum(size for kind, size in self.bytes_by_type.items() if kind.startswith(("int", "uint")))
        return integers / self.parameter_bytes if self.parameter_bytes else float("nan")

    @property
    def leftovers(self) -> tuple[Operation, ...]:
        """The operations that still compute with floats, hybrid ones included."""
        return tuple(one for one in self.computing if one.arithmetic is not Arithmetic.INTEGER)
