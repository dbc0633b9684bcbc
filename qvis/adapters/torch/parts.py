"""Which tensors of a PyTorch layer are weights, and where in them its output channels are: one rule for each type."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    View = Callable[[Tensor], Tensor]


def rows(weight: Tensor) -> Tensor:
    """``weight (out, ...) -> (out, elements)``; a view where the tensor is contiguous."""
    return weight.reshape(weight.shape[0], -1)


def columns(weight: Tensor) -> Tensor:
    """``weight (in, out) -> (out, in)``."""
    return weight.transpose(0, 1)


def transposed_rows(weight: Tensor, groups: int) -> Tensor:
    """``weight (in, out/groups, ...) -> (out, in/groups * ...)`` for a transposed convolution.

    The layer splits its input channels into groups, and each group makes its own block of output channels.
    """
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return grouped.transpose(1, 2).flatten(0, 1).flatten(1)


def block(weight: Tensor, index: int, count: int) -> Tensor:
    """``weight (count * out, in) -> (out, in)``: one of the matrices that are stored on top of one another."""
    return weight.chunk(count)[index]


class Part(NamedTuple):
    """A matrix inside one of a module's tensors."""

    tensor: str
    """The name of the parameter."""
    op: str
    view: View = rows
    """Makes the (channels, elements) matrix of the tensor."""
    channels: str = "axis 0"
    """The same in words."""
    label: str = ""
    """Tells apart several matrices in one tensor."""

    def name_in(self, module: str) -> str:
        """The layer's name: the module's own for its one weight, else the module, the parameter and the part."""
        if self.tensor == "weight" and self.op != "other":
            return module or "(root)"
        return ".".join(filter(None, (module, self.tensor, self.label)))


Rule = Callable[[str, str, int], "list[Part] | None"]
"""(type of layer, name of a parameter, groups) -> its parts, none for a known bias, None for an unknown parameter."""


def _single(op: str, name: str, groups: int) -> list[Part] | None:  # noqa: ARG001
    return [Part(name, op)] if name == "weight" else None


def _transposed(op: str, name: str, groups: int) -> list[Part] | None:
    if name != "weight":
        return None
    channels = "axis 1" if groups == 1 else "groups x axis 1"
    return [Part(name, op, partial(transposed_rows, groups=groups), channels)]


def _column(op: str, name: str, groups: int) -> list[Part] | None:  # noqa: ARG001
    return [Part(name, op, columns, "axis 1")] if name == "weight" else None


def _stacked(op: str, name: str, labels: str) -> list[Part]:
    count = len(labels)
    return [
        Part(name, op, partial(block, index=index, count=count), f"axis 0, part {index + 1} of {count}", label)
        for index, label in enumerate(labels)
    ]


def _attention(op: str, name: str, groups: int) -> list[Part] | None:  # noqa: ARG001
    if name in ("bias_k", "bias_v"):  # one more token, not a matrix
        return []
    if name == "in_proj_weight":
        return _stacked(op, name, "qkv")
    return [Part(name, op)] if name in ("q_proj_weight", "k_proj_weight", "v_proj_weight") else None


def _recurrent(op: str, name: str, groups: int) -> list[Part] | None:  # noqa: ARG001
    if not name.startswith("weight_"):
        return None
    gates = {"LSTM": "ifgo", "GRU": "rzn"}.get(op.removesuffix("Cell"))
    # weight_hr is the LSTM's projection of its output: a plain matrix.
    return [Part(name, op)] if gates is None or name.startswith("weight_hr") else _stacked(op, name, gates)


RULES: dict[str, Rule] = {
    **dict.fromkeys(("Linear", "Bilinear", "Embedding", "EmbeddingBag", "Conv1d", "Conv2d", "Conv3d"), _single),
    **dict.fromkeys(("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"), _transposed),
    **dict.fromkeys(("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"), _recurrent),
    "MultiheadAttention": _attention,
    "Conv1D": _column,  # of the transformers library: a Linear with its weight the other way round
    "MatMul": _column,  # x @ weight, seen in the graph of an exported program
}


_BIASED = {"Linear", "Conv1D", "MatMul", *(f"Conv{kind}{n}d" for kind in ("", "Transpose") for n in (1, 2, 3))}
"""The layers that add their ``bias`` to their output channels."""


def whole(bias: Tensor) -> Tensor:
    """``bias -> (out,)`` of the one matrix of a module."""
    return bias.reshape(-1)


def bias_of(part: Part) -> Part | None:
    """What a module adds to the channels of one of its matrices; None where it is not known to add anything."""
    if part.op in _BIASED and part.tensor == "weight":
        return Part("bias", part.op, whole)
    if part.op == "MultiheadAttention" and (part.label or part.tensor[:1]) in set("qkv"):
        index = "qkv".index(part.label or part.tensor[0])
        return Part("in_proj_bias", part.op, partial(block, index=index, count=3))
    return None


def known_type(package: str, name: str) -> str | None:
    """The type whose rule a class follows, None for a class of one's own."""
    home = package.partition(".")[0]
    of_torch = home == "torch" and name not in ("Conv1D", "MatMul")
    of_transformers = home == "transformers" and name == "Conv1D"
    return name if name in RULES and (of_torch or of_transformers) else None
