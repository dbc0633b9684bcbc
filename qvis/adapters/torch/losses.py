"""Losses that take the place of a PyTorch model's outputs: a number for each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qvis.adapters.torch.outputs import outputs_of
from qvis.errors import BadArgumentError, QvisError

if TYPE_CHECKING:
    from torch import Tensor

Loss = Callable[[Any, Any], Any]
"""Takes the outputs and the labels."""


def find_loss(loss: Loss | str | None) -> Loss | None:
    """The loss of a name, or the function that was given."""
    if loss is None or callable(loss):
        return loss
    named: dict[str, Loss] = {"cross_entropy": _cross_entropy, "mse": _mse}
    if loss not in named:
        raise BadArgumentError(
            f"loss: got {loss!r}, expected one of {', '.join(map(repr, named))}, or a function (outputs, labels) that "
            "returns a number for each sample"
        )
    return named[loss]


def losses_of(loss: Loss, result: Any, labels: Any, size: int) -> Tensor:
    """The loss of each of ``size`` samples, (size,), or the one number that the function returns for all of them.

    Several numbers for a sample, such as one for each token, are averaged.

    Raises
    ------
    BadArgumentError
        No labels, or labels that do not fit.
    """
    import torch

    if labels is None:
        raise BadArgumentError("loss: needs labels to compare the outputs with; give labels, or leave the loss out")
    try:
        losses = loss(result, labels)
    except QvisError:
        raise
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0][:300]
        raise BadArgumentError(
            f"loss: it failed with {type(error).__name__}: {text}; the labels were {_describe(labels)}"
        ) from error
    if not isinstance(losses, torch.Tensor):
        raise BadArgumentError(f"loss: it returned an object of type {type(losses).__name__}, expected a tensor")
    if losses.ndim == 0:
        return losses
    if losses.numel() % size:
        raise BadArgumentError(
            f"loss: it returned a tensor of shape {tuple(losses.shape)} for {size} samples, expected a number for each"
        )
    return losses.reshape(size, -1).mean(1)


def _cross_entropy(outputs: Any, labels: Any) -> Tensor:
    """Of scores (samples, classes, ...), or (samples, ..., classes) as language models have them."""
    from torch.nn import functional

    scores = _first(outputs)
    if labels.is_floating_point():
        return functional.cross_entropy(scores, labels, reduction="none")
    if labels.ndim > 1 and labels.shape == scores.shape[:-1] != (scores.shape[0], *scores.shape[2:]):
        scores = scores.movedim(-1, 1)
    if labels.shape != (scores.shape[0], *scores.shape[2:]):
        raise BadArgumentError(
            f"labels: their shape is {tuple(labels.shape)}, and the model returns scores {tuple(scores.shape)}; "
            "expected the number of a class for each sample"
        )
    used = labels[labels != -100]
    classes = int(scores.shape[1])
    if used.numel() and (int(used.min()) < 0 or int(used.max()) >= classes):
        raise BadArgumentError(
            f"labels: they go from {int(used.min())} to {int(used.max())}, and the model has {classes} classes, "
            f"0 to {classes - 1}; give labels of these classes"
        )
    return functional.cross_entropy(scores, labels.long(), reduction="none")


def _mse(outputs: Any, labels: Any) -> Any:
    first = _first(outputs)
    if first.shape != labels.shape:
        raise BadArgumentError(
            f"labels: their shape is {tuple(labels.shape)}, and the model returns {tuple(first.shape)}; give equal ones"
        )
    return (first - labels).square()


def _first(outputs: Any) -> Tensor:
    """The first real tensor that a model returns."""
    found = (one for _, one in outputs_of(outputs) if one.is_floating_point())
    first = next(found, None)
    if first is None:
        raise BadArgumentError("loss: the model returns no real tensor that labels could be compared with")
    return first


def _describe(labels: Any) -> str:
    shape = "x".join(map(str, getattr(labels, "shape", ())))
    return f"{shape} {str(getattr(labels, 'dtype', type(labels).__name__)).removeprefix('torch.')}"
