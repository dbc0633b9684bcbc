"""Traces the steps of a Keras runner into graphs of TensorFlow, where that works and is worth it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from qvis.adapters.keras.outputs import described, first_line
from qvis.errors import NotRunnableError, QvisError

Step = Callable[..., tuple[Any, Any]]
"""Takes tensors; returns tensors, and what it found besides."""
_MOST = 32
"""So many graphs are kept; what is asked for beyond that just runs."""


class Graphs:
    """Runs steps, by graphs where it can. A graph is made for each form of the arguments, and used again."""

    def __init__(self, traceable: bool) -> None:
        self._is_compiled = not traceable
        self._is_traceable = traceable
        self._graphs: dict[Any, tuple[Any, list[Any]]] = {}
        self._seen: set[Any] = set()

    def run(self, step: Step, values: Any, inputs: Any, scales: Any, tried: Any) -> tuple[Any, Any]:
        """The results of a step.

        Raises
        ------
        NotRunnableError
            The model's own code fails.
        """
        key = (_name(step), _form(inputs), tuple(scales), tuple(tried))
        args = (values, inputs, scales, tried)
        # What is asked for once is not worth a graph.
        is_usual = not tried or key in self._seen
        self._seen.add(key)
        failure: Exception | None = None
        if self._is_traceable and is_usual and (key in self._graphs or len(self._graphs) < _MOST):
            try:
                return self._run_graph(key, step, args)
            except QvisError:
                raise
            except Exception as error:
                failure = error
        try:
            with _uncompiled(self._is_compiled):
                result = step(*args)
        except QvisError:
            raise
        except Exception as error:
            raise NotRunnableError(
                f"model: running it fails with {type(error).__name__}: {first_line(error)}; the inputs were "
                f"{_described(inputs)}"
            ) from error
        if failure is not None:
            self._is_traceable = False
            self._graphs.clear()
        return result

    def _run_graph(self, key: Any, step: Step, args: tuple[Any, ...]) -> tuple[Any, Any]:
        import tensorflow as tf

        if key not in self._graphs:
            found: list[Any] = []

            def trace(values: Any, tensors: Any, scales: Any, tried: Any) -> Any:
                result, besides = step(values, tensors, scales, tried)
                found[:] = [besides]
                return result

            self._graphs[key] = tf.function(trace, autograph=False).get_concrete_function(*args), found
        function, found = self._graphs[key]
        return function(*args), found[0]


@contextmanager
def _uncompiled(is_compiled: bool) -> Iterator[None]:
    """Run what the model's author compiled by its Python code, so that no trace of this run stays in it."""
    import tensorflow as tf

    if not is_compiled:
        yield
        return
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


def _name(step: Step) -> str:
    if isinstance(step, partial):
        return f"{step.func.__name__} {step.keywords}"
    return step.__name__


def _form(inputs: Any) -> Any:
    """What a graph is made for: the shapes and types of tensors, and all other arguments."""
    return tuple(
        (path, tuple(one.shape), one.dtype.name) if hasattr(one, "shape") else (path, repr(one))
        for path, one in described(inputs)
    )


def _described(inputs: Any) -> str:
    args, kwargs, *_ = inputs
    found = [
        f"{path} {'x'.join(map(str, one.shape))} {one.dtype.name}"
        for path, one in [*described(args, "args"), *described(kwargs, "kwargs")]
        if hasattr(one, "shape")
    ]
    return ", ".join(found) or "none"
