"""What it takes to run a model: batches of inputs, and what an adapter offers that can run and differentiate.

A :class:`Runner` is the only thing that the noise model, the measurement and the verification of new weights know of
a framework. All numbers that pass through it are NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from qvis.layers import FloatArray, Norm


@dataclass(frozen=True)
class Batch:
    """Some samples to run a model on, as arrays of NumPy or tensors of the model's own framework."""

    args: tuple[Any, ...]
    """Positional inputs; each an array with the samples along its first axis, or a nest of such."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Inputs by name."""
    labels: Any = None
    """What a loss compares the outputs with, the samples along the first axis; None without labels."""
    size: int = 1
    """How many samples it has."""


@dataclass(frozen=True)
class Grid:
    """The integer grid of an activation: ``step * (q - zero)`` for q from 0 to 2^bits - 1."""

    bits: int
    step: float
    zero: int

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest number that it holds."""
        return -self.zero * self.step, (2**self.bits - 1 - self.zero) * self.step


@dataclass(frozen=True)
class Passage:
    """One call of a layer while a model ran."""

    layer: str
    inputs: FloatArray
    """What entered it, (samples, ...). For an embedding, empty."""
    axis: int
    """The axis of :attr:`inputs` that the layer sums over: its input channels."""
    outputs: FloatArray
    """What came out of it, (samples, ...), before anything is added by other layers."""
    changed: FloatArray | None = None
    """What would have come out with the other weight that was asked for."""


@dataclass(frozen=True)
class Gradient:
    """The derivative of one number, made of a batch's outputs, for one layer."""

    layer: str
    weight: FloatArray
    """By the layer's weight, (channels, elements); the sum over samples and calls."""
    inputs: tuple[tuple[FloatArray, FloatArray], ...] = ()
    """What entered each call of the layer, and the derivative by it; of that use alone, not of other uses."""
    axis: int = -1
    """The axis of :attr:`inputs` that the layer sums over."""


Probe = Callable[[Sequence[FloatArray]], Sequence[FloatArray]]
"""Given the outputs of a batch, the numbers to multiply them with; their sum is differentiated."""


class Runner(Protocol):
    """A model made ready to be run on other weights than its own. The model itself is never changed.

    It runs in evaluation mode. Every real output counts, flattened out of whatever structure the model returns, in a
    fixed order, with the samples along the first axis. What is no real number, or has no derivative, is cut off and
    named in :attr:`notes`; where that leaves nothing, what went into the cut operation is the output.
    """

    layers: tuple[str, ...]
    """The layers, by name, whose weights it can replace."""
    differentiable: bool
    """Whether :meth:`differentiate` works; if not, :attr:`notes` say why."""
    notes: list[str]
    """What a reader must know: outputs left out, tails cut off. Complete after the first run."""

    def place(self, weights: Mapping[str, FloatArray], norms: Mapping[str, Norm]) -> None:
        """From now on run with these weights (channels, elements) and normalizations in place of the model's own."""
        ...

    def run(
        self,
        batch: Batch,
        *,
        weights: Mapping[str, FloatArray] | None = None,
        grids: Mapping[str, Grid] | None = None,
        watch: Callable[[Passage], None] | None = None,
        others: Mapping[str, FloatArray] | None = None,
    ) -> list[FloatArray]:
        """The outputs for a batch.

        Parameters
        ----------
        batch
            The samples.
        weights
            Other weights for this run alone, (channels, elements) by layer.
        grids
            Grids to which the inputs of layers are rounded, by layer.
        watch
            Is shown each call of a layer of :attr:`layers`, with :attr:`Passage.changed` where ``others`` has it.
        others
            Weights that are only tried for :attr:`Passage.changed`; the run goes on without them.
        """
        ...

    def differentiate(self, batch: Batch, probe: Probe) -> Iterable[Gradient]:
        """The derivative of ``sum(probe(outputs) * outputs)`` for each layer of :attr:`layers`."""
        ...

    # Optional; without it only data will do.
    #
    # def imitate(example: Batch, samples: int, seed: int = 0) -> tuple[list[Batch], str]
    #     Inputs made up in the shapes and types of ``example``, and how they were made.


class Track(Protocol):
    """Yields the items it is given, and shows how far their consumer has come."""

    def __call__(self, items: Sequence[Any], what: str, /) -> Iterator[Any]:
        """``what`` is done with each of them, such as ``Calibrating``."""
        ...


def silently(items: Sequence[Any], what: str, /) -> Iterator[Any]:  # noqa: ARG001
    """A :class:`Track` that shows nothing."""
    return iter(items)
