"""What a traced operation takes from the model itself: which layer a tensor belongs to, and its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from qvis.adapters.torch import operations
from qvis.adapters.torch.calls import Call, Held
from qvis.adapters.torch.operations import affine_of
from qvis.adapters.torch.values import Traced, flatten, shapes_of
from qvis.layers import FloatArray, Layer

if TYPE_CHECKING:
    from torch import fx


class Holdings:
    """The tensors of a model, and the layers that they are the weights of."""

    def __init__(self, traced: Traced) -> None:
        self.tensors = traced.tensors
        self.layers: dict[str, Layer] = {}
        """Each layer under all of its names."""
        for layer in traced.network.layers:
            for name in (layer.name, *layer.aliases):
                self.layers.setdefault(name, layer)

    def owner(self, held: Held) -> tuple[str, tuple[str, ...]]:
        """The module's or parameter's name for a weight, and the layers that are in it."""
        path = held.path
        module = path.removesuffix("weight").removesuffix(".") or "(root)"
        if path.rpartition(".")[2] == "weight" and module in self.layers:
            return module, (self.layers[module].name,)
        if path in self.layers:
            return path, (self.layers[path].name,)
        inside = self._stacked(path)
        return path if inside else "", tuple(dict.fromkeys(layer.name for layer in inside))

    def _stacked(self, path: str) -> list[Layer]:
        """The layers that are stored on top of one another in a tensor, in order."""
        return [layer for name, layer in self.layers.items() if path and name.rpartition(".")[0] == path]

    def packed(self, held: Held) -> list[tuple[str, int]]:
        """The layers that some rows of a tensor hold one below another, with how many rows each has.

        Empty where the tensor is the weight of one layer, and where the rows do not begin and end with layers.
        """
        found: list[tuple[str, int]] = []
        place, (start, end) = 0, held.rows or (0, self.count_rows(held))
        for layer in self._stacked(held.path) if self.owner(held)[0] == held.path else ():
            count = layer.shape[0]
            if start <= place and place + count <= end:
                found.append((layer.name, count))
            place += count
        return found if sum(count for _, count in found) == end - start else []

    def count_rows(self, held: Held) -> int:
        """How many rows a tensor, or a part of it, has."""
        if held.rows is not None:
            return held.rows[1] - held.rows[0]
        return int(self.tensors[held.path].shape[0]) if held.path in self.tensors else 0

    def rows(self, held: Held, start: int, end: int) -> Held:
        """Some rows of a tensor, or of a part of it. Where they are no whole layers, it counts as computed."""
        if (start, end) == (0, self.count_rows(held)):
            return held
        if held.computed and held.rows is None:  # not the numbers of the tensor
            return Held(held.path, computed=True)
        before = 0 if held.rows is None else held.rows[0]
        found = replace(held, rows=(before + start, before + end))
        return found if held.computed or self.packed(found) else replace(found, computed=True)

    def layer_of(self, weight: Held, call: Call) -> Layer | None:
        _, layers = self.owner(weight)
        if layers:
            return self.layers[layers[0]]
        return self.layers.get(call.module or "(root)") if weight.computed else None

    def written_out(self, word: str, call: Call, shape: Sequence[int] | None) -> tuple[str, dict[str, Any]]:
        """The name and attributes of an operation with a module's own vector, as in a normalization by hand.

        That is its ``weight`` or ``bias`` along the last axis of a result with this shape. Nothing for layers, of which
        more is known.
        """
        held = [one for one in call.args if isinstance(one, Held)]
        owner, _, found = held[0].path.rpartition(".") if len(held) == 1 else ("", "", "")
        if not owner or {"mul": "weight", "add": "bias"}.get(word) != found or held[0] != Held(held[0].path):
            return "", {}
        if not shape or tuple(self.tensors[held[0].path].shape) != (shape[-1],):
            return "", {}
        if owner in self.layers and self.layers[owner].op != "other":
            return "", {}
        return (owner, {"axis": len(shape) - 1}) if word == "mul" else ("", {"bias_of": owner})

    def is_own_bias(self, layers: Sequence[Layer], weight: Held, bias: Held) -> bool:
        """Whether what is added to the channels of some layers, one below another, is what is known of them."""
        own = [layer.bias() for layer in layers if layer.bias is not None]
        given = self.numbers(bias)
        if len(own) < len(layers):  # and nothing is known of one
            return True
        if given is None:
            return bias.path.rpartition(".")[0] == weight.path.rpartition(".")[0]
        return np.array_equal(given.ravel(), np.concatenate(own), equal_nan=True)

    def owner_of_affine(self, call: Call) -> str:
        """The module whose ``weight`` and ``bias`` are the factor and shift of a normalization; empty for others."""
        scale, shift = affine_of(call)
        owner, _, name = scale.path.rpartition(".") if isinstance(scale, Held) else ("", "", "")
        plain = all(one is None or (isinstance(one, Held) and not one.computed) for one in (scale, shift))
        return owner if plain and name == "weight" and shift in (None, Held(f"{owner}.bias")) else ""

    def layers_used(self, call: Call) -> tuple[str, ...]:
        """The layers in an operation: those of a whole module, or whose weights or biases it takes."""
        if call.operation.startswith("nn."):
            inside = f"{call.module}." if call.module else ""
            names = (name for name in self.layers if name == call.module or name.startswith(inside))
        else:
            held = [one for one in flatten((call.args, call.kwargs)) if isinstance(one, Held)]
            weights = [name for one in held for name in self.owner(one)[1]]
            owners = [one.path.removesuffix(".bias") for one in held if one.path.endswith(".bias")]
            names = (name for name in (*weights, *owners) if name in self.layers)
        return tuple(dict.fromkeys(self.layers[name].name for name in names))

    def constant(self, node: fx.Node, call: Call, operands: Sequence[Held]) -> Any:
        """What an operation on constants gives."""
        if not operands:
            return Held()
        first = operands[0]
        if len(operands) == 1 and call.operation in operations.COPIES:
            return first
        if len(operands) == 1 and call.operation in operations.TRANSPOSES and len(self.shape_of(first)) == 2:
            return replace(first, flipped=not first.flipped)
        if call.operation == "getitem" and isinstance(call.args[0], tuple) and isinstance(call.args[1], (int, slice)):
            return call.args[0][call.args[1]]
        if not first.flipped and call.args and call.args[0] is first:
            rows = self._taken(node, call, first)
            if rows is not None:
                return rows
        path = next((one.path for one in operands if one.path), "")
        return Held(path, first.flipped, computed=True)

    def _taken(self, node: fx.Node, call: Call, whole: Held) -> Any:
        """Some of the rows of a constant, or the list of its parts; None for any other operation."""
        if call.operation in operations.SPLITS:
            shapes = shapes_of(node)
            if call.operation == "unbind" or operations.split_axis(call, None) != 0 or not shapes:
                return None
            ends = list(accumulate(shape[0] for shape in shapes))
            return tuple(self.rows(whole, *pair) for pair in zip((0, *ends), ends, strict=False))
        if call.operation == "narrow" and call.get(1, "dim") == 0:
            start, length = call.get(2, "start"), call.get(3, "length")
            key = slice(start, start + length) if type(start) is type(length) is int and start >= 0 else None
        elif call.operation == "slice" and call.get(1, "dim", default=0) == 0:
            key = slice(*(call.get(2 + i, name) for i, name in enumerate(("start", "end", "step"))))
        else:
            key = call.args[1] if call.operation == "getitem" and isinstance(call.args[1], slice) else None
        if key is None or not all(one is None or type(one) is int for one in (key.start, key.stop, key.step)):
            return None
        start, end, step = key.indices(self.count_rows(whole))
        return self.rows(whole, start, max(start, end)) if step == 1 else None

    def shape_of(self, held: Held) -> tuple[int, ...]:
        tensor = self.tensors.get(held.path)
        if tensor is None or (held.computed and self.owner(held)[1] == ()):
            return (0, 0)
        shape = tuple(tensor.shape)
        return shape if held.rows is None else (self.count_rows(held), *shape[1:])

    def numbers(self, held: Any) -> FloatArray | None:
        """The numbers of a vector that the model holds; float64 as it is, all others as float32."""
        if not isinstance(held, Held) or held.path not in self.tensors or (held.computed and held.rows is None):
            return None
        import torch

        tensor = self.tensors[held.path].detach()
        tensor = tensor if held.rows is None else tensor[slice(*held.rows)]
        if tensor.is_meta or type(tensor).__name__ == "FakeTensor":
            return None
        tensor = tensor.cpu()
        array: FloatArray = tensor.to(tensor.dtype if tensor.dtype == torch.float64 else torch.float32).numpy().copy()
        return array
