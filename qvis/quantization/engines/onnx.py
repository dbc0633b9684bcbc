"""Runs ONNX models with ONNX Runtime on the CPU, as its users run them: all its optimizations on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qvis.adapters.encodings import Array
from qvis.adapters.onnx.inputs import arrays_of
from qvis.adapters.onnx.sessions import compute
from qvis.errors import NotRunnableError
from qvis.layers import FloatArray
from qvis.quantization.contents import Contents
from qvis.quantization.engines import Looked
from qvis.running import Batch


class OnnxEngine:
    """See :class:`qvis.quantization.engines.Engine`."""

    simulated = ""

    def __init__(self, model: Any, threads: int) -> None:
        self._model = model
        self._threads = threads
        self._session = load_session(model if isinstance(model, Path) else _proto(model).SerializeToString(), threads)
        self._inputs = {one.name: one.type for one in self._session.get_inputs()}
        self.name = f"onnxruntime {_onnxruntime().__version__}"
        self.fixed_batch = _fixed_batch([one.shape for one in self._session.get_inputs()])

    def run(self, batch: Batch) -> list[FloatArray]:
        """The outputs that are numbers, as floats; true and false are none."""
        names = [one.name for one in self._session.get_outputs()]
        found = compute(self._session, names, self._feeds(batch))
        return [_as_floats(one) for one in found if isinstance(one, np.ndarray) and one.dtype.kind in "fiu"]

    def prepare(self, batch: Batch) -> Callable[[], object]:
        """Bind the inputs, so that nothing but inference is left to do."""
        feeds = self._feeds(batch)
        compute(self._session, [self._session.get_outputs()[0].name], feeds)  # tells of inputs that do not fit
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for one in self._session.get_outputs():
            binding.bind_output(one.name)
        session = self._session
        return lambda: session.run_with_iobinding(binding)

    def look(self, batch: Batch) -> Mapping[str, Looked]:
        """What each layer put out, once a normalization and an addition of constants behind it are done.

        Integers are shown as the floats that they mean. Layers that lie within a node, such as the gates of an LSTM,
        cannot be looked at.
        """
        session, sights = self._watching
        values = compute(session, [one.value for one in sights.values()], self._feeds(batch)) if sights else []
        return {
            name: Looked(_by_sample(_as_floats(value), batch.size), sight.axis, sight.activation)
            for (name, sight), value in zip(sights.items(), values, strict=True)
        }

    @cached_property
    def _watching(self) -> tuple[Any, Mapping[str, Any]]:
        from qvis.quantization.engines.onnx_looking import showing

        model, sights = showing(self._model)
        return load_session(model.SerializeToString(), self._threads), sights

    def _feeds(self, batch: Batch) -> dict[str, Array]:
        return arrays_of(list(self._inputs), self._inputs, batch)


def open_engine(model: Any, threads: int = 1) -> OnnxEngine:
    """Open a file, a ``ModelProto`` or what ``torch.onnx.export`` returns.

    Raises
    ------
    NotRunnableError
        ONNX Runtime is not installed, or cannot load the model.
    """
    return OnnxEngine(model, threads)


def inspect(path: Path) -> Contents:
    """What is in a file; see :func:`qvis.quantization.engines.onnx_contents.contents_of`."""
    from qvis.quantization.engines.onnx_contents import contents_of

    _onnxruntime()
    return contents_of(path)


def _onnxruntime() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError as error:
        raise NotRunnableError(
            f"model: {error.name or 'onnxruntime'} is not installed; run: pip install 'qvis[onnx]'"
        ) from None
    return onnxruntime


def load_session(model: Path | bytes, threads: int, optimized: Path | None = None) -> Any:
    """Load a model; where its optimized graph is wanted, without layouts that are one processor's own."""
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    try:
        given = str(model) if isinstance(model, Path) else model
        return runtime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise NotRunnableError(f"model: onnxruntime cannot load it: {why}") from error


def _proto(model: Any) -> Any:
    return getattr(model, "model_proto", model)


def _fixed_batch(shapes: list[list[Any]]) -> int | None:
    """The number of samples where the first sizes of all inputs are given; the others may be states, or settings."""
    first = [shape[0] for shape in shapes if shape]
    return first[0] if first and all(isinstance(size, int) for size in first) else None


def _by_sample(array: FloatArray, size: int) -> FloatArray:
    """With an axis for the samples, where a product was computed for all of their tokens at once."""
    if array.ndim != 2 or len(array) == size or not size or len(array) % size:
        return array
    return array.reshape(size, -1, array.shape[1])


def _as_floats(array: Array) -> FloatArray:
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)
