"""Trains PyTorch models with rounding in place, so that their weights find numbers that can be rounded.

What is trained is the graph into which torchao's quantization by export has put rounding, with normalizations
folded and their statistics fixed, so that it computes just what the quantized model will. Weights, biases, the scales
of normalizations and all steps are trained together; see :mod:`qvis.quantization.backends.pt2e_rounding`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qvis.errors import BadArgumentError, QvisError
from qvis.layers import FloatArray
from qvis.quantization.backends.pt2e_program import Opened, as_tensor, open_model, quietly, tensors_of
from qvis.quantization.backends.pt2e_quantizer import operation, quantizer, roundings_in
from qvis.quantization.backends.pt2e_rounding import roundings
from qvis.quantization.methods import CALIBRATED_ON, Epoch, Job, Training, TrainingStep
from qvis.running import Batch

if TYPE_CHECKING:
    from torch import Tensor, nn


Goal = Callable[[Any, Any, int], "Tensor"]
"""Outputs, labels or what takes their place, and how many samples there are: their mean loss."""

GraphModule = Any
"""Of torch.fx; the arguments of its nodes could be anything."""


def train(job: Job, opened: Opened | None = None) -> tuple[GraphModule, tuple[Epoch, ...]]:
    """The prepared graph of a job's model, trained, and what each epoch came to; the first is before training.

    Labels that are whole numbers are trained for by cross entropy, others by the mean squared error. Without labels the
    outputs of the float model are: by the squared error relative to their mean square, each output weighing the same.

    Raises
    ------
    BadArgumentError
        The labels do not fit, or the loss is no number.
    """
    training = job.training
    assert training is not None
    opened = opened or open_model(job)
    if opened.batch is not None:
        training = replace(training, batch_size=opened.batch)
    goal = goal_of(training, opened)
    taught = _taught(opened.graph, training) if _labels(training) is None else None
    graph = prepared(job, opened)
    calibrated(graph, job, opened)
    with quietly():
        return graph, tuple(_epochs(graph, training, goal, taught, opened.batch is not None))


class Trained(NamedTuple):
    """What training made of a model."""

    module: nn.Module
    """A copy, on the CPU in 32-bit floats and evaluation mode. Its layers are still to be rounded."""
    epochs: tuple[Epoch, ...]
    steps: dict[str, FloatArray]
    """The steps to which the weights of layers were trained, with normalizations folded, (channels,) or (1,)."""


def trained_module(job: Job) -> Trained:
    """The model of a job as a module that :func:`train` has trained, for others than torchao to quantize."""
    from torch.export import ExportedProgram

    from qvis.adapters.torch.copying import copied

    opened = open_model(job)
    graph, epochs = train(job, opened)
    if isinstance(job.model, ExportedProgram):
        target: nn.Module = open_model(job).program.module(check_guards=False)
    else:
        target = copied(job.model)[0].float().cpu().eval()
    found = dict(graph.named_parameters(remove_duplicate=False))
    for name, parameter in target.named_parameters(remove_duplicate=False):
        if name in found:
            parameter.data.copy_(found[name].detach())
    return Trained(target, epochs, dict(_steps_of(graph, opened)))


def _steps_of(graph: GraphModule, opened: Opened) -> Iterator[tuple[str, FloatArray]]:
    """The steps of the weights in a prepared graph, by the names of their layers."""
    for weight, rounding in roundings_in(graph, opened.layers):
        step, _ = rounding.calculate_qparams()
        yield from ((name, step.numpy()) for name in weight.names)


def check_training(job: Job, opened: Opened) -> None:
    """Refuse labels and losses that do not fit what the model returns."""
    import torch

    training = job.training
    assert training is not None
    from qvis.adapters.torch.losses import find_loss

    loss = find_loss(training.loss)
    labels = _labels(training)
    if labels is None:
        if loss is not None:
            raise BadArgumentError(
                "loss: the training data have no labels to compare the outputs with; give labels, or leave the loss "
                "out: then the float model is what is trained for"
            )
        return
    with_labels = [batch.labels is not None for batch in training.batches]
    if not all(with_labels):
        raise BadArgumentError("train_data: some batches have labels and some have none; give all of them labels")
    size = opened.batch or min(2, sum(batch.size for batch in training.batches))
    if opened.batch is not None and sum(batch.size for batch in training.batches) < size:
        raise BadArgumentError(f"train_data: the model takes {size} samples at once, and there are fewer")
    batch = next(mini_batches(training.batches, size))
    with quietly(), torch.no_grad():
        args, kwargs = tensors_of(batch)
        outputs = _called(opened.graph, args, kwargs)
        goal = goal_of(training, opened)
        goal(outputs, as_tensor(batch.labels), batch.size)
        if not callable(training.loss):
            # the same scores for every sample: the loss looks at all labels without running the model on all
            for one in training.batches:
                goal(_repeated(outputs, one.size), as_tensor(one.labels), one.size)


def prepared(job: Job, opened: Opened) -> GraphModule:
    """The graph with a rounding wherever one will be; ``opened`` is used up."""
    with quietly():
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

        rules = quantizer(opened.layers, job.bits, job.granularity, job.cell.method != "weight_only")
        return prepare_pt2e(opened.graph, rules)


def calibrated(graph: GraphModule, job: Job, opened: Opened) -> None:
    """Find the grids: of weights, and of activations from the calibration data, or else from some training data."""
    import torch

    batches = list(job.calibration)
    if not batches and job.training is not None:
        size = opened.batch or job.training.batch_size
        batches = list(mini_batches(job.training.batches, size, whole=opened.batch is not None, most=CALIBRATED_ON))
    elif opened.batch is not None:
        batches = list(mini_batches(batches, opened.batch, whole=True))
    if not batches:  # weights alone
        batches = [Batch(opened.args, opened.kwargs)]
    with quietly(), torch.no_grad():
        for batch in job.track(batches, "Calibrating"):
            args, kwargs = tensors_of(batch)
            _called(graph, args, kwargs)
    for module in graph.modules():
        if isinstance(module, roundings().activation):
            module.settle()


# ---------------------------------------------------------------------------------------------------------------------
# Epochs


def _epochs(
    graph: GraphModule, training: Training, goal: Goal, taught: list[Any] | None, whole: bool
) -> Iterator[Epoch]:
    import torch

    batches, size = training.batches, training.batch_size

    def measured(number: int) -> Epoch:
        found = _Mean()
        with torch.no_grad():
            for batch, target in _steps(batches, taught, size, None, whole):
                args, kwargs = tensors_of(batch)
                result = _called(graph, args, kwargs)
                found.add(float(goal(result, target, batch.size)), batch.size, *right_answers(result, batch.labels))
        return Epoch(number, found.loss, found.accuracy)

    yield measured(0)
    if not training.epochs:
        return
    parameters = [one for one in graph.parameters() if one.is_floating_point()]
    for one in parameters:
        one.requires_grad_()
    optimizer = torch.optim.Adam(parameters, lr=training.learning_rate)
    torch.default_generator.manual_seed(training.seed)  # for dropout; the generator is put back in the end
    random = np.random.default_rng(training.seed)
    samples = sum(batch.size for batch in batches)
    steps = max(1, samples // size if whole else math.ceil(samples / size))
    try:
        for epoch in range(1, training.epochs + 1):
            seen = _Mean()
            _set_dropout(graph, True)
            order = random.permutation(samples)
            for step, (batch, target) in enumerate(_steps(batches, taught, size, order, whole), start=1):
                done = ((epoch - 1) * steps + step - 1) / (training.epochs * steps)
                for group in optimizer.param_groups:
                    group["lr"] = training.learning_rate * (1 + math.cos(math.pi * done)) / 2
                args, kwargs = tensors_of(batch)
                with torch.enable_grad():
                    result = _called(graph, args, kwargs)
                    loss = goal(result, target, batch.size)
                if not torch.isfinite(loss):
                    raise BadArgumentError(
                        f"learning_rate: got {training.learning_rate!r}, and the loss is {float(loss)} in step {step} "
                        f"of epoch {epoch}; give a smaller one, or look for such numbers in the training data"
                    )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                seen.add(float(loss), batch.size, *right_answers(result, batch.labels))
                training.watch(TrainingStep(epoch, training.epochs, step, steps, seen.loss, seen.accuracy))
            _set_dropout(graph, False)
            yield measured(epoch)
    finally:
        _set_dropout(graph, False)
        for one in parameters:
            one.grad = None
            one.requires_grad_(False)


class _Mean:
    """Of the losses of samples, and of right answers."""

    def __init__(self) -> None:
        self.total, self.samples, self.right, self.answers = 0.0, 0, 0, 0

    def add(self, loss: float, samples: int, right: int, answers: int) -> None:
        self.total += loss * samples
        self.samples += samples
        self.right += right
        self.answers += answers

    @property
    def loss(self) -> float:
        return self.total / self.samples if self.samples else math.nan

    @property
    def accuracy(self) -> float | None:
        return self.right / self.answers if self.answers else None


def _set_dropout(graph: GraphModule, on: bool) -> None:
    """A graph that was followed in evaluation mode still has its dropout, turned off."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and operation(node) in ("dropout", "feature_dropout", "alpha_dropout"):
            node.args = (*node.args[:2], on)
    graph.recompile()


