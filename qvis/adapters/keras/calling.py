"""Calls functional models once more on symbolic tensors, for shapes that are not known where they were made.

What is made for pictures or sentences of any size has nodes without these sizes, but an example has them. Nodes never
know how many samples there are, so that they lose what is merged with their axis, or put before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from qvis.adapters.keras.live import ends, nodes_of, walk
from qvis.adapters.keras.steps import of_layer


def forgets_sizes(model: Any) -> bool:
    """Whether the nodes of a functional or sequential model do not tell all sizes.

    So it is where a result has one that is not known, and where there is code of a layer's own, which may move the axis
    of the samples.
    """
    return any(None in one.shape[1:] for node in nodes_of(model) for one in node.outputs) or any(
        forgets_sizes(node.operation) if ends(node.operation) is not None else _has_code(node)
        for node in nodes_of(model)
        if hasattr(node.operation, "_layers")
    )


def _has_code(node: Any) -> bool:
    """Whether it calls a layer that has to be looked into."""
    if not node.input_tensors:
        return False
    return of_layer(node.operation, node.input_tensors[0].shape, node.outputs[0].shape, {}) is None


def call_anew(model: Any, given: Sequence[Any]) -> Any:
    """The results of a functional or sequential model for symbolic tensors in the order of its inputs.

    It leaves nodes in the model's operations.
    """
    functional = getattr(model, "_functional", None) or model
    return functional._run_through_graph(list(given))


def inputs_like(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], samples: int) -> list[Any]:
    """Symbolic inputs of a functional or sequential model for so many samples, with sizes where these are given.

    Parameters
    ----------
    model
        The model.
    args, kwargs
        Symbolic tensors in the form in which the model is called; none where no sizes are known.
    samples
        How many there are.
    """
    import keras

    both = ends(model)
    assert both is not None
    own = [one for one in keras.tree.flatten(both[0]) if isinstance(one, keras.KerasTensor)]
    sized = in_order(args[0] if len(args) == 1 else list(args) or dict(kwargs), both[0])
    if [len(one.shape) for one in sized] != [len(one.shape) for one in own]:
        sized = own
    return [_with_sizes(one, other, samples) for one, other in zip(own, sized, strict=True)]


def _with_sizes(tensor: Any, other: Any, samples: int) -> Any:
    """A symbolic tensor like one, with the sizes of another where it has none."""
    import keras

    sizes = [b if a is None else a for a, b in zip(tensor.shape, other.shape, strict=True)]
    return keras.KerasTensor((samples, *sizes[1:]), tensor.dtype)


def in_order(given: Any, expected: Any) -> list[Any]:
    """The symbolic tensors that a functional model is given, in the order of its inputs."""
    import keras

    if isinstance(given, Mapping) and not isinstance(expected, Mapping):
        names = [one.name for one in keras.tree.flatten(expected)]
        given = [given[name] for name in names if name in given]
    return [one for one in keras.tree.flatten(given) if isinstance(one, keras.KerasTensor)]


def tell_shapes(model: Any) -> None:
    """Let layers that forget sizes tell them, until what was done to them is put back."""
    for _, op, layer in walk(model):
        if op == "EinsumDense" and layer.built:
            object.__setattr__(layer, "compute_output_shape", partial(_einsum_shape, layer))


def _einsum_shape(layer: Any, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
    """The shape of what an EinsumDense returns."""
    left, _, rest = layer.equation.replace(" ", "").partition(",")
    kernel, _, right = rest.partition("->")
    before, _, after = left.partition("...")
    sizes: dict[str, int | None] = dict(zip(kernel, layer.kernel.shape, strict=True))
    sizes |= dict(zip(before, input_shape, strict=False))
    sizes |= dict(zip(reversed(after), reversed(input_shape), strict=False))
    middle = input_shape[len(before) : len(input_shape) - len(after)]
    one, dots, other = right.partition("...")
    return (*_sizes(one, sizes), *(middle if dots else ()), *_sizes(other, sizes))


def _sizes(letters: Iterable[str], sizes: Mapping[str, int | None]) -> list[int | None]:
    return [sizes[letter] for letter in letters]
