"""Runs a Keras model on other weights than its own, and differentiates it, as :mod:`qvis.running` describes.

Keras itself offers scopes in which variables have other values. In such a scope a model can be run, and traced by
TensorFlow, without any of its variables being written to: neither its weights nor what it keeps from call to call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from qvis.adapters.keras.graphs import Graphs
from qvis.adapters.keras.live import collect, is_compiled, numbers, package_of, walk
from qvis.adapters.keras.outputs import End, arrange, find_end, first_line, per_sample, to_tensors
from qvis.adapters.keras.parts import RULES
from qvis.adapters.keras.tap import Tap, entries, merge_axes, untouched
from qvis.adapters.keras.units import AnyArray, Source
from qvis.errors import BadArgumentError, NotRunnableError, suggest
from qvis.layers import FloatArray, Network, Norm
from qvis.running import Batch, Gradient, Grid, Passage, Probe, Runner
from qvis.words import listed_names

_STATISTICS = ("gamma", "beta", "moving_mean", "moving_variance")


def runner(model: Any, network: Network, loss: object = None) -> Runner:
    """The model made ready to be run.

    Parameters
    ----------
    model
        A model of Keras 3 with TensorFlow as its backend.
    network
        What was read of it.
    loss
        The name of a loss that Keras knows, a ``keras.losses.Loss``, or a function ``(labels, outputs)`` that returns a
        number for each sample or one for all. It takes the place of the outputs.

    Raises
    ------
    NotRunnableError
        It is a model of Keras 2, or Keras has another backend.
    """
    keras = package_of(model)
    if not hasattr(keras, "StatelessScope"):
        raise NotRunnableError(
            f"model: {model.name!r} is a model of Keras 2 (tf_keras), which cannot be run on other weights; "
            "build it with Keras 3 and load its weights there, or save it and pass the path for what the weights tell"
        )
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise NotRunnableError(
            f"model: Keras runs on {backend} here, and its models are run with TensorFlow; "
            "set KERAS_BACKEND=tensorflow before Keras is imported and load the model anew"
        )
    return KerasRunner(model, network, loss)


class KerasRunner:
    """A :class:`~qvis.running.Runner` for models of Keras 3."""

    def __init__(self, model: Any, network: Network, loss: object) -> None:
        self._layers = list({id(layer): layer for _, _, layer in walk(model)}.values())
        self._sources = _replaceable(model, network)
        self.layers = tuple(self._sources)
        self.differentiable = True
        if not self.layers:
            raise NotRunnableError("model: none of its layers has weights that could be exchanged for others")
        left = [layer.name for layer in network.layers if layer.name not in self._sources]
        self.notes = [f"the weights of {listed_names(left)} are quantized, and cannot be exchanged"] if left else []
        self._entries, hidden = entries(self._sources, self._layers)
        self.notes += _unseen(hidden)
        self._unbuilt = [layer for _, op, layer in walk(model) if op in RULES and not layer.built]
        self._norms = {name: layer for name, _, layer in walk(model) if hasattr(layer, "moving_variance")}
        self._loss = per_sample(loss)
        self._end = End(model) if loss is not None else find_end(model)
        self.notes += self._end.notes
        weights = [places[0].variable.held for places in self._sources.values()]
        statistics = [held for layer in self._norms.values() for held in _statistics(layer).values()]
        self._weights = len({id(variable) for variable in weights})
        self._variables = list({id(variable): variable for variable in [*weights, *statistics]}.values())
        self._index = {id(variable): index for index, variable in enumerate(self._variables)}
        self._own = [_tensor(variable.value, variable) for variable in self._variables]
        self._placed = list(self._own)
        self._graphs = Graphs(traceable=not any(map(is_compiled, self._layers)))
        self._probe: Probe | None = None
        self._failure: Exception | None = None

    def place(self, weights: Mapping[str, FloatArray], norms: Mapping[str, Norm]) -> None:
        """See :meth:`qvis.running.Runner.place`."""
        placed = self._exchange(self._own, weights)
        for name, norm in norms.items():
            if name not in self._norms:
                raise BadArgumentError(f"norms: {name!r} is no normalization of the model{suggest(name, self._norms)}")
            held = _statistics(self._norms[name])
            for key, value in _express(self._norms[name], norm).items():
                placed[self._index[id(held[key])]] = _tensor(value, held[key])
        self._placed = placed

    def run(
        self,
        batch: Batch,
        *,
        weights: Mapping[str, FloatArray] | None = None,
        grids: Mapping[str, Grid] | None = None,
        watch: Callable[[Passage], None] | None = None,
        others: Mapping[str, FloatArray] | None = None,
    ) -> list[FloatArray]:
        """See :meth:`qvis.running.Runner.run`."""
        for argument, given in (("grids", grids), ("others", others)):
            for name in [name for name in given or {} if name not in self._sources]:
                raise BadArgumentError(f"{argument}: {name!r} is no layer to be run{suggest(name, self.layers)}")
        values = self._exchange(self._placed, weights or {})
        tried = {name: self._exchange(values, {name: one})[self._at(name)] for name, one in (others or {}).items()}
        # A graph of its own for each layer that is rounded would take longer to make than it saves.
        scales = {name: _scale((grids or {}).get(name)) for name in self.layers} if grids else {}
        is_watched = watch is not None
        step = partial(self._forward, is_watched=is_watched)
        (outputs, seen), names = self._graphs.run(step, values, self._inputs(batch), scales, tried)
        if watch is not None:
            for (name, axes), (inputs, made, changed) in zip(names, seen, strict=True):
                watch(_passage(name, axes, inputs, made, changed))
        return [to_array(one) for one in outputs]

    def differentiate(self, batch: Batch, probe: Probe) -> Iterator[Gradient]:
        """See :meth:`qvis.running.Runner.differentiate`."""
        self._probe, self._failure = probe, None
        try:
            (by_weight, by_input), names = self._graphs.run(self._backward, self._placed, self._inputs(batch), {}, {})
        except Exception:
            if self._failure is not None:
                raise self._failure from None
            raise
        calls: dict[str, list[tuple[FloatArray, FloatArray]]] = {}
        places: dict[str, int] = {}
        for (name, axes), pair in zip(names, by_input, strict=True):
            (x, places[name]), (gradient, _) = (merge_axes(to_array(one), axes) for one in pair)
            calls.setdefault(name, []).append((x, gradient))
        for name, found in self._sources.items():
            source = found[0]
            matrix = source.part.view(to_array(by_weight[self._at(name)]))
            yield Gradient(name, np.ascontiguousarray(matrix), tuple(calls.get(name, ())), places.get(name, -1))

    def imitate(self, example: Batch, samples: int, seed: int = 0) -> tuple[list[Batch], str]:
        """See :meth:`qvis.running.Runner.imitate`."""
        from qvis.adapters.keras.imitation import imitate

        def see(batch: Batch) -> tuple[Any, Any]:
            inputs = *to_tensors((tuple(batch.args), dict(batch.kwargs))), batch.size
            return self._graphs.run(self._look, self._own, inputs, {}, {})

        return imitate(see, example, samples, seed)

    # -----------------------------------------------------------------------------------------------------------------
    # Steps, which TensorFlow traces

    def _look(self, values: Any, inputs: Any, scales: Any, tried: Any) -> tuple[Any, Any]:  # noqa: ARG002
        """What :mod:`qvis.adapters.keras.imitation` asks of the inputs, on the model's own weights."""
        from qvis.adapters.keras.imitation import look

        args, kwargs, size = inputs

        def run(tap: Tap) -> None:
            arranged = arrange(self._end.model, Batch(args, kwargs, None, size))
            self._outputs(values, (*arranged, None, size), tap, tried)

        return look(self._layers, (args, kwargs), run)

    def _forward(self, values: Any, inputs: Any, scales: Any, tried: Any, is_watched: bool = False) -> tuple[Any, Any]:
        """The outputs and what was seen of the layers, as tensors; and what of it is none."""
        outputs, tap = self._outputs(values, inputs, Tap(self._entries, scales, None, is_watched), tried)
        seen = [(one.inputs and one.inputs.tensor, one.outputs, one.changed) for one in tap.seen]
        return (outputs, seen), [(one.name, one.inputs.axes if one.inputs else ()) for one in tap.seen]

    def _backward(self, values: Any, inputs: Any, scales: Any, tried: Any) -> tuple[Any, Any]:
        """The derivatives by weights and by what entered the layers, as tensors; and what of it is none."""
        import tensorflow as tf

        weights = values[: self._weights]
        with tf.GradientTape() as tape:
            tape.watch(weights)
            outputs, tap = self._outputs(values, inputs, Tap(self._entries, scales, tape), tried)
        real = [_widened(one) for one in outputs]
        if tf.executing_eagerly():
            asked = self._ask(*map(to_array, real))
        else:
            asked = tf.numpy_function(self._ask, real, [one.dtype for one in real])
        factors = [tf.cast(tf.ensure_shape(f, one.shape), one.dtype) for f, one in zip(asked, outputs, strict=True)]
        used = [(name, entered) for name, calls in tap.entered.items() for entered in calls]
        found = tape.gradient(outputs, [*weights, *(entered.tensor for _, entered in used)], output_gradients=factors)
        if all(one is None for one in found[: self._weights]):
            raise NotRunnableError(
                "model: none of its outputs depends on a weight by operations that can be differentiated; "
                "give a model that ends before an argmax or the like"
            )
        by_weight = [
            tf.zeros_like(one) if by is None else tf.convert_to_tensor(by)
            for one, by in zip(weights, found, strict=False)
        ]
        by_input = [(call, by) for call, by in zip(used, found[self._weights :], strict=True) if by is not None]
        pairs = [(entered.tensor, by) for (_, entered), by in by_input]
        return (by_weight, pairs), [(name, entered.axes) for (name, entered), _ in by_input]

    def _outputs(self, values: Any, inputs: Any, tap: Tap, tried: Any) -> tuple[list[Any], Tap]:
        """Run the model on the values; a tap sees its layers."""
        args, kwargs, labels, size = inputs
        for name, value in tried.items():
            changed = list(values)
            changed[self._at(name)] = value
            tap.others[name] = partial(self._scope, changed)
        with untouched(self._layers), self._scope(values):
            tap.attach()
            for layer in self._unbuilt:
                object.__setattr__(layer, "build", partial(_refuse_to_build, layer.name))
            try:
                result = self._end.model(*args, **kwargs, training=False)
            except NotRunnableError as error:
                raise NotRunnableError(first_line(error)) from None
            losses = None if self._loss is None or labels is None else self._loss(labels, result, size)
        outputs, notes = self._end.outputs(result) if losses is None else ([losses], [])
        notes += _unseen(sorted(tap.missed))
        self.notes += [note for note in notes if note not in self.notes]
        return outputs, tap

    def _scope(self, values: Sequence[Any]) -> Any:
        """In it, the variables have these values."""
        import keras

        return keras.StatelessScope(list(zip(self._variables, values, strict=True)))

    def _ask(self, *outputs: FloatArray) -> list[FloatArray]:
        """What the outputs are to be multiplied with. TensorFlow calls this, and hides what goes wrong."""
        assert self._probe is not None
        try:
            factors = self._probe(list(outputs))
            return [np.asarray(f, one.dtype).reshape(one.shape) for f, one in zip(factors, outputs, strict=True)]
        except Exception as error:
            self._failure = error
            raise

    # -----------------------------------------------------------------------------------------------------------------
    # Values

    def _at(self, name: str) -> int:
        return self._index[id(self._sources[name][0].variable.held)]

    def _exchange(self, values: Sequence[Any], weights: Mapping[str, FloatArray]) -> list[Any]:
        """The values of the variables with some layers' weights exchanged."""
        values = list(values)
        for name, matrix in weights.items():
            if name not in self._sources:
                raise BadArgumentError(f"weights: {name!r} cannot be exchanged{suggest(name, self.layers)}")
            source, at = self._sources[name][0], self._at(name)
            values[at] = _tensor(_written(values[at], source, matrix, name), self._variables[at])
        return values

    def _inputs(self, batch: Batch) -> Any:
        if self._loss is not None and batch.labels is None:
            raise BadArgumentError("loss: the samples have no labels to compare the outputs with; give pairs of both")
        labels = None if self._loss is None else to_tensors(batch.labels)
        return *arrange(self._end.model, batch), labels, batch.size