def _called(graph: GraphModule, args: Any, kwargs: Any) -> Any:
    from qvis.adapters.torch.running import _describe

    try:
        return graph(*args, **kwargs)
    except QvisError:
        raise
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0][:300]
        raise BadArgumentError(
            f"data: the model failed on them with {type(error).__name__}: {text}; they were "
            f"{_describe(Batch(args, kwargs))}"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# What is trained for


def goal_of(training: Training, opened: Opened) -> Goal:
    """The mean loss of some samples."""
    from qvis.adapters.torch.losses import find_loss, losses_of

    labels = _labels(training)
    if labels is None:
        return _likeness
    loss = find_loss(training.loss)
    if loss is None:
        loss = find_loss("mse" if as_tensor(labels).is_floating_point() else "cross_entropy")
    assert loss is not None
    chosen = loss
    scores = loss is find_loss("cross_entropy") and _ends_in_softmax(opened.graph)

    def mean(outputs: Any, labels: Any, size: int) -> Tensor:
        return losses_of(chosen, _logarithms(outputs) if scores else outputs, labels, size).mean()

    return mean


def _likeness(outputs: Any, targets: Any, size: int) -> Tensor:  # noqa: ARG001
    import torch

    found = [
        (one - target).square().mean() / target.square().mean().clamp(min=1e-12)
        for one, target in zip(_real(outputs), targets, strict=True)
    ]
    return torch.stack(found).mean()


def _real(outputs: Any) -> list[Tensor]:
    from qvis.adapters.torch.outputs import outputs_of

    found = [one for _, one in outputs_of(outputs) if one.is_floating_point()]
    if not found:
        raise BadArgumentError("model: it returns no real tensor that it could be trained for")
    return found


def _ends_in_softmax(graph: GraphModule) -> bool:
    """Whether the first result is probabilities, of which cross entropy wants the logarithms."""
    last = next(node for node in reversed(graph.graph.nodes) if node.op == "output")
    first = next(iter(last.all_input_nodes), None)
    return first is not None and first.op == "call_function" and operation(first) in ("softmax", "_softmax")


def _logarithms(outputs: Any) -> Tensor:
    return _real(outputs)[0].clamp(min=1e-30).log()


def right_answers(outputs: Any, labels: Any) -> tuple[int, int]:
    """How many classes are right, and of how many answers; 0 of 0 where labels are no classes."""
    labels = as_tensor(labels)
    if labels is None or labels.is_floating_point():
        return 0, 0
    scores = _real(outputs)[0].detach()
    for axis in (1, -1):
        if scores.ndim > 1 and labels.shape == scores.select(axis, 0).shape:
            known = labels != -100
            right = (scores.argmax(axis) == labels) & known
            return int(right.sum()), int(known.sum())
    return 0, 0


def _labels(training: Training) -> Any:
    return next((batch.labels for batch in training.batches if batch.labels is not None), None)


def _taught(graph: GraphModule, training: Training) -> list[Any]:
    """What the float model puts out for each batch of the training data."""
    import torch

    found = []
    with quietly(), torch.no_grad():
        for batch in training.batches:
            args, kwargs = tensors_of(batch)
            found.append([one.clone() for one in _real(_called(graph, args, kwargs))])
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Samples, in any order


def mini_batches(
    batches: Sequence[Batch], size: int, order: Any = None, *, whole: bool = False, most: int | None = None
) -> Iterator[Batch]:
    """Batches of another size, and in another order; with ``whole``, none that is smaller."""
    places = [(number, index) for number, batch in enumerate(batches) for index in range(batch.size)][:most]
    if order is not None:
        places = [places[one] for one in order]
    for start in range(0, len(places), size):
        some = places[start : start + size]
        if len(some) == size or not whole:
            yield gathered(batches, some)


def gathered(batches: Sequence[Batch], places: Sequence[tuple[int, int]]) -> Batch:
    """Samples as one batch of tensors, by the number of their batch and their place in it."""
    import torch
    from torch.utils import _pytree as pytree

    picked: list[Any] = []
    spec: Any = None
    for number, index in places:
        batch = batches[number]
        leaves, spec = pytree.tree_flatten((tuple(batch.args), dict(batch.kwargs), batch.labels))
        picked.append([one[index : index + 1] if getattr(one, "ndim", 0) else one for one in leaves])
    joined = []
    for same in zip(*picked, strict=True):
        tensors = [as_tensor(one) for one in same]
        joined.append(torch.cat(tensors) if getattr(tensors[0], "ndim", 0) else tensors[0])
    args, kwargs, labels = pytree.tree_unflatten(joined, spec)
    return Batch(args, kwargs, labels, size=len(places))


def _steps(
    batches: Sequence[Batch], taught: list[Any] | None, size: int, order: Any, whole: bool
) -> Iterator[tuple[Batch, Any]]:
    """Batches, and what is to come out for them."""
    if taught is None:
        for batch in mini_batches(batches, size, order, whole=whole):
            yield batch, as_tensor(batch.labels)
        return
    both = [replace(batch, labels=tuple(same)) for batch, same in zip(batches, taught, strict=True)]
    for batch in mini_batches(both, size, order, whole=whole):
        yield replace(batch, labels=None), list(batch.labels)


def _repeated(outputs: Any, size: int) -> Any:
    """The outputs of the first sample for every one of ``size``."""
    import torch
    from torch.utils import _pytree as pytree

    def expand(one: Any) -> Any:
        if not isinstance(one, torch.Tensor) or not one.ndim:
            return one
        return one[:1].expand(size, *one.shape[1:])

    return pytree.tree_map(expand, outputs)
