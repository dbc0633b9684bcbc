"""What Keras models are trained for: labels, or without them what the float model puts out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from qvis.adapters.keras.outputs import per_sample
from qvis.errors import BadArgumentError
from qvis.quantization.backends.keras_data import AnyArray, Samples
from qvis.quantization.backends.keras_steps import Step, Steps

Made = Mapping[int, Any]
"""The result of each step, by its id."""
NO_LABELS = "or give no labels: then the float model is what is trained for"


@dataclass
class Goal:
    """What is made small."""

    outputs: list[Step]
    compare: Callable[[list[Any], Sequence[Any]], Any]
    """Scores and targets to their mean loss."""
    count: Callable[[list[Any], Sequence[Any]], tuple[Any, Any]] | None = None
    """How many answers are right, and of how many."""
    needs_teacher: bool = False
    plain: bool = False
    """Whether the outputs themselves are compared, and not what goes into a softmax or sigmoid at the end."""

    def scores(self, made: Made) -> list[Any]:
        """What is compared: the outputs, before a softmax or sigmoid at the end."""
        return [made[id(one if self.plain else _before_share(one))] for one in self.outputs]

    def loss(self, made: Made, targets: Sequence[Any]) -> Any:
        return self.compare(self.scores(made), targets)

    def right(self, made: Made, targets: Sequence[Any]) -> tuple[Any, Any]:
        """How many answers are right, and of how many; 0 of 0 where there are no classes."""
        return self.count(self.scores(made), targets) if self.count else (0, 0)


def find_goal(loss: Any, samples: Samples, model: Steps) -> Goal:
    """What to train for; puts the targets into ``samples``.

    Raises
    ------
    BadArgumentError
        The labels do not suit what the model returns, or there is no such loss.
    """
    outputs, labels = model.outputs, samples.labels
    if labels is None:
        if loss is not None:
            raise BadArgumentError(
                "loss: the training data have no labels to compare the outputs with; give labels, or leave the loss out"
            )
        return Goal(outputs, _likeness, needs_teacher=True)
    if not (isinstance(loss, str) and loss in ("cross_entropy", "mse")) and loss is not None:
        function = per_sample(loss)
        assert function is not None
        samples.targets = [labels]
        return Goal(outputs, _own(function), plain=True)
    if len(outputs) > 1:
        raise BadArgumentError(
            f"train_data: one array of labels, and a model of {len(outputs)} outputs; give as loss a function of the "
            f"labels and the list of outputs, {NO_LABELS}"
        )
    shape: tuple[Any, ...] = tuple(outputs[0].shape[1:])
    if (loss or ("cross_entropy" if labels.dtype.kind in "iub" else "mse")) == "mse":
        if labels.shape[1:] != shape and labels.size != len(labels) * prod(shape):
            raise _unfit(labels, shape, f"{_shown(shape)}, or whole numbers of an integer type if they are classes")
        samples.targets = [labels.reshape(len(labels), *shape).astype(np.float32)]
        return Goal(outputs, _squares, plain=True)
    return _of_classes(labels, shape, samples, outputs)


def _of_classes(labels: AnyArray, shape: tuple[Any, ...], samples: Samples, outputs: list[Step]) -> Goal:
    several = outputs[0].word == "sigmoid" and shape[-1:] != (1,)
    if shape and labels.shape[1:] == shape and (shape[-1] != 1 or several):
        if labels.min() < 0 or labels.max() > 1:
            raise _unfit(labels, shape, "a share from 0 to 1 for each class, or one whole number for each sample")
        samples.targets = [labels.astype(np.float32)]
        if several:
            return Goal(outputs, _cross_entropy_of_sides)
        return Goal(outputs, _cross_entropy_of_shares, _count_shares)
    if several:
        raise _unfit(labels, shape, "0 or 1 for each output, since the model ends in a sigmoid")
    if labels.size != len(labels) * prod(shape[:-1]):
        raise _unfit(labels, shape, "a whole number for each sample" if len(shape) == 1 else _shown(shape[:-1]))
    if labels.dtype.kind not in "iub":
        raise _unfit(labels, shape, "whole numbers")
    classes = shape[-1] if shape[-1] > 1 else 2
    if labels.min() < 0 or labels.max() >= classes:
        found = f"from {labels.min()} to {labels.max()}"
        raise BadArgumentError(
            f"train_data: there are labels {found}, and {classes} classes in the model's output; number them from 0, "
            f"give loss='mse' if they are no classes, {NO_LABELS}"
        )
    samples.targets = [labels.reshape(len(labels), *shape[:-1]).astype(np.int32)]
    if classes > 2 or shape[-1] > 1:
        return Goal(outputs, _cross_entropy, _count)
    samples.targets = [samples.targets[0][..., None].astype(np.float32)]
    return Goal(outputs, _cross_entropy_of_sides, _count_sides)


def _unfit(labels: AnyArray, shape: tuple[Any, ...], expected: str) -> BadArgumentError:
    return BadArgumentError(
        f"train_data: got labels of shape {labels.shape} and type {labels.dtype}, where the model returns "
        f"{_shown(shape)}; "
        f"expected {expected}; {NO_LABELS}"
    )


def _shown(shape: Sequence[Any]) -> str:
    return f"({', '.join(['samples', *map(str, shape)])})"


def _before_share(step: Step) -> Step:
    return step.inputs[0] if step.word in ("softmax", "sigmoid") else step


# ---------------------------------------------------------------------------------------------------------------------


def _likeness(scores: list[Any], targets: Sequence[Any]) -> Any:
    """Squared errors relative to the mean square, each output weighing the same."""
    import tensorflow as tf

    found = [
        tf.reduce_mean(tf.square(one - target)) / tf.maximum(tf.reduce_mean(tf.square(target)), 1e-12)
        for one, target in zip(scores, targets, strict=True)
    ]
    return tf.add_n(found) / len(found)


def _squares(scores: list[Any], targets: Sequence[Any]) -> Any:
    import tensorflow as tf

    return tf.reduce_mean(tf.square(scores[0] - targets[0]))


def _own(function: Callable[[Any, Any, int], Any]) -> Callable[[list[Any], Sequence[Any]], Any]:
    def compare(scores: list[Any], targets: Sequence[Any]) -> Any:
        import tensorflow as tf

        return tf.reduce_mean(function(targets[0], scores[0] if len(scores) == 1 else scores, tf.shape(scores[0])[0]))

    return compare


def _cross_entropy(scores: list[Any], targets: Sequence[Any]) -> Any:
    import tensorflow as tf

    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(targets[0], scores[0]))


def _cross_entropy_of_shares(scores: list[Any], targets: Sequence[Any]) -> Any:
    import tensorflow as tf

    return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(targets[0], scores[0]))


def _cross_entropy_of_sides(scores: list[Any], targets: Sequence[Any]) -> Any:
    import tensorflow as tf

    return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(targets[0], scores[0]))


def _count(scores: list[Any], targets: Sequence[Any]) -> tuple[Any, Any]:
    import tensorflow as tf

    right = tf.equal(tf.argmax(scores[0], -1, tf.int32), targets[0])
    return tf.math.count_nonzero(right), tf.size(right)


def _count_shares(scores: list[Any], targets: Sequence[Any]) -> tuple[Any, Any]:
    import tensorflow as tf

    return _count(scores, [tf.argmax(targets[0], -1, tf.int32)])


def _count_sides(scores: list[Any], targets: Sequence[Any]) -> tuple[Any, Any]:
    import tensorflow as tf

    right = tf.equal(scores[0] > 0, targets[0] > 0.5)
    return tf.math.count_nonzero(right), tf.size(right)