def _replaceable(model: Any, network: Network) -> dict[str, list[Source]]:
    """The layers of a network whose weights are real variables, with their places in the model."""
    found = collect(model)
    named = {layer.name: found.sources[key] for key, layer in found.layers.items()}
    known = {layer.name: named[layer.name] for layer in network.layers if layer.name in named}
    return {name: places for name, places in known.items() if places[0].variable.is_float}


def _statistics(layer: Any) -> dict[str, Any]:
    """The variables of a batch normalization."""
    held = {name: getattr(layer, name, None) for name in _STATISTICS}
    return {name: variable for name, variable in held.items() if variable is not None}


def _unseen(names: Sequence[str]) -> list[str]:
    return [f"what enters {listed_names(names)} cannot be seen: it comes up inside a layer"] if names else []


def _refuse_to_build(name: str, *_: Any, **__: Any) -> None:
    raise NotRunnableError(f"model: its layer {name!r} has no weights yet; call the model once, then pass it again")


def _express(layer: Any, norm: Norm) -> dict[str, FloatArray]:
    """What the variables of a layer must be for it to normalize as ``norm`` does.

    What it has no variable for is put into mean and variance: ``(x - m) / s * a + b = (x - (m - b s / a)) / (s / a)``.
    """
    held = _statistics(layer)
    deviation = np.sqrt(np.asarray(norm.variance, np.float64) + norm.epsilon)
    scale, shift, mean = (np.asarray(one, np.float64) for one in (norm.scale, norm.shift, norm.mean))
    found = {"gamma": scale, "beta": shift}
    if "gamma" not in held:
        if not (scale > 0).all():
            raise BadArgumentError(
                f"norms: {norm.name!r} has no scale of its own (scale=False), so that it cannot multiply by "
                f"{float(scale.min()):.4g}; only positive numbers can be put into its variance"
            )
        deviation, scale = deviation / scale, np.ones_like(scale)
    if "beta" not in held:
        mean = mean - shift * deviation / np.where(scale == 0, 1, scale)
    found |= {"moving_mean": mean, "moving_variance": deviation**2 - layer.epsilon}
    return {name: value for name, value in found.items() if name in held}


