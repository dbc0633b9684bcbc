"""How data flows through a Keras model: from the nodes that Keras itself notes down when a model is made.

A functional or sequential model has such nodes. Others are called once more on symbolic tensors, which computes
nothing; so are layers that are made of others. What that leaves in the model is put back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np

from qvis.adapters.keras.calling import call_anew, forgets_sizes, in_order, inputs_like, tell_shapes
from qvis.adapters.keras.live import collect, ends, nodes_of, numbers, package_of, walk
from qvis.adapters.keras.operations import of_operation
from qvis.adapters.keras.outputs import described, first_line
from qvis.adapters.keras.parts import RULES
from qvis.adapters.keras.steps import Step, of_layer
from qvis.adapters.keras.tap import untouched
from qvis.errors import NoGraphError
from qvis.layers import FloatArray, Graph, Node, Norm
from qvis.running import Batch


def graph(model: Any, example: Batch | None = None) -> Graph:
    """How data flows through a model.

    Parameters
    ----------
    model
        A model or layer of Keras 3.
    example
        A batch it can be run on. Needed for models that are neither functional nor sequential, unless they have one
        input and know its shape.

    Raises
    ------
    NoGraphError
        The model's code takes no symbolic tensors, or it is a model of Keras 2.
    """
    if not hasattr(package_of(model), "KerasTensor"):
        raise NoGraphError("no graph: models of Keras 2 (tf_keras) have none that qvis reads; build it with Keras 3")
    # A thread of its own has names of its own, so that those that Keras gives to what comes next stay as they would be.
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(_find, model, example).result()


def _find(model: Any, example: Batch | None) -> Graph:
    size = 1 if example is None else example.size
    builder = _Builder(model, size)
    layers = {id(layer): layer for _, _, layer in walk(model)}.values()
    touched = [*layers, *(node.operation for layer in layers if ends(layer) is not None for node in nodes_of(layer))]
    with untouched({id(one): one for one in touched}.values()):
        tell_shapes(model)
        both = ends(model)
        if both is not None:
            inputs, results = both
            if forgets_sizes(model):
                inputs, results = _sized(model, example, size) or both
                builder.size = size if results is both[1] else None
            builder.take_in(inputs, [_name_of(one) for one in _tensors(both[0])])
            builder.follow(_tensors(results), "")
            builder.finish(results)
            return builder.graph(f"the nodes of Keras {package_of(model).__version__}")
        # How many samples there are tells where their axis goes; but code may only take any number of them.
        failure: Exception | None = None
        for samples in (size, None):
            args, kwargs = symbolic_inputs(model, example, samples)
            builder = _Builder(model, size if samples is None else None)
            builder.take_in((*args, *kwargs.values()), [*kwargs])
            try:
                results = builder.look_into(model, "", args, kwargs)
            except Exception as error:
                failure = error
                continue
            builder.finish(results)
            return builder.graph(f"a call of Keras {package_of(model).__version__} on symbolic tensors")
        assert failure is not None
        raise NoGraphError(
            f"no graph: {model.name!r} cannot be called on symbolic tensors: {type(failure).__name__}: "
            f"{first_line(failure)}"
        ) from failure


def _sized(model: Any, example: Batch | None, samples: int) -> tuple[Any, Any] | None:
    """The inputs and results of a functional or sequential model, with sizes that its own do not have, if possible."""
    try:
        args, kwargs = ((), {}) if example is None else symbolic_inputs(model, example, None)
        given = inputs_like(model, args, kwargs, samples)
        return given, call_anew(model, given)
    except Exception:  # as where the example does not suit it: then what is known has to do
        return None


def _name_of(tensor: Any) -> str:
    """The name of an input: that of its layer."""
    history = getattr(tensor, "_keras_history", None)
    return "input" if history is None or history.operation is None else str(history.operation.name)


def _tensors(nest: Any) -> list[Any]:
    """The symbolic tensors in a nest."""
    import keras

    return [one for one in keras.tree.flatten(nest) if isinstance(one, keras.KerasTensor)]


def symbolic_inputs(model: Any, example: Batch | None, samples: int | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs of a model as symbolic tensors, by an example or by the shape that the model was built for.

    Of so many samples; None for any number of them.
    """
    import keras

    def alike(one: Any) -> Any:
        if not hasattr(one, "shape") or not hasattr(one, "dtype"):
            return one
        dtype = str(getattr(one.dtype, "name", one.dtype)).removeprefix("torch.")
        sizes: list[int | None] = [int(size) for size in one.shape]
        sizes = sizes if samples is not None or not sizes else [None, *sizes[1:]]
        return keras.KerasTensor(tuple(sizes), "float32" if dtype == "float64" else dtype)

    if example is not None:
        args: Any = keras.tree.map_structure(alike, tuple(example.args))
        kwargs = {name: keras.tree.map_structure(alike, one) for name, one in example.kwargs.items()}
        return args, {name: one for name, one in kwargs.items() if name != "training"}
    shape: Any = (model.get_build_config() or {}).get("input_shape")
    needed = [one for one in signature(model.call).parameters.values() if one.default is one.empty]
    takes_one = len([one for one in needed if one.kind is one.POSITIONAL_OR_KEYWORD]) <= 1
    if not takes_one or not shape or not all(one is None or isinstance(one, int) for one in shape):
        raise NoGraphError(
            f"no graph: {model.name!r} is neither functional nor sequential, so that its graph can only be found with "
            "an example; give samples"
        )
    return (keras.KerasTensor((samples, *shape[1:]), model.input_dtype),), {}


