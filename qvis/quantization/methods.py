"""What can be made of what: the methods of quantization, by framework and kind of file, and who carries each out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qvis.errors import BadArgumentError
from qvis.layers import FloatArray, Network
from qvis.running import Batch, Track, silently
from qvis.words import count, listed_names

METHODS = {
    "weight_only": "weights become integers, all arithmetic stays in float: a smaller file, no faster",
    "float16": "weights become 16-bit floats",
    "dynamic": "weights are integers; what enters a layer is rounded by its range at run time",
    "dynamic_range": "weights are integers; what enters a layer is rounded by its range at run time",
    "post_training": "weights and activations are integers, ranges of activations found on calibration data",
    "int16x8": "weights of 8 bits, activations of 16, ranges found on calibration data",
    "quantization_aware": "as post_training, after some epochs of training with rounding in place",
}
"""Every method, and what it does in words."""

CALIBRATED_ON = 256
"""So many samples of the training data give the ranges of activations where there are no calibration data."""
FLOAT = 32
"""The width that leaves a layer in float."""


@dataclass(frozen=True)
class Cell:
    """One thing that can be done, and what it takes."""

    framework: str
    """``keras``, ``torch`` or ``onnx``."""
    method: str
    suffix: str
    """Of the file that is written."""
    backend: str
    """The module in ``qvis.quantization.backends``."""
    packages: tuple[str, ...]
    """What must be importable."""
    needs: str = ""
    """``calibration`` or ``training``: the data that it cannot do without."""
    bits: tuple[int, ...] = (8,)
    """Widths of weights that it can hold; several only where each layer can have one of its own."""
    granularities: tuple[str, ...] = ("channel", "tensor")
    """What can share a step, the default first."""


CELLS = (
    Cell("keras", "dynamic_range", ".tflite", "tflite", ("tensorflow",)),
    Cell("keras", "float16", ".tflite", "tflite", ("tensorflow",), bits=(16,), granularities=("tensor",)),
    Cell("keras", "post_training", ".tflite", "tflite", ("tensorflow",), "calibration"),
    Cell("keras", "int16x8", ".tflite", "tflite", ("tensorflow",), "calibration", granularities=("channel",)),
    Cell(
        "keras", "quantization_aware", ".tflite", "keras_training", ("tensorflow",), "training", (8, 7, 6, 5, 4, 3, 2)
    ),
    Cell("torch", "weight_only", ".safetensors", "torchao", ("torchao",), bits=(8, 7, 6, 5, 4, 3, 2)),
    Cell("torch", "dynamic", ".safetensors", "torchao", ("torchao",), bits=(8, 7), granularities=("channel",)),
    Cell("torch", "weight_only", ".pt2", "pt2e", ("torchao",), bits=(8, 7, 6, 5, 4, 3, 2)),
    Cell("torch", "dynamic", ".pt2", "torchao", ("torchao",), bits=(8, 7), granularities=("channel",)),
    Cell("torch", "post_training", ".pt2", "pt2e", ("torchao",), "calibration", (8, 7, 6, 5, 4, 3, 2)),
    Cell("torch", "quantization_aware", ".pt2", "pt2e", ("torchao",), "training", (8, 7, 6, 5, 4, 3, 2)),
    Cell("torch", "weight_only", ".onnx", "torch_onnx", ("onnxruntime", "onnxscript"), bits=(8, 4)),
    Cell("torch", "dynamic", ".onnx", "torch_onnx", ("onnxruntime", "onnxscript")),
    Cell("torch", "post_training", ".onnx", "torch_onnx", ("onnxruntime", "onnxscript"), "calibration", (8, 4)),
    Cell(
        "torch",
        "quantization_aware",
        ".onnx",
        "torch_onnx",
        ("torchao", "onnxruntime", "onnxscript"),
        "training",
        (8, 4),
    ),
    Cell("onnx", "weight_only", ".onnx", "onnxruntime", ("onnxruntime",), bits=(8, 4)),
    Cell("onnx", "dynamic", ".onnx", "onnxruntime", ("onnxruntime",)),
    Cell("onnx", "post_training", ".onnx", "onnxruntime", ("onnxruntime",), "calibration", (8, 4)),
)
"""All that can be done."""


@dataclass(frozen=True)
class TrainingStep:
    """How far training has come."""

    epoch: int
    """From 1."""
    epochs: int
    step: int
    """Within the epoch, from 1."""
    steps: int
    loss: float
    """The mean over the epoch so far."""
    accuracy: float | None
    """The share of right answers in the epoch so far; None without labels of classes."""


@dataclass(frozen=True)
class Epoch:
    """What an epoch of training came to: measured behind it on all training data, with rounding in place."""

    number: int
    """0 is the model as it was before training, quantized post-training."""
    loss: float
    accuracy: float | None
    """The share of right answers on the training data; None without labels of classes."""


Watch = Callable[[TrainingStep], None]


def unwatched(step: TrainingStep, /) -> None:
    """A :data:`Watch` that shows nothing."""


@dataclass(frozen=True)
class Training:
    """How to train with rounding in place."""

    batches: Sequence[Batch]
    """All samples, with labels, or without: then the outputs of the float model are what is trained for."""
    epochs: int = 5
    learning_rate: float = 1e-4
    """The first one of Adam; it falls along half a cosine to zero (Loshchilov and Hutter, arXiv 1608.03983)."""
    batch_size: int = 32
    seed: int = 0
    loss: Any = None
    """``cross_entropy``, ``mse``, or a function of the framework; None: cross entropy for labels that are whole
    numbers, else the mean squared error."""
    watch: Watch = unwatched


@dataclass(frozen=True)
class Job:
    """What a backend is asked to do. Everything in it has been checked for what all methods have in common."""

    model: Any
    """The model object; a ModelProto of ONNX. It is never changed."""
    network: Network
    """What the adapter reads of it, nothing folded."""
    cell: Cell
    bits: Mapping[str, int]
    """The width of each layer's weight, by the layer's name; :data:`FLOAT` leaves it in float."""
    granularity: str = "channel"
    """``channel`` or ``tensor``."""
    calibration: Sequence[Batch] = ()
    training: Training | None = None
    example: Batch | None = None
    """Some samples to call the model with; only their shapes and types matter."""
    track: Track = silently
    notes: list[str] = field(default_factory=list)
    """What a reader must know about the result is added to it."""
    steps: Mapping[str, FloatArray] = field(default_factory=dict)
    """Steps of weights that training has found, (channels,) or (1,) by the layer's name; others follow from weights."""

    def in_float(self) -> list[str]:
        """The layers that are to stay in float."""
        return [name for name, width in self.bits.items() if width == FLOAT]