def _written(value: Any, source: Source, matrix: FloatArray, name: str) -> AnyArray:
    """The variable's numbers with a matrix put in its place."""
    places = source.places()
    if np.shape(matrix) != places.shape:
        raise BadArgumentError(f"weights: {name!r} has the shape {places.shape}, not {np.shape(matrix)}")
    array: AnyArray = np.array(to_array(value))
    flat = array.reshape(-1)
    flat[places] = matrix
    if source.variable.notes:  # its low-rank update comes on top
        flat -= (source.variable.read() - numbers(source.variable.held, None)).reshape(-1)
    return array


def _tensor(value: Any, variable: Any) -> Any:
    import tensorflow as tf

    return tf.cast(tf.convert_to_tensor(value), variable.dtype)


def _scale(grid: Grid | None) -> Any:
    """Step, zero and largest code; zeros for no grid."""
    import tensorflow as tf

    if grid is None:
        return tf.zeros(3, tf.float32)
    return tf.constant([grid.step, grid.zero, 2**grid.bits - 1], tf.float32)


def _widened(value: Any) -> Any:
    """Narrow types as float32."""
    import tensorflow as tf

    return value if value.dtype == tf.float64 else tf.cast(value, tf.float32)


def to_array(value: Any) -> FloatArray:
    """A tensor as an array of float32 or float64."""
    array: FloatArray = np.asarray(_widened(value))
    return array


def _passage(name: str, axes: tuple[int, ...], inputs: Any, outputs: Any, changed: Any) -> Passage:
    entered, axis = np.zeros(0, np.float32), -1
    if inputs is not None:
        entered, axis = merge_axes(to_array(inputs), axes)
    return Passage(name, entered, axis, to_array(outputs), None if changed is None else to_array(changed))
