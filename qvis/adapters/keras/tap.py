"""Sees what enters and leaves the layers of a running Keras model, and lets it run without a trace.

While a model runs, the ``call`` of each layer that applies a weight is exchanged for one that looks at its input. That
is done for layers whose ``call`` is Keras's own, so that what it does with the input is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

from qvis.adapters.keras.parts import kernel_axes
from qvis.adapters.keras.units import Source
from qvis.layers import FloatArray


class Escaped(Exception):
    """A layer runs inside a loop of TensorFlow's, out of which its numbers cannot be handed while it is traced."""


@contextmanager
def untouched(layers: Iterable[Any]) -> Iterator[None]:
    """Put back all attributes of layers afterwards: what Keras notes down in a call, and what the layers' code does."""
    layers = list(layers)
    saved = [(vars(layer), dict(vars(layer))) for layer in layers]
    lists = [(one, list(one)) for layer in layers for one in (layer._inbound_nodes, layer._outbound_nodes)]
    try:
        yield
    finally:
        for attributes, before in saved:
            for name in [name for name in attributes if name not in before]:
                del attributes[name]
            attributes.update(before)
        for held, items in lists:
            held[:] = items


# ---------------------------------------------------------------------------------------------------------------------
# Where layers are called


class Entry(NamedTuple):
    """A Keras layer to look at, and the weights that it applies."""

    layer: Any
    op: str
    names: Mapping[str, str]
    """The names of the weights' layers, by the label of the part."""
    sources: Mapping[str, Source]
    """Where they come from, by name."""

    @property
    def is_recurrent(self) -> bool:
        return self.op.startswith(("LSTM", "GRU", "SimpleRNN", "CuDNN"))


def entries(sources: Mapping[str, Sequence[Source]], layers: Iterable[Any]) -> tuple[list[Entry], list[str]]:
    """Where the calls of layers can be seen, and the names of those whose calls cannot."""
    outer = {id(cell): layer for layer in layers if (cell := getattr(layer, "cell", None)) is not None}
    held: dict[int, tuple[Any, str, dict[str, str], dict[str, Source]]] = {}
    hidden = []
    for name, places in sources.items():
        for source in places:
            layer = outer.get(id(source.unit.holder), source.unit.holder)
            if not _is_seen(layer, source):
                hidden.append(name)
                continue
            entry = held.setdefault(id(layer), (layer, source.unit.op, {}, {}))
            entry[2][source.part.label] = name
            entry[3][name] = source
    return [Entry(*entry) for entry in held.values()], list(dict.fromkeys(hidden))


def _is_seen(layer: Any, source: Source) -> bool:
    """Whether the input of a weight is that of the layer, or can be found from it."""
    if source.part.op == "other" or not type(layer).call.__module__.startswith("keras."):
        return False
    if source.unit.op.startswith("ConvLSTM") or source.variable.name == "recurrent_kernel":
        return False
    if source.unit.op.endswith("Cell") and layer is source.unit.holder:
        return False  # one of several cells, or one in a loop of the user's
    if source.unit.op == "EinsumDense":
        return bool(_einsum_axes(layer.equation, len(source.variable.shape), 0))
    return True


def _einsum_axes(equation: str, axes: int, count: int) -> list[int]:
    """The axes of an input of ``count`` axes that an EinsumDense sums over, in the order of its kernel's."""
    left, _, rest = equation.replace(" ", "").partition(",")
    kernel = rest.partition("->")[0]
    reached = kernel_axes({"equation": equation}, axes) or []
    before, _, after = left.partition("...")
    places = {letter: index for index, letter in enumerate(before)}
    places |= {letter: count - len(after) + index for index, letter in enumerate(after)}
    return [places[letter] for index, letter in enumerate(kernel) if index not in reached and letter in places]


class Entered(NamedTuple):
    """A tensor that entered a layer."""

    tensor: Any
    axes: tuple[int, ...]
    """Those that the layer sums over."""


def merge_axes(array: FloatArray, axes: Sequence[int]) -> tuple[FloatArray, int]:
    """An array and its axis that is summed over; where there are several, they are merged into one, the last."""
    if len(axes) == 1:
        return array, -1 if axes[0] == array.ndim - 1 else axes[0]
    rest = [axis for axis in range(array.ndim) if axis not in axes]
    shape = [array.shape[axis] for axis in rest]
    return array.transpose([*rest, *axes]).reshape([*shape, -1]), -1


class Seen(NamedTuple):
    """One call of a layer; tensors."""

    name: str
    inputs: Entered | None
    outputs: Any
    changed: Any


