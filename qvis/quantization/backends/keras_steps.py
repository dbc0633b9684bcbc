"""From a Keras model to the steps that it takes, one after the other: what training rounds between.

Nested models are opened, activations of layers are steps of their own, and a layer of two weights is two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from qvis.adapters.keras.calling import call_anew, in_order, inputs_like
from qvis.adapters.keras.graph import symbolic_inputs
from qvis.adapters.keras.live import collect, ends, nodes_of, walk
from qvis.adapters.keras.operations import of_operation
from qvis.adapters.keras.outputs import first_line
from qvis.adapters.keras.steps import activation
from qvis.adapters.keras.tap import untouched
from qvis.errors import UnsupportedModelError
from qvis.layers import FloatArray
from qvis.quantization.backends import keras_operations as to_do
from qvis.running import Batch

WAY_OUT = "method='post_training' quantizes such models"


@dataclass(eq=False)
class Weight:
    """A kernel, laid out as :mod:`keras_operations` takes it."""

    name: str
    """The layer whose weight it is, as the network has it; empty for one that no layer has."""
    kernel: FloatArray
    axis: int
    """Of the output channels."""
    by_channel: bool = True
    """Whether each channel can have a step of its own in the file."""
    enters: int | None = None
    """The axis of the input channels; None where each output channel has one input channel of its own."""


@dataclass(eq=False)
class Affine:
    """``gain * x + shift`` for each channel, in float64."""

    gain: FloatArray
    shift: FloatArray

    def equals(self, other: Affine) -> bool:
        return np.array_equal(self.gain, other.gain) and np.array_equal(self.shift, other.shift)


@dataclass(eq=False)
class Step:
    """One operation, with all that is done to its result before that is rounded."""

    name: str
    kind: str
    """A word of :data:`KINDS`."""
    inputs: list[Step]
    shape: tuple[int | None, ...]
    """Of its result."""
    run: Callable[..., Any] = to_do.nothing
    weight: Weight | None = None
    bias: FloatArray | None = None
    pads: bool = False
    """Whether a convolution puts zeros around its input."""
    affine: Affine | None = None
    """Of an ``affine``."""
    after: Callable[[Any], Any] = to_do.nothing
    limits: tuple[float, float] | None = None
    """The grid that the engine prescribes for the result."""
    word: str = ""
    """What a curve is: ``softmax``, ``sigmoid``."""


KINDS = {
    "input": "a tensor that is given to the model",
    "linear": "a kernel is applied",
    "affine": "each channel times a number, plus a number; none is left after folding",
    "clip": "ReLU or ReLU6, which belong to what comes before where nothing else uses that",
    "join": "several results are added, multiplied, put side by side; also a mean",
    "keep": "numbers of its input are handed on, so that they lie on its grid already",
    "mix": "others are made of them, which are rounded to its input's grid",
    "curve": "a function of each number, or softmax",
    "dropout": "does something in training only",
}


@dataclass
class Steps:
    """A model as a list of steps, each after those it takes from."""

    steps: list[Step]
    outputs: list[Step]
    notes: list[str] = field(default_factory=list)

    @property
    def inputs(self) -> list[Step]:
        """In the order in which the model takes them."""
        return [step for step in self.steps if step.kind == "input"]

    def users(self, step: Step) -> list[Step]:
        """The steps that take the result of one; one that takes it twice is there twice."""
        return [other for other in self.steps for given in other.inputs if given is step]

    def replace(self, step: Step, other: Step) -> None:
        """Let all that takes the result of a step take that of another, and remove it."""
        for user in self.steps:
            user.inputs = [other if given is step else given for given in user.inputs]
        self.outputs = [other if given is step else given for given in self.outputs]
        self.steps.remove(step)


def read_steps(model: Any, example: Batch | None = None) -> Steps:
    """The steps of a model.

    Parameters
    ----------
    model
        A model of Keras 3. What calling it on symbolic tensors leaves in it is put back.
    example
        Needed for models that are neither functional nor sequential, and for inputs of unknown size.

    Raises
    ------
    UnsupportedModelError
        It has layers or operations for which there is no rule; all of them are named.
    """
    # A thread of its own has names of its own, so that those that Keras gives to what comes next stay as they would be.
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(_read, model, example).result()


def _read(model: Any, example: Batch | None) -> Steps:
    layers = {id(layer): layer for _, _, layer in walk(model)}.values()
    touched = [*layers, *(node.operation for layer in layers if ends(layer) is not None for node in nodes_of(layer))]
    with untouched({id(one): one for one in touched}.values()):
        reader = _Reader(model)
        try:
            args, kwargs = ((), {}) if example is None and ends(model) else symbolic_inputs(model, example, None)
            if ends(model) is not None:
                given = inputs_like(model, args, kwargs, None)  # type: ignore[arg-type]
                reader.take_in(given, [one.name for one in _tensors(ends(model)[0])])  # type: ignore[index]
                results = call_anew(model, given)
            else:
                given = _tensors((args, kwargs))
                reader.take_in(given, [f"input_{number}" for number in range(len(given))])
                results = model.call(*args, **kwargs)
        except Exception as error:
            raise UnsupportedModelError(
                f"model: {model.name!r} cannot be called on symbolic tensors, so that what it does is not known "
                f"({type(error).__name__}: {first_line(error)}); build it as a functional model, or {WAY_OUT}"
            ) from error
        reader.follow(_tensors(results), "")
    if reader.refused:
        raise UnsupportedModelError(
            f"model: it cannot be trained with rounding in place, because of {'; '.join(reader.refused)}; {WAY_OUT}"
        )
    return Steps(reader.steps, [reader.made[id(one)] for one in _tensors(results)], reader.notes)


def _tensors(nest: Any) -> list[Any]:
    """The symbolic tensors in a nest."""
    import keras

    return [one for one in keras.tree.flatten(nest) if isinstance(one, keras.KerasTensor)]


class _Reader:
    """Gathers steps in an order in which each follows those it takes from."""

    def __init__(self, model: Any) -> None:
        self.steps: list[Step] = []
        self.made: dict[int, Step] = {}
        self.refused: list[str] = []
        self.notes: list[str] = []
        self.alive: list[Any] = []
        """Tensors, kept so that no other takes their place in memory."""
        found = collect(model)
        self.names = {
            id(source.variable.held): layer.name for key, layer in found.layers.items() for source in found.sources[key]
        }
        self.weights: dict[int, Weight] = {}

    def take_in(self, given: Sequence[Any], names: Sequence[str]) -> None:
        """Add the inputs."""
        for one, name in zip(given, names, strict=True):
            step = self.add(name, "input", [], one.shape)
            if None in one.shape[1:]:
                self.refuse(name, f"its shape {tuple(one.shape)} is not known; give an example of the size to use")
            self.bind([one], [step])

    def follow(self, results: Iterable[Any], prefix: str) -> None:
        """Add all that some tensors are made from, as far as it is not there yet."""
        todo = [(one, False) for one in reversed(list(results))]
        while todo:
            one, is_ready = todo.pop()
            if id(one) in self.made:
                continue
            operation, index, _ = one._keras_history
            node = operation._inbound_nodes[index]
            if is_ready:
                self.emit(node, prefix)
            else:
                todo.append((one, True))
                todo += [(given, False) for given in reversed(node.input_tensors)]

    def emit(self, node: Any, prefix: str) -> None:
        """Add what a call of a layer, model or operation does."""
        operation, name = node.operation, f"{prefix}{node.operation.name}"
        given = [self.made[id(one)] for one in node.input_tensors]
        if not hasattr(operation, "_layers"):
            found = self.operation(operation, node, given, name)
        elif ends(operation) is not None:
            found = self.inside(node, name, lambda: self._call_inner(node))
        else:
            from qvis.quantization.backends.keras_layers import rule_of

            rule = rule_of(operation)
            if rule is not None:
                found = [rule(self, operation, given, node.outputs[0].shape, name)]
            elif type(operation).call.__module__.startswith("keras."):
                found = [self.refuse(name, type(operation).__name__)]
            else:
                found = self.inside(node, name, lambda: operation.call(*node.arguments.args, **node.arguments.kwargs))
        self.bind(node.outputs, found * len(node.outputs) if len(found) == 1 else found)

    def inside(self, node: Any, name: str, call: Callable[[], Any]) -> list[Step]:
        """Add what a model or layer is made of."""
        try:
            results = _tensors(call())
        except Exception as error:
            kind = type(node.operation).__name__
            return [self.refuse(name, f"{kind}, whose code cannot be followed: {first_line(error)}")]
        self.follow(results, f"{name}/")
        return [self.made[id(one)] for one in results]

    def _call_inner(self, node: Any) -> Any:
        inner: Any = ends(node.operation)
        args, kwargs = node.arguments.args, node.arguments.kwargs
        return call_anew(node.operation, in_order(args[0] if args else next(iter(kwargs.values())), inner[0]))

    # -----------------------------------------------------------------------------------------------------------------

    def add(self, name: str, kind: str, inputs: Sequence[Step], shape: Sequence[int | None], **rest: Any) -> Step:
        step = Step(name, kind, list(inputs), tuple(shape), **rest)
        self.steps.append(step)
        return step

    def bind(self, tensors: Sequence[Any], steps: Sequence[Step]) -> None:
        self.alive += tensors
        self.made.update((id(one), step) for one, step in zip(tensors, steps, strict=True))

    def refuse(self, name: str, why: str) -> Step:
        """Note down what cannot be done, and go on to find all of it."""
        self.refused.append(f"{name!r} ({why})")
        return Step(name, "keep", [], ())

    def weight(self, layer: Any, attribute: str, kernel: Callable[[FloatArray], FloatArray], **rest: Any) -> Weight:
        """The kernel of a layer, the same object for the same variable."""
        held = getattr(layer, f"_{attribute}", None)  # of a Dense layer or the like, ``kernel`` is computed
        held = held if held is not None and id(held) in self.names else getattr(layer, attribute)
        if id(held) not in self.weights:
            numbers = np.asarray(getattr(layer, attribute)).astype(np.float32)
            self.weights[id(held)] = Weight(self.names.get(id(held), ""), kernel(numbers), **rest)
        return self.weights[id(held)]

    def unary(self, word: str, attributes: Any, x: Step, shape: Sequence[int | None], name: str) -> Step:
        """Add a function of each number, by the word that graphs have for it."""
        if word == "relu":
            return self.add(name, "clip", [x], shape, run=to_do.relu)
        if word == "clip" and (attributes.get("low"), attributes.get("high")) == (0, 6):
            return self.add(name, "clip", [x], shape, run=to_do.relu6)
        if word in ("sigmoid", "softmax", "tanh"):
            limits = to_do.SIGNED_SHARE if word == "tanh" else to_do.SHARE
            run = to_do.of_tensorflow(word)
            return self.add(name, "curve", [x], shape, run=run, limits=limits, word=word)
        if word == "silu":
            share = self.unary("sigmoid", {}, x, shape, f"{name}/sigmoid")
            return self.add(name, "join", [x, share], shape, run=to_do.of_tensorflow("multiply"))
        runs = {
            "gelu": to_do.gelu(bool(attributes.get("approximate"))),
            "hardswish": to_do.hard_swish,
            "leaky_relu": to_do.leaky_relu(float(attributes.get("slope", 0))),
        }
        if word in runs:
            return self.add(name, "curve", [x], shape, run=runs[word])
        return self.refuse(name, word.removeprefix("keras.").removeprefix("activation."))

    def activate(self, function: Any, x: Step, name: str) -> Step:
        """Add the activation that a layer holds."""
        step = activation(function)
        if step is None:
            return x
        if hasattr(function, "_inbound_nodes"):
            from qvis.quantization.backends.keras_layers import rule_of

            rule = rule_of(function)
            return rule(self, function, [x], x.shape, name) if rule else self.refuse(name, type(function).__name__)
        return self.unary(step.op, step.attributes, x, x.shape, f"{name}/{step.suffix}")

    def affine(self, x: Step, gain: Any, shift: Any, name: str) -> Step | None:
        """Add a factor and a shift of each channel; None where they are not one number for each."""
        channels = x.shape[-1]
        numbers = [np.asarray(one, np.float64) for one in (gain, shift)]
        flat = [one.reshape(-1) for one in numbers]
        if any(one.size not in (1, channels) or one.size != (one.shape or (1,))[-1] for one in numbers):
            return None
        affine = Affine(*(np.broadcast_to(one, (channels,)) for one in flat))  # type: ignore[arg-type]
        return self.add(name, "affine", [x], x.shape, affine=affine)

    # -----------------------------------------------------------------------------------------------------------------

    def operation(self, operation: Any, node: Any, given: list[Step], name: str) -> list[Step]:
        """Add an operation of ``keras.ops``, or the like."""
        called = [*node.arguments.args, *node.arguments.kwargs.values()]
        kind, shape = type(operation).__name__, node.outputs[0].shape
        step = of_operation(operation, [one.shape for one in node.input_tensors], called)
        if step.op in ("add", "sub", "mul", "div") and len(given) == 1 and len(called) == 2:
            found = self._with_constant(step.op, called, given[0], name)
            return [found or self.refuse(name, f"{kind} with a constant that is not one number for each channel")]
        if step.op in ("add", "sub", "mul") and len(given) == 2:
            run = to_do.of_tensorflow({"add": "add", "sub": "subtract", "mul": "multiply"}[step.op])
            return [self.add(name, "join", given, shape, run=run)]
        if step.op == "maximum" and len(given) == 2:
            return [self.add(name, "join", given, shape, run=to_do.of_tensorflow(kind.lower()))]
        if step.op == "concat" and kind == "Concatenate":
            return [self.add(name, "join", given, shape, run=to_do.concat(int(step.attributes["axis"])))]
        if step.op in ("reshape", "flatten"):
            return [self.reshape(given[0], shape, name)]
        if step.op == "avg_pool":
            return [self.add(name, "join" if kind == "Mean" else "mix", given, shape, run=_calling(node))]
        if step.op in ("transpose", "max_pool", "split") or (step.op == "pad" and step.attributes["value"] == 0):
            runs = (
                [_calling(node, at) for at in range(len(node.outputs))] if len(node.outputs) > 1 else [_calling(node)]
            )
            return [
                self.add(name, "keep", given, one.shape, run=run) for one, run in zip(node.outputs, runs, strict=True)
            ]
        if step.op == "identity":
            return given
        if step.op == "softmax" and getattr(operation, "axis", -1) not in (-1, len(shape) - 1):
            return [self.refuse(name, "softmax along another axis than the last")]
        attributes = {**step.attributes, "approximate": getattr(operation, "approximate", False)}
        return [self.unary(step.op, attributes, given[0], shape, name) if given else self.refuse(name, kind)]

    def reshape(self, x: Step, shape: Sequence[int | None], name: str) -> Step:
        if None in shape[1:] or None in x.shape[1:] or prod(shape[1:]) != prod(x.shape[1:]):  # type: ignore[arg-type]
            return self.refuse(name, "it merges the axis of the samples, or one of unknown size")
        return self.add(name, "keep", [x], shape, run=to_do.reshape(shape[1:]))  # type: ignore[arg-type]

    def _with_constant(self, op: str, called: Sequence[Any], x: Step, name: str) -> Step | None:
        first = hasattr(called[0], "_keras_history")
        constant = called[1] if first else called[0]
        if hasattr(constant, "_keras_history") or (op == "div" and not first):
            return None
        value = np.asarray(constant, np.float64)
        if op in ("mul", "div"):
            return self.affine(x, value if op == "mul" else 1 / value, 0.0, name)
        sign = -1.0 if op == "sub" and not first else 1.0
        return self.affine(x, sign, -value if op == "sub" and first else value, name)


def _calling(node: Any, at: int | None = None) -> Callable[..., Any]:
    """The operation of a node as a function of the tensors that it takes; of several results, the one at a place."""
    operation, tensors = node.operation, node.input_tensors
    args, kwargs = node.arguments.args, node.arguments.kwargs

    def apply(*values: Any) -> Any:
        import keras

        table = {id(one): value for one, value in zip(tensors, values, strict=True)}
        filled = keras.tree.map_structure(lambda one: table.get(id(one), one), (list(args), dict(kwargs)))
        result = operation.call(*filled[0], **filled[1])
        return result if at is None else result[at]

    return apply
