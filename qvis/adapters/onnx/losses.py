"""Losses on the outputs of a model that no framework runs: on arrays, and on PyTorch's tensors for derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qvis.errors import BadArgumentError, NotRunnableError
from qvis.layers import FloatArray
from qvis.running import Batch

NAMED = ("cross_entropy", "mse")


class Loss:
    """A number for each sample, from the outputs as a list and the labels.

    A function is given arrays of NumPy; where it fails on those with a ``TypeError`` or ``AttributeError``, tensors of
    PyTorch. For derivatives it is always given tensors.
    """

    def __init__(self, loss: Callable[..., Any] | str) -> None:
        if isinstance(loss, str) and loss not in NAMED:
            raise BadArgumentError(
                f"loss: got {loss!r}, expected one of {', '.join(map(repr, NAMED))}, or a function (outputs, labels) "
                "that returns a number for each sample"
            )
        self._loss = loss
        self._tensors = False

    def __call__(self, outputs: Sequence[FloatArray], batch: Batch) -> FloatArray:
        """The losses of a batch, (samples,)."""
        labels = _labels(batch)
        if isinstance(self._loss, str):
            return _named(self._loss, outputs[0], labels)
        if not self._tensors:
            try:
                return _checked(np.asarray(self._loss(list(outputs), labels)), batch)
            except (TypeError, AttributeError):
                self._tensors = True
        import torch

        found = self._loss([torch.tensor(one) for one in outputs], torch.tensor(labels))
        return _checked(found.detach().numpy() if isinstance(found, torch.Tensor) else np.asarray(found), batch)

    def differentiable(self, outputs: Sequence[Any], batch: Batch) -> Any:
        """The losses as a tensor that derivatives can be taken of."""
        import torch

        labels = torch.tensor(_labels(batch))
        if self._loss == "cross_entropy":
            return torch.nn.functional.cross_entropy(outputs[0], labels.long(), reduction="none").reshape(-1)
        if self._loss == "mse":
            return (outputs[0] - labels).square().flatten(1).mean(1)
        assert not isinstance(self._loss, str)
        try:
            found = self._loss(list(outputs), labels)
        except (TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise NotRunnableError(f"loss: it fails on tensors of PyTorch, {_WAY_OUT} ({error})") from error
        if not isinstance(found, torch.Tensor) or not found.requires_grad:
            raise NotRunnableError(f"loss: it returns no tensor of PyTorch that can be differentiated, {_WAY_OUT}")
        _checked(found.detach().numpy(), batch)
        return found.reshape(-1)


_WAY_OUT = "which derivatives need; write it with functions of torch, or leave it out"


def _labels(batch: Batch) -> Any:
    if batch.labels is None:
        raise BadArgumentError("loss: needs labels to compare the outputs with; give labels, or leave the loss out")
    labels = batch.labels
    return np.asarray(labels.detach().cpu() if hasattr(labels, "detach") else labels)


def _checked(losses: Any, batch: Batch) -> FloatArray:
    if losses.ndim == 0 and batch.size > 1:
        raise BadArgumentError(
            "loss: got one number for several samples, expected one for each; pass reduction='none' to it"
        )
    flat: FloatArray = losses.reshape(-1)
    return flat


def _named(name: str, outputs: FloatArray, labels: Any) -> FloatArray:
    if name == "mse":
        squares: FloatArray = np.square(outputs - labels)
        mean: FloatArray = squares.reshape(len(squares), -1).mean(1)
        return mean
    scores = np.moveaxis(outputs, 1, -1)  # classes last
    shifted = scores - scores.max(-1, keepdims=True)
    chosen = np.take_along_axis(shifted, labels.astype(np.int64)[..., None], -1)[..., 0]
    losses: FloatArray = np.log(np.exp(shifted).sum(-1)) - chosen
    return losses.reshape(-1)
