"""Runs TensorFlow Lite files with LiteRT, looks at what their layers put out, and tells what is in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from qvis.adapters.quiet import quietly
from qvis.adapters.tflite.operators import MOVING
from qvis.adapters.tflite.program import Program, Step, read_program
from qvis.data.arrays import is_array
from qvis.errors import BadArgumentError, NotRunnableError
from qvis.layers import FloatArray
from qvis.quantization.contents import Arithmetic, Contents, Operation
from qvis.quantization.engines import Looked
from qvis.quantization.engines.outputs import in_parts, joined, of_samples
from qvis.running import Batch

AnyArray = np.ndarray[Any, Any]
_TABLES = ("EMBEDDING_LOOKUP", "GATHER")
"""Operators that look rows up, and compute nothing unless the table is a weight."""


# ---------------------------------------------------------------------------------------------------------------------
# What is in a file


def inspect(path: Path) -> Contents:
    """What is in a TensorFlow Lite file; nothing of it is run.

    Raises
    ------
    BadArgumentError
        The file is damaged, or no TensorFlow Lite model.
    """
    program = read_program(path)
    operations = [
        Operation(step.name, step.kind, arithmetic(step), step.layers[0].name if step.layers else "")
        for step in program.steps
    ]
    return Contents(tuple(operations), program.bytes_by_type, path.stat().st_size)


def arithmetic(step: Step) -> Arithmetic:
    """What an operator computes with, by the types of what flows through it."""
    if step.kind in MOVING or (step.kind in _TABLES and not step.layers):
        return Arithmetic.NONE
    flowing = [one for one in (*step.inputs, *step.outputs) if not one.constant]
    if step.kind in _TABLES:  # what flows in are places
        flowing = list(step.outputs)
    if any(one.floating for one in flowing):
        stored = [one.type for one in step.inputs if one.constant] + [layer.dtype for layer in step.layers]
        # a weight that is stored as integers may be dequantized by an operator of its own
        is_hybrid = step.layers and any(one.startswith(("int", "uint")) for one in stored)
        return Arithmetic.HYBRID if is_hybrid else Arithmetic.FLOAT
    # Whole numbers that stand for themselves are shapes and places, no numbers of the model.
    return Arithmetic.INTEGER if any(one.quantized for one in (*step.inputs, *step.outputs)) else Arithmetic.NONE


# ---------------------------------------------------------------------------------------------------------------------
# Running it


def open_engine(model: Path | bytes, threads: int = 1) -> LiteRT:
    """Open a TensorFlow Lite model.

    Parameters
    ----------
    model
        The path of a file, or what is in one.
    threads
        How many threads it may compute with.

    Raises
    ------
    NotRunnableError
        LiteRT is not installed, or refuses the model.
    """
    return LiteRT(model, threads)


@dataclass(frozen=True)
class _End:
    """An input or output of the model."""

    index: int
    """Of its tensor."""
    names: frozenset[str]
    shape: tuple[int, ...]
    """-1 for sizes that may be any."""
    dtype: Any
    scale: float
    """0 where its integers stand for themselves, or it holds floats."""
    zero: int

    def encode(self, array: AnyArray) -> AnyArray:
        """An array as the model takes it: real numbers rounded to its integers, with the ends clipped."""
        if self.scale and array.dtype.kind == "f":
            limits = np.iinfo(self.dtype)
            array = np.clip(np.rint(array / self.scale) + self.zero, limits.min, limits.max)
        return np.ascontiguousarray(array, dtype=self.dtype)

    def decode(self, array: AnyArray) -> AnyArray:
        """What the model returns as the real numbers that it stands for."""
        if not self.scale:
            return array
        return ((array.astype(np.float64) - self.zero) * self.scale).astype(np.float32)


class LiteRT:
    """An :class:`~qvis.quantization.engines.Engine` for TensorFlow Lite models."""

    simulated = ""

    def __init__(self, model: Path | bytes, threads: int = 1) -> None:
        self._model = model
        self._threads = threads
        self._interpreter = self._start()
        self._inputs = _ends(self._interpreter, "inputs")
        self._outputs = _ends(self._interpreter, "outputs")
        sizes = {end.shape[0] for end in self._inputs if end.shape}
        self.fixed_batch: int | None = max(sizes, default=1) if sizes and -1 not in sizes else None
        self._shapes: list[tuple[int, ...]] = []
        """What memory is allocated for."""
        kernels = " with XNNPACK" if self._is_delegated() else ""
        self.name = f"LiteRT {version('ai-edge-litert')}{kernels}"

    def run(self, batch: Batch) -> list[FloatArray]:
        """See :meth:`qvis.quantization.engines.Engine.run`."""
        parts = in_parts(self._arrays(batch), batch.size, self.fixed_batch)
        return of_samples(joined([self._run(self._interpreter, part) for part in parts], batch.size), batch.size)

    def prepare(self, batch: Batch) -> Callable[[], object]:
        """See :meth:`qvis.quantization.engines.Engine.prepare`."""
        if self.fixed_batch not in (None, batch.size):
            raise BadArgumentError(
                f"batch: the model takes {self.fixed_batch} at once, and no other number such as {batch.size}"
            )
        # What is prepared stays so, whatever the engine runs in between.
        interpreter = self._start()
        self._give(interpreter, self._arrays(batch), [])
        invoke: Callable[[], object] = interpreter.invoke
        with quietly():
            invoke()
        return invoke

    def look(self, batch: Batch) -> Mapping[str, Looked]:
        """What each layer put out, by its name in this file.

        Left out are layers inside of loops, and those that are applied more than once.
        """
        if not isinstance(self._model, Path):
            raise NotRunnableError("model: what its layers put out can only be told for a file; give its path")
        shown = _shown(read_program(self._model))
        interpreter = self._start(keep=True)
        seen: dict[str, list[AnyArray]] = {name: [] for name in shown}
        shapes: list[tuple[int, ...]] = []
        given = in_parts(self._arrays(batch), batch.size, self.fixed_batch)
        for part in given:
            shapes = self._give(interpreter, part, shapes)
            with quietly():
                interpreter.invoke()
            samples = len(next(one for one in part if one.ndim))
            for name, step in shown.items():
                values = _by_sample(_values(interpreter, step.outputs[0].index), step, samples)
                if len(values) == samples:  # else they are arranged otherwise, as for a dilated convolution
                    seen[name].append(values)
        found = {}
        for name, parts in seen.items():
            if len(parts) == len(given):
                values = np.concatenate(parts).astype(np.float32)[: batch.size]
                axis = values.ndim - (2 if _is_left(shown[name]) else 1)
                found[name] = Looked(values, axis, shown[name].activation)
        return found

    # -----------------------------------------------------------------------------------------------------------------

    def _start(self, keep: bool = False) -> Any:
        """An interpreter of its own; ``keep`` lets one look at all tensors."""
        try:
            with quietly():
                from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise NotRunnableError(
                'model: a .tflite file is run with LiteRT; install it with: pip install "qvis[quantize]"'
            ) from error
        path, content = (str(self._model), None) if isinstance(self._model, Path) else (None, self._model)
        try:
            with quietly():
                found = Interpreter(path, content, num_threads=self._threads, experimental_preserve_all_tensors=keep)
                found.allocate_tensors()
                return found
        except (OSError, RuntimeError, ValueError) as error:
            raise NotRunnableError(f"model: LiteRT refuses {path or 'it'}: {_said(error)}") from error

    def _is_delegated(self) -> bool:
        details = getattr(self._interpreter, "_get_ops_details", list)
        return any(one["op_name"] == "DELEGATE" for one in details())

    def _arrays(self, batch: Batch) -> list[AnyArray]:
        """The inputs of a batch in the order in which the model has them."""
        named: dict[str, Any] = {}
        placed: list[Any] = []
        _gather((tuple(batch.args), dict(batch.kwargs)), "", placed, named)
        found: list[Any] = []
        for end in self._inputs:
            name = next((one for one in named if one in end.names), None)
            if name is not None:
                found.append(named.pop(name))
            elif placed:
                found.append(placed.pop(0))
        if len(found) < len(self._inputs) and len(named) == len(self._inputs) - len(found) and not found:
            found = list(named.values())
            named = {}
        if len(found) != len(self._inputs) or placed or named:
            names = ", ".join(min(end.names, key=len) for end in self._inputs)
            given = f"{len(found) + len(placed)} without a name" + (f", and {', '.join(named)}" if named else "")
            raise BadArgumentError(f"batch: the model takes {names}, and was given {given}")
        return [end.encode(np.asarray(array)) for end, array in zip(self._inputs, found, strict=True)]

    def _run(self, interpreter: Any, arrays: Sequence[AnyArray]) -> list[AnyArray]:
        self._shapes = self._give(interpreter, arrays, self._shapes)
        try:
            with quietly():
                interpreter.invoke()
        except (RuntimeError, ValueError) as error:
            raise NotRunnableError(f"model: LiteRT cannot run it: {_said(error)}") from error
        return [end.decode(interpreter.get_tensor(end.index)) for end in self._outputs]

    def _give(
        self, interpreter: Any, arrays: Sequence[AnyArray], before: list[tuple[int, ...]]
    ) -> list[tuple[int, ...]]:
        """Put the inputs into their places, with memory for them; returns what it was allocated for."""
        shapes = [array.shape for array in arrays]
        try:
            with quietly():
                if shapes != before:
                    for end, shape in zip(self._inputs, shapes, strict=True):
                        interpreter.resize_tensor_input(end.index, shape, strict=True)
                    interpreter.allocate_tensors()
                for end, array in zip(self._inputs, arrays, strict=True):
                    interpreter.set_tensor(end.index, array)
        except (RuntimeError, ValueError) as error:
            taken, given = (
                ", ".join("×".join(map(str, one)) for one in each) for each in ([e.shape for e in self._inputs], shapes)
            )
            raise BadArgumentError(f"batch: the model takes {taken}, and was given {given} ({_said(error)})") from error
        return shapes


def _ends(interpreter: Any, which: str) -> list[_End]:
    """The inputs or outputs, those of a signature in the order of the graph."""
    details = interpreter.get_input_details() if which == "inputs" else interpreter.get_output_details()
    known: dict[int, str] = {}
    for key in list(interpreter.get_signature_list())[:1]:
        runner = interpreter.get_signature_runner(key)
        signed = runner.get_input_details() if which == "inputs" else runner.get_output_details()
        known = {int(one["index"]): name for name, one in signed.items()}
    ends = []
    for one in details:
        index, name, (scale, zero) = int(one["index"]), str(one["name"]), one["quantization"]
        own = name.removeprefix("serving_default_").partition(":")[0]
        signature = one["shape_signature"] if len(one["shape_signature"]) else one["shape"]
        names = frozenset({name, own, known.get(index, own)})
        ends.append(_End(index, names, tuple(map(int, signature)), one["dtype"], float(scale), int(zero)))
    return ends


def _gather(nest: Any, name: str, placed: list[Any], named: dict[str, Any]) -> None:
    """The arrays of a nest: those in dictionaries by their names, all others in order."""
    if is_array(nest):
        if name:
            named[name] = nest
        else:
            placed.append(nest)
    elif isinstance(nest, Mapping):
        for key, one in nest.items():
            _gather(one, str(key), placed, named)
    elif isinstance(nest, (list, tuple)):
        for one in nest:
            _gather(one, "", placed, named)


def _shown(program: Program) -> dict[str, Step]:
    """The operators of the model itself that apply the weight of one layer, by its name, where there is just one."""
    found: dict[str, list[Step]] = {}
    for step in program.steps:
        for layer in step.layers:
            found.setdefault(layer.name, []).append(step)
    return {
        name: steps[0]
        for name, steps in found.items()
        if len(steps) == 1 and steps[0].graph == 0 and len(steps[0].layers) == 1 and steps[0].outputs
    }


def _by_sample(values: AnyArray, step: Step, samples: int) -> AnyArray:
    """What a layer put out with the samples along the first axis; matrices have the places of all samples there."""
    if step.kind == "FULLY_CONNECTED" and values.ndim == 2 and len(values) != samples and len(values) % samples == 0:
        return values.reshape(samples, -1, values.shape[-1])
    return values


def _is_left(step: Step) -> bool:
    """Whether the weight is the left factor of a product of matrices, so that it makes rows."""
    return step.kind == "BATCH_MATMUL" and step.inputs[0].constant


def _values(interpreter: Any, index: int) -> AnyArray:
    """A tensor as real numbers."""
    details = interpreter._get_tensor_details(index, 0)
    values: AnyArray = interpreter.get_tensor(index)
    scale, zero = details["quantization"]
    return (values.astype(np.float64) - zero) * scale if scale else values


def _said(error: Exception) -> str:
    """The line that says most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
