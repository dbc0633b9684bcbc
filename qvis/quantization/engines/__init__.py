"""What runs models for real: one module for each engine, which can open a model, run it, and tell what is in a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from qvis.errors import UnsupportedModelError
from qvis.layers import FloatArray
from qvis.quantization.contents import Contents
from qvis.running import Batch


@dataclass(frozen=True)
class Looked:
    """What a layer put out while an engine ran, as floats."""

    values: FloatArray
    """(samples, ..., channels) or (samples, channels, ...), as the engine has it."""
    axis: int
    """The axis of the channels."""
    activation: str = ""
    """What the engine has fused into the layer: ``relu``, ``relu6``; empty for nothing."""


class Engine(Protocol):
    """A model opened in the engine that runs it."""

    name: str
    """The engine, its version, and what it computes with: ``LiteRT 2.3.0 with XNNPACK``."""
    simulated: str
    """Why its time says nothing about the quantized model, such as that integers are imitated with floats; empty where
    integers are computed with."""
    fixed_batch: int | None
    """The only number of samples that the model takes at once; None where any will do."""

    def run(self, batch: Batch, /) -> list[FloatArray]:
        """The outputs that are numbers, as floats, the samples along the first axis."""
        ...

    def prepare(self, batch: Batch, /) -> Callable[[], object]:
        """All that is not inference is done: inputs converted, memory allocated. What is returned runs it once."""
        ...

    # Optional; without it an engine does not let one look.
    #
    # def look(batch: Batch) -> Mapping[str, Looked]
    #     What each layer put out, by the name that ``qvis.adapters.read`` gives it in this very file.


def open_engine(model: Any, *, threads: int = 1) -> Engine:
    """Open a model in the engine that runs it.

    Parameters
    ----------
    model
        The path of a ``.tflite``, ``.onnx``, ``.pt2``, ``.keras`` or ``.h5`` file, or a model object.
    threads
        How many threads it may compute with.

    Raises
    ------
    UnsupportedModelError
        Nothing here runs it.
    NotRunnableError
        Its engine is not installed, or refuses the model.
    """
    return cast(Engine, _module(model).open_engine(model, threads))


def inspect(path: Path) -> Contents:
    """What is in a quantized file.

    Raises
    ------
    UnsupportedModelError
        It is no file of an engine here, nor ``.safetensors``.
    """
    return cast(Contents, _module(path).inspect(path))


_BY_SUFFIX: Mapping[str, str] = {
    ".tflite": "tflite",
    ".onnx": "onnx",
    ".pt2": "torch",
    ".safetensors": "torch",
    ".keras": "keras",
    ".h5": "keras",
}


def _module(model: Any) -> Any:
    name = _BY_SUFFIX.get(model.suffix.lower()) if isinstance(model, Path) else framework_of(model)
    if not name:
        what = repr(str(model)) if isinstance(model, Path) else f"an object of type {type(model).__name__}"
        raise UnsupportedModelError(
            f"model: there is nothing to run {what} with; give a .tflite, .onnx, .pt2 or .keras file, or a model of "
            "PyTorch, Keras or ONNX"
        )
    return import_module(f"{__name__}.{name}")


def framework_of(model: object) -> str:
    """``torch``, ``keras`` or ``onnx`` for a model object; empty for all else. Imports none of them."""
    from qvis.adapters import find

    adapter = find(model)
    module = getattr(adapter, "__name__", "").removeprefix("qvis.adapters.")
    return module.partition(".")[0] if module.partition(".")[0] in ("torch", "keras", "onnx") else ""