@dataclass
class _Builder:
    """Gathers nodes in an order in which each follows those it takes from."""

    model: Any
    size: int | None
    """Of a batch, where symbolic tensors do not know it."""
    nodes: list[Node] = field(default_factory=list)
    norms: dict[str, Norm] = field(default_factory=dict)
    made: dict[int, str] = field(default_factory=dict)
    """The node that made each symbolic tensor."""
    alive: list[Any] = field(default_factory=list)
    """Tensors and operations, kept so that no other takes their place in memory."""
    owners: dict[str, int] = field(default_factory=dict)
    """The operation that a name belongs to."""
    used: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = collect(self.model)
        self.layers: dict[int, list[str]] = {}
        for key, layer in found.layers.items():
            self.layers.setdefault(id(found.sources[key][0].variable.held), []).append(layer.name)

    # -----------------------------------------------------------------------------------------------------------------
    # The ends

    def take_in(self, given: Any, names: Sequence[str] = ()) -> None:
        """Add the inputs."""
        tensors = _tensors(given)
        names = ["input"] * (len(tensors) - len(names)) + list(names)
        for one, name in zip(tensors, names, strict=True):
            self._bind([one], self._add(self._name(name, one), Step("input"), (), shape=one.shape))

    def finish(self, results: Any) -> None:
        """Add the outputs."""
        for _, one in described(results):
            if id(one) in self.made:
                self._add(self._name("output", self), Step("output"), (self.made[id(one)],), shape=())

    def graph(self, source: str) -> Graph:
        """What was gathered."""
        return Graph(tuple(self.nodes), self.norms, source)

    # -----------------------------------------------------------------------------------------------------------------
    # What lies between

    def follow(self, results: Iterable[Any], prefix: str) -> None:
        """Add all that some tensors are made from, as far as it is not there yet."""
        todo = [(one, False) for one in reversed(list(results))]
        while todo:
            one, is_ready = todo.pop()
            if id(one) in self.made:
                continue
            operation, index, _ = getattr(one, "_keras_history", (None, 0, 0))
            if operation is None:
                raise NoGraphError("no graph: a tensor comes from nowhere")
            node = operation._inbound_nodes[index]
            if is_ready:
                self._emit(node, prefix)
            else:
                todo.append((one, True))
                todo += [(given, False) for given in reversed(node.input_tensors)]

    def look_into(self, layer: Any, prefix: str, args: Any, kwargs: Any) -> Any:
        """Add what a layer does, by calling it on tensors that are there already. Returns its results."""
        for _, op, inner in walk(layer):
            if op in RULES and not inner.built:
                raise ValueError(f"{inner.name!r} was never called")
        if getattr(layer, "_call_has_training_arg", False):
            kwargs = {**kwargs, "training": False}
        if layer is self.model and _is_plain(layer, args):
            results = layer(*args, **kwargs)
        else:
            results = layer.call(*args, **kwargs)
        self.follow(_tensors(results), prefix)
        return results

    def _emit(self, node: Any, prefix: str) -> None:
        operation = node.operation
        inputs = [self.made[id(one)] for one in node.input_tensors]
        if not hasattr(operation, "_layers"):
            self._emit_operation(node, prefix, inputs)
            return
        path = self._plain(f"{prefix}{operation.name}" if operation is not self.model else "(root)", operation)
        given = node.input_tensors[0].shape if node.input_tensors else ()
        kwargs = {**dict(enumerate(node.arguments.args)), **node.arguments.kwargs}
        kwargs |= {"reverse": kwargs.get("reverse", kwargs.get(1)), "shapes": [one.shape for one in node.input_tensors]}
        steps = of_layer(operation, given, node.outputs[0].shape, kwargs) if ends(operation) is None else None
        if steps is None and self._unfold(node, path):
            return
        self._emit_layer(node, path, inputs, steps)

    def _unfold(self, node: Any, path: str) -> bool:
        """Add what a model or layer inside is made of; False where that cannot be found."""
        layer, count, norms, made = node.operation, len(self.nodes), dict(self.norms), dict(self.made)
        inner = ends(layer)
        try:
            if inner is not None:
                args, kwargs = node.arguments.args, node.arguments.kwargs
                given = in_order(args[0] if args else next(iter(kwargs.values())), inner[0])
                if self.size is None or forgets_sizes(layer):
                    results = _tensors(call_anew(layer, given))
                else:
                    results = _tensors(inner[1])
                    for one, other in zip(_tensors(inner[0]), given, strict=True):
                        self._bind([one], self.made[id(other)])
                self.follow(results, f"{path}/")
            else:
                results = _tensors(self.look_into(layer, f"{path}/", node.arguments.args, dict(node.arguments.kwargs)))
            names = [self.made[id(one)] for one in results]
            if len(names) != len(node.outputs):
                raise ValueError("it returns another number of tensors")
        except Exception:
            del self.nodes[count:]
            self.norms, self.made = norms, made
            return False
        # The tensors inside are the same in each call of a model.
        self.made = made | {id(one): name for one, name in zip(node.outputs, names, strict=True)}
        self.alive += node.outputs
        return True

    def _emit_layer(self, node: Any, path: str, inputs: list[str], steps: list[Step] | None) -> None:
        layer = node.operation
        if steps is None or steps[0].op.startswith("keras."):
            held = [one for _, _, inner in walk(layer) for one in inner._trainable_variables]
            inside = [name for variable in held for name in self.layers.get(id(variable), ())]
            op = f"{'keras.' if type(layer).__module__.startswith('keras.') else ''}{type(layer).__name__}"
            attributes = {"layers": tuple(dict.fromkeys(inside))} if inside else {}
            steps = [Step(op, attributes, steps[0].weight if steps else ""), *(steps or [])[1:]]
        whole = node.outputs[0].shape
        if steps[0].op in ("add", "mul", "maximum"):  # of several, two by two
            for number in range(1, len(inputs) - 1):
                name = self._name(f"{path}/{number}", (layer, number))
                inputs = [self._add(name, steps[0], inputs[:2], shape=whole), *inputs[2:]]
        for step in steps:
            name = self._name(f"{path}/{step.suffix}", (layer, step.suffix)) if step.suffix else self._name(path, layer)
            weight = self._layer_of(layer, step.weight)
            inputs = [self._add(name, step, inputs, weight, whole if step.shape is None else step.shape)]
            if step.op == "batch_norm":
                self.norms[path] = _norm(layer, path)
        self._bind(node.outputs, inputs[0])

    def _emit_operation(self, node: Any, prefix: str, inputs: list[str]) -> None:
        import keras

        operation = node.operation
        arguments = keras.tree.flatten((node.arguments.args, node.arguments.kwargs))
        applied = [name for one in arguments for name in self.layers.get(id(one), ())]
        called = [*node.arguments.args, *node.arguments.kwargs.values()]
        step = of_operation(operation, [one.shape for one in node.input_tensors], called)
        layer = ""
        if applied and type(operation).__name__ == "Matmul" and _is_second(arguments):
            step, layer = Step("linear", {"channel_axis": -1, "bias": False}), applied[0]
        elif applied:
            step = Step(f"keras.{type(operation).__name__}", {"layers": tuple(applied)})
        if step.op == "split" and len(node.outputs) > 1:
            self._emit_parts(node, f"{prefix}{operation.name}", step, inputs)
            return
        name = self._name(f"{prefix}{operation.name}", operation)
        shape = node.outputs[0].shape if step.shape is None else step.shape
        self._bind(node.outputs, self._add(name, step, inputs, layer, shape))

    def _emit_parts(self, node: Any, base: str, step: Step, inputs: list[str]) -> None:
        """Add an operation of several results that lie one after the other along an axis."""
        axis, rank = step.attributes["axis"], len(node.input_tensors[0].shape)
        start: int | None = 0
        for number, part in enumerate(node.outputs):
            name = self._name(base if number == 0 else f"{base}/{number}", (node.operation, number))
            step = step._replace(attributes={"axis": axis, **({} if start is None else {"start": start})})
            self._bind([part], self._add(name, step, inputs, "", part.shape))
            size = part.shape[axis] if len(part.shape) == rank else 1
            start = None if start is None or size is None else start + size

    # -----------------------------------------------------------------------------------------------------------------

    def _layer_of(self, layer: Any, variable: str) -> str:
        """The name of the layer whose weight a variable is."""
        held = [*layer._trainable_variables, *layer._non_trainable_variables] if variable else []
        found = [self.layers[id(one)][0] for one in held if one.name == variable and id(one) in self.layers]
        return found[0] if found else ""

    def _plain(self, base: str, owner: Any) -> str:
        """The name of an operation; ``#2`` follows that of another operation which has it already."""
        self.alive.append(owner)
        key = hash(owner) if isinstance(owner, tuple) else id(owner)
        plain, number = base, 2
        while self.owners.setdefault(plain, key) != key:
            plain, number = f"{base}#{number}", number + 1
        return plain

    def _name(self, base: str, owner: Any) -> str:
        """A name for a node of an operation; ``@2`` follows on its second call."""
        plain = self._plain(base, owner)
        self.used[plain] = self.used.get(plain, 0) + 1
        return plain if self.used[plain] == 1 else f"{plain}@{self.used[plain]}"

    def _add(
        self, name: str, step: Step, inputs: Sequence[str], layer: str = "", shape: Sequence[int | None] = ()
    ) -> str:
        sizes = [self.size if index == 0 and one is None else one for index, one in enumerate(shape)]
        known = tuple(one for one in sizes if one is not None)
        known = known if len(known) == len(sizes) else ()
        self.nodes.append(Node(name, step.op, tuple(inputs), layer, known, dict(step.attributes)))
        return name

    def _bind(self, tensors: Sequence[Any], name: str) -> None:
        self.alive += tensors
        self.made.update((id(one), name) for one in tensors)


def _is_plain(layer: Any, args: Any) -> bool:
    """Whether a layer alone is asked for, which has a rule of its own."""
    shape = args[0].shape if args and hasattr(args[0], "shape") else ()
    return of_layer(layer, shape, shape, {}) is not None


def _is_second(arguments: Sequence[Any]) -> bool:
    """Whether a product is of a result and a matrix."""
    return len(arguments) == 2 and hasattr(arguments[0], "_keras_history") and len(arguments[1].shape) == 2


def _norm(layer: Any, name: str) -> Norm:
    mean, variance = (_floats(one) for one in (layer.moving_mean, layer.moving_variance))
    scale = np.ones_like(mean) if layer.gamma is None else _floats(layer.gamma)
    shift = np.zeros_like(mean) if layer.beta is None else _floats(layer.beta)
    return Norm(name, mean, variance, scale, shift, float(layer.epsilon))


def _floats(variable: Any) -> FloatArray:
    """In float32 where they are not float64."""
    found = numbers(variable, None)
    return found if found.dtype == np.float64 else found.astype(np.float32)