class Backend(Protocol):
    """What a module in ``qvis.quantization.backends`` offers: these two functions."""

    def check(self, job: Job, /) -> None:
        """Refuse what cannot be done for this very model, before any work: raises a QvisError that names what and why,
        and what would work instead."""
        ...

    def convert(self, job: Job, target: Path, /) -> tuple[Epoch, ...]:
        """Write the quantized model. ``target`` has the right suffix and lies in an empty folder.

        Returns what each epoch of training came to, the first with number 0: before training. Empty without training.
        """
        ...


def find_cell(framework: str, method: str, suffix: str) -> Cell:
    """The cell, or an error that says what would work.

    Raises
    ------
    BadArgumentError
        There is no such method, or the framework does not have it, or not as such a file.
    """
    if method not in METHODS:
        raise BadArgumentError(f"method: got {method!r}, expected one of {', '.join(METHODS)}")
    of_framework = [cell for cell in CELLS if cell.framework == framework]
    suffixes = list(dict.fromkeys(cell.suffix for cell in of_framework))
    if suffix not in suffixes:
        got = suffix or "a file without a suffix"
        raise BadArgumentError(
            f"output: a {NAMES[framework]} model is quantized to {' or '.join(suffixes)}, not to {got}"
        )
    found = [cell for cell in of_framework if cell.method == method]
    if not found:
        known = list(dict.fromkeys(cell.method for cell in of_framework))
        raise BadArgumentError(
            f"method: {method!r} is not for {NAMES[framework]} models, which have {listed_names(known)}"
        )
    for cell in found:
        if cell.suffix == suffix:
            return cell
    raise BadArgumentError(
        f"output: {method} of a {NAMES[framework]} model is written as {' or '.join(cell.suffix for cell in found)}, "
        f"not as {suffix}"
    )


NAMES = {"keras": "Keras", "torch": "PyTorch", "onnx": "ONNX"}
"""Frameworks as they are spelled."""


def samples_in(batches: Sequence[Batch]) -> str:
    """How many samples there are, in words."""
    return count(sum(batch.size for batch in batches), "sample")
