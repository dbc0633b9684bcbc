"""Trains Keras models with rounding in place, and hands them to TensorFlow Lite's converter.

What is trained is the model as the converter will see it: taken apart into steps (:mod:`keras_steps`), normalizations
folded (:mod:`keras_folding`), kernels and activations rounded (:mod:`keras_rounding`). All kernels and biases are
trained, also those of layers that are not trainable, since all of them are rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, cos, nan, pi
from pathlib import Path
from typing import Any

import numpy as np

from qvis.adapters.quiet import quietly
from qvis.errors import BadArgumentError, UnsupportedModelError
from qvis.quantization.backends.keras_data import Samples, gather
from qvis.quantization.backends.keras_folding import fold
from qvis.quantization.backends.keras_goals import Goal, find_goal
from qvis.quantization.backends.keras_rounding import BITS, INT4, Rounded
from qvis.quantization.backends.keras_steps import Steps, read_steps
from qvis.quantization.methods import CALIBRATED_ON, FLOAT, Epoch, Job, Training, TrainingStep
from qvis.running import Track
from qvis.words import listed_names

MEMORY = 0.99
"""How much of a range stays in a step of training."""
FROZEN = 1 / 3
"""The last part of the steps, in which ranges stay as they are."""
AT_ONCE = 256
"""Samples that are run at once where nothing is learned."""


def check(job: Job, /) -> None:
    """Refuse models without a rule for each of their operations, layers that cannot stay in float, and unfit labels."""
    assert job.training is not None
    with quietly():
        model = _open(job)
        samples = gather(job.training.batches, job.model, model, "train_data")
        if job.calibration:
            gather(job.calibration, job.model, model, "calibration_data")
        _check_loss(find_goal(job.training.loss, samples, model), samples, Rounded(model, job.bits, job.granularity))


def convert(job: Job, target: Path, /) -> tuple[Epoch, ...]:
    """Train, and write a ``.tflite`` file; see :class:`qvis.quantization.methods.Backend`."""
    training = job.training
    assert training is not None
    with quietly():
        model = _open(job)
        job.notes.extend(model.notes)
        rounded = Rounded(model, job.bits, job.granularity)
        trainer = _Trainer(rounded, training, gather(training.batches, job.model, model, "train_data"))
        calibration = gather(job.calibration, job.model, model, "calibration_data") if job.calibration else None
        trainer.calibrate(calibration, job.track)
        trainer.teach()
        trainer.trace()
    history = tuple(trainer.train())
    with quietly():
        target.write_bytes(converted(rounded))
    job.notes.extend(_told(rounded))
    return history


def _open(job: Job) -> Steps:
    import keras

    if keras.backend.backend() != "tensorflow" or not hasattr(job.model, "quantize"):
        raise UnsupportedModelError(
            "model: it is trained with Keras 3 on TensorFlow; set KERAS_BACKEND=tensorflow before Keras is imported, "
            "and load the model anew with Keras 3"
        )
    model = read_steps(job.model, job.example)
    fold(model)
    if not any(step.weight is not None for step in model.steps):
        raise UnsupportedModelError("model: it has no layer with a weight that could be trained")
    broken = [
        step.name for step in model.steps if step.weight is not None and not np.isfinite(step.weight.kernel).all()
    ]
    if broken:
        raise UnsupportedModelError(
            f"model: {listed_names(broken)} holds NaN or infinite weights; load or train the model anew"
        )
    if all(job.bits.get(step.weight.name) == FLOAT for step in model.steps if step.weight is not None):
        raise BadArgumentError("bits: all layers are to stay in float, so that nothing is left to quantize")
    Rounded(model, job.bits, job.granularity)
    return model


def _check_loss(goal: Goal, samples: Samples, rounded: Rounded) -> None:
    """Refuse a loss that fails on what the model returns."""
    import tensorflow as tf

    few = samples.some(slice(2))
    if not goal.plain:
        return
    try:
        made, _ = rounded.run([tf.constant(one) for one in few.inputs], rounding=False)
        goal.loss(made, [tf.constant(one) for one in few.targets])
    except Exception as error:
        shown = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BadArgumentError(
            f"loss: it fails on labels of type {few.targets[0].dtype} and shape {few.targets[0].shape} ({shown}); give "
            "labels that suit it, or another loss"
        ) from error


def _told(rounded: Rounded) -> list[str]:
    """What a reader must know of how the widths are stored."""
    notes = []
    held: dict[tuple[int, int], list[str]] = {}
    for key, width in rounded.widths.items():
        held.setdefault((width, rounded.stored(key)), []).append(rounded.weights[key].name)
    for (width, stored), names in held.items():
        if width < stored and width != FLOAT:
            gain = (
                "a compressed file is smaller, and nothing else" if stored == BITS else "as many bytes as 4 bits take"
            )
            levels = f"the {2**width - 1} levels of {width} bits"
            notes.append(f"{listed_names(names)}: {levels} are stored as int{stored}: {gain}")
    slow = [one.name for key, one in rounded.weights.items() if rounded.stored(key) == INT4 and one.kernel.ndim > 2]
    if slow:
        notes.append(
            f"{listed_names(slow)}: LiteRT has no fast convolution for int4, and takes several times as long as with "
            "int8; where time counts, give such layers 5 bits or more"
        )
    beside = [step.name for step in rounded.model.steps if id(step) in rounded.floats.behind | rounded.floats.before]
    if beside:
        notes.append(
            f"{listed_names(beside)}: stays in float by an ELU beside it that changes nothing, since the "
            "converter would round it otherwise"
        )
    shared = [
        one.name for key, one in rounded.weights.items() if sum(step.weight is one for step in rounded.model.steps) > 1
    ]
    if shared:
        notes.append(f"{listed_names(shared)}: used several times, and stored as often")
    whole = [one.name for key, one in rounded.weights.items() if key in rounded.scales and not one.by_channel]
    if whole and any(one.shape != (1,) for one in rounded.scales.values()):
        notes.append(f"{listed_names(whole)}: one step for the whole weight, as the converter needs it for such layers")
    return notes


def converted(rounded: Rounded) -> bytes:
    """A TensorFlow Lite model, whose inputs and outputs are floats."""
    import tensorflow as tf

    model = rounded.model
    specs = [tf.TensorSpec([None, *step.shape[1:]], tf.float32, step.name) for step in model.inputs]
    function = tf.function(rounded.fixed(), autograph=False)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function(*specs)], function)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    return bytes(converter.convert())


# ---------------------------------------------------------------------------------------------------------------------


class _Trainer:
    """Trains a rounded model on some samples."""

    def __init__(self, rounded: Rounded, training: Training, samples: Samples) -> None:
        import tensorflow as tf

        self.rounded = rounded
        self.training = training
        self.samples = samples
        self.goal: Goal = find_goal(training.loss, samples, rounded.model)
        self.measure: Callable[..., Any] = self._measure
        self.step: Callable[..., Any] = self._step
        self.moments = [[tf.Variable(tf.zeros_like(one)) for one in rounded.variables] for _ in range(2)]

    def calibrate(self, samples: Samples | None, track: Track) -> None:
        """Find the ranges of activations, without rounding."""
        samples = samples or self.samples.spread(CALIBRATED_ON)
        parts = list(samples.parts(AT_ONCE))
        ends = [self._plain(part)[1].numpy() for part in track(parts, "Calibrating")]
        low, high = np.min([one[:, 0] for one in ends], axis=0), np.max([one[:, 1] for one in ends], axis=0)
        self.rounded.set_ranges(np.stack([low, high], axis=1))

    def teach(self) -> None:
        """Without labels, have the float model say what to train for."""
        if self.goal.needs_teacher:
            parts = self.samples.parts(AT_ONCE)
            found = [[one.numpy() for one in self.goal.scores(self._plain(part)[0])] for part in parts]
            self.samples.targets = [np.concatenate(one) for one in zip(*found, strict=True)]

    def _plain(self, part: Samples) -> Any:
        """The model without rounding, step by step: TensorFlow's optimizer of graphs fuses some into what it lacks."""
        import tensorflow as tf

        return self.rounded.run([tf.constant(one) for one in part.inputs], rounding=False)

    def trace(self) -> None:
        """Make graphs of what is done in each step."""
        import tensorflow as tf

        def spec(array: Any) -> Any:
            return tf.TensorSpec([None, *array.shape[1:]], array.dtype)

        inputs = [spec(one) for one in self.samples.inputs]
        targets = [spec(one) for one in self.samples.targets]
        number, whole = tf.TensorSpec([], tf.float32), tf.TensorSpec([], tf.int32)
        if self.training.epochs:  # else it is not worth it
            self.measure = tf.function(self._measure, autograph=False).get_concrete_function(inputs, targets)
            step = tf.function(self._step, autograph=False)
            self.step = step.get_concrete_function(inputs, targets, number, number, number, whole)

    def train(self) -> Iterator[Epoch]:
        """What each epoch comes to, measured after it."""
        training, samples = self.training, self.samples
        with quietly():
            before = self._epoch(0)
        yield before
        steps = ceil(len(samples) / training.batch_size)
        total = steps * training.epochs
        generator = np.random.default_rng(training.seed)
        done = 0
        for epoch in range(1, training.epochs + 1):
            seen = _Mean()
            order = generator.permutation(len(samples))
            for step, part in enumerate(samples.some(order).parts(training.batch_size), 1):
                rate = training.learning_rate * (1 + cos(pi * done / total)) / 2
                done += 1
                memory = MEMORY if done <= total * (1 - FROZEN) else 1.0
                seed = np.int32((training.seed * 1_000_003 + done) % 2**31)
                found = self.step(part.inputs, part.targets, *map(np.float32, (rate, done, memory)), seed)
                seen.add(found, len(part))
                if not np.isfinite(seen.loss):
                    raise BadArgumentError(
                        f"learning_rate: got {training.learning_rate!r}, and the loss is {seen.loss} in step {step} of "
                        f"epoch {epoch}; give a smaller one"
                    )
                training.watch(TrainingStep(epoch, training.epochs, step, steps, seen.loss, seen.accuracy))
            yield self._epoch(epoch)

    def _epoch(self, number: int) -> Epoch:
        seen = _Mean()
        for part in self.samples.parts(AT_ONCE):
            seen.add(self.measure(part.inputs, part.targets), len(part))
        return Epoch(number, seen.loss, seen.accuracy)

    # -----------------------------------------------------------------------------------------------------------------
    # What TensorFlow traces

    def _measure(self, inputs: Sequence[Any], targets: Sequence[Any]) -> Any:
        """The mean loss, and how many answers are right, out of how many."""
        made, _ = self.rounded.run(inputs)
        return self.goal.loss(made, targets), *self.goal.right(made, targets)

    def _step(self, inputs: Any, targets: Any, rate: Any, count: Any, memory: Any, seed: Any) -> Any:
        """The same, and what Adam makes of it (Kingma and Ba, arXiv 1412.6980)."""
        import tensorflow as tf

        rounded = self.rounded
        with tf.GradientTape() as tape:
            made, ends = rounded.run(inputs, seed=seed)
            loss = self.goal.loss(made, targets)
        gradients = tape.gradient(loss, rounded.variables)
        factor = tf.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        for variable, gradient, first, second in zip(rounded.variables, gradients, *self.moments, strict=True):
            if gradient is not None:
                first.assign(0.9 * first + 0.1 * gradient)
                second.assign(0.999 * second + 0.001 * tf.square(gradient))
                variable.assign_sub(rate * factor * first / (tf.sqrt(second) + 1e-7))
        rounded.ends.assign(memory * rounded.ends + (1 - memory) * ends)
        return loss, *self.goal.right(made, targets)


@dataclass
class _Mean:
    """Of the losses of samples, and of right answers."""

    total: float = 0.0
    samples: int = 0
    hits: int = 0
    answers: int = 0

    def add(self, found: Any, samples: int) -> None:
        loss, hits, answers = (float(one) for one in found)
        self.total += loss * samples
        self.samples += samples
        self.hits += int(hits)
        self.answers += int(answers)

    @property
    def loss(self) -> float:
        return self.total / self.samples if self.samples else nan

    @property
    def accuracy(self) -> float | None:
        return self.hits / self.answers if self.answers else None