@dataclass
class Tap:
    """Stands in the calls of layers; everything that it is to do is off by default."""

    entries: Sequence[Entry]
    grids: Mapping[str, Any] = field(default_factory=dict)
    """Step, zero and largest code by layer, as a tensor of three numbers; where the step is zero there is no grid."""
    tape: Any = None
    """Is to watch what enters."""
    watching: bool = False
    others: dict[str, Callable[[], Any]] = field(default_factory=dict)
    """Make scopes in which a layer has the weight that is only tried, by its name."""
    entered: dict[str, list[Entered]] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    missed: set[str] = field(default_factory=set)
    """The layers of which a call could not be seen."""

    def attach(self) -> None:
        """Look at all calls from now on, until :func:`untouched` puts the attributes of the layers back."""
        self._graph = current_graph()
        if self.tape is not None or self.watching or self.grids:
            for entry in self.entries:
                object.__setattr__(entry.layer, "call", self._stand_in(entry))

    def _stand_in(self, entry: Entry) -> Callable[..., Any]:
        layer, call = entry.layer, entry.layer.call
        how = signature(call)

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            import tensorflow as tf

            bound = how.bind(*args, **kwargs)
            slot = next(iter(bound.arguments))
            x = bound.arguments[slot]
            if not isinstance(x, tf.Tensor):
                return call(*args, **kwargs)
            if current_graph() is not self._graph:
                if self._graph is not None:
                    raise Escaped
                self.missed.update(entry.names.values())
                return call(*args, **kwargs)
            if entry.op.startswith("Separable"):
                return self._run_separable(entry, x)
            names = list(entry.names.values())
            if "Embedding" in entry.op:
                is_lookup = not bound.arguments.get("reverse", False)
                names = [entry.names.get("embeddings" if is_lookup else "reverse_embeddings", names[0])]
                if is_lookup:
                    return self._run(layer, names[0], None, lambda: call(*args, **kwargs))
            inputs = self._enter(x, names, _axes(entry, x))
            bound.arguments[slot] = inputs.tensor
            if not entry.is_recurrent:
                return self._run(layer, names[0], inputs, lambda: call(*bound.args, **bound.kwargs))
            for name in names if self.watching else ():
                self._show(name, inputs, partial(_product, inputs.tensor, entry.sources[name]))
            return call(*bound.args, **bound.kwargs)

        return stand_in

    def _enter(self, x: Any, names: Sequence[str], axes: tuple[int, ...]) -> Entered:
        """The input of a layer as the layer is to see it."""
        import tensorflow as tf

        if self.grids:
            grids = tf.stack([self.grids[name] for name in names if name in self.grids] or [tf.zeros(3)])
            x = _rounded(x, grids[tf.argmax(grids[:, 0] > 0)])
        x = tf.identity(x)  # the derivative by a tensor of its own is of this use alone
        entered = Entered(x, axes)
        if self.tape is not None and len(names) == 1:  # gates have one derivative for all of them
            self.tape.watch(x)
            self.entered.setdefault(names[0], []).append(entered)
        return entered

    def _run(self, layer: Any, name: str, inputs: Entered | None, call: Callable[[], Any]) -> Any:
        """The result of a call; what is shown of it is what comes before the layer's activation."""
        result, before = _catch(layer, call)
        self._show(name, inputs, lambda: _catch(layer, call)[1], before)
        return result

    def _run_separable(self, entry: Entry, x: Any) -> Any:
        """The two convolutions of a separable one, of which Keras only has the result."""
        from keras import ops

        layer = entry.layer
        depthwise, pointwise = (entry.names.get(f"{kind}_kernel", "") for kind in ("depthwise", "pointwise"))
        how = {"data_format": layer.data_format}
        wide = {"strides": layer.strides, "padding": layer.padding, "dilation_rate": layer.dilation_rate, **how}
        inputs = self._enter(x, [depthwise], _axes(entry, x))
        middle = self._show(
            depthwise, inputs, lambda: ops.depthwise_conv(inputs.tensor, layer.depthwise_kernel, **wide)
        )
        inside = self._enter(middle, [pointwise], _axes(entry, x))

        def finish() -> Any:
            outputs = ops.conv(inside.tensor, layer.pointwise_kernel, **how)
            if not layer.use_bias:
                return outputs
            ones = (1,) * layer.rank
            shape = (1, -1, *ones) if layer.data_format == "channels_first" else (1, *ones, -1)
            return ops.add(outputs, ops.reshape(layer.bias, shape))

        outputs = self._show(pointwise, inside, finish)
        return outputs if layer.activation is None else layer.activation(outputs)

    def _show(self, name: str, inputs: Entered | None, run: Callable[[], Any], outputs: Any = None) -> Any:
        """Note down a call of a layer, by what it returns now and what with the weight to try."""
        if outputs is None:
            outputs = run()
        if self.watching and name:
            changed = None
            if name in self.others:
                with self.others[name]():
                    changed = run()
            self.seen.append(Seen(name, inputs, outputs, changed))
        return outputs


def _rounded(x: Any, grid: Any) -> Any:
    """``x`` on the points of a grid."""
    import tensorflow as tf

    step, zero, largest = tf.unstack(grid)

    def rounded() -> Any:
        codes = tf.clip_by_value(tf.round(tf.cast(x, grid.dtype) / step) + zero, 0.0, largest)
        return tf.cast((codes - zero) * step, x.dtype)

    found = tf.cond(step > 0, rounded, lambda: tf.identity(x))
    found.set_shape(x.shape)
    return found


def current_graph() -> Any:
    """The graph that is being traced, None where operations just run."""
    import tensorflow as tf

    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def _axes(entry: Entry, x: Any) -> tuple[int, ...]:
    if entry.op == "EinsumDense":
        return tuple(_einsum_axes(entry.layer.equation, len(entry.layer.kernel.shape), len(x.shape)))
    first = "Conv" in entry.op and entry.layer.data_format == "channels_first"
    return (1 if first else len(x.shape) - 1,)


def _product(x: Any, source: Source) -> Any:
    """``x`` times one of the matrices in a variable."""
    import tensorflow as tf

    matrix = tf.gather(tf.reshape(source.variable.held.value, [-1]), source.places())
    return tf.einsum("...i,oi->...o", x, tf.cast(matrix, x.dtype))


def _catch(layer: Any, call: Callable[[], Any]) -> tuple[Any, Any]:
    """The result of a layer, and what it had before its activation."""
    activation = vars(layer).get("activation")
    if activation is None:
        result = call()
        return result, result
    caught = []

    def catch(x: Any) -> Any:
        caught.append(x)
        return activation(x)

    object.__setattr__(layer, "activation", catch)
    try:
        result = call()
    finally:
        object.__setattr__(layer, "activation", activation)
    return result, caught[-1] if caught else result
