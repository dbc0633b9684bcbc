"""What quantizing a model gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvis.quantization.contents import Contents
from qvis.quantization.methods import Epoch
from qvis.words import count, listed_names, percent, size

if TYPE_CHECKING:
    from qvis.equalization.result import Equalization

FLOAT_BYTES = 4


@dataclass(frozen=True)
class QuantizedModel:
    """The result of :func:`qvis.quantize`: a file, and what was found in it."""

    path: Path
    name: str
    """Of the model that was quantized."""
    framework: str
    """Of that model, with its version."""
    method: str
    bits: Mapping[str, int]
    """The width that was asked for of each layer's weight; 32 means float."""
    granularity: str
    contents: Contents
    """What the file holds, found by opening it."""
    float_bytes: int
    """What the numbers of the model take as 32-bit floats."""
    samples: int = 0
    """Of the calibration data."""
    epochs: tuple[Epoch, ...] = ()
    """What training came to; the first is the model before training."""
    equalization: Equalization | None = field(default=None, repr=False)
    """What was equalized first; None where that was not asked for."""
    notes: tuple[str, ...] = ()

    @property
    def compression(self) -> float:
        """Bytes of the stored numbers relative to 32-bit floats."""
        return self.contents.parameter_bytes / self.float_bytes if self.float_bytes else float("nan")

    @property
    def verdict(self) -> str:
        """What was made, and what it is made of, in one or two sentences."""
        found = self.contents
        text = f"{size(found.parameter_bytes)} of numbers, {percent(self.compression)} of the float model"
        if isfinite(found.integer_bytes):
            text += f"; {percent(found.integer_bytes)} of the bytes are integers"
        if found.computing:
            integers = sum(one not in found.leftovers for one in found.computing)
            text += f", and {integers} of {count(len(found.computing), 'operation')} compute with integers"
        if found.leftovers:
            text += f". With floats: {listed_names([one.layer or one.name for one in found.leftovers])}"
        return f"{text}."

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain dicts, lists, strings and numbers."""
        found = self.contents
        return {
            "path": str(self.path),
            "model": {"name": self.name, "framework": self.framework, "float_bytes": self.float_bytes},
            "method": self.method,
            "granularity": self.granularity,
            "bits": dict(self.bits),
            "calibration_samples": self.samples,
            "epochs": [{"epoch": one.number, "loss": one.loss, "accuracy": one.accuracy} for one in self.epochs],
            "file_bytes": found.file_bytes,
            "parameter_bytes": found.parameter_bytes,
            "bytes_by_type": dict(found.bytes_by_type),
            "integer_bytes_share": found.integer_bytes if isfinite(found.integer_bytes) else None,
            "integer_operations_share": found.integer_operations if found.computing else None,
            "operations": [
                {"name": one.name, "kind": one.kind, "arithmetic": one.arithmetic.value, "layer": one.layer or None}
                for one in found.operations
            ],
            "equalized": None if self.equalization is None else self.equalization.verdict,
            "notes": [*self.notes, *found.notes],
            "verdict": self.verdict,
        }

    def __repr__(self) -> str:
        return f"<{self.name} quantized by {self.method}, {str(self.path)!r}: {self.verdict}>"
