"""What a model is to be changed to, in a copy: new numbers for its layers and normalizations, and few operations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from qvis.layers import FloatArray, Norm


@dataclass(frozen=True)
class Rewriting:
    """New numbers and operations; what is not named stays as it is.

    An adapter's ``rewrite(model, network, rewriting, inplace)`` returns a model with them.
    """

    weights: Mapping[str, FloatArray] = field(default_factory=dict)
    """(channels, elements) by layer, laid out as :attr:`qvis.layers.Layer.weight`."""
    biases: Mapping[str, FloatArray] = field(default_factory=dict)
    """(channels,) by layer: all that the layer itself adds. Only for layers that have a bias."""
    norms: Mapping[str, Norm] = field(default_factory=dict)
    """Normalizations by fixed numbers."""
    affines: Mapping[str, tuple[FloatArray | None, FloatArray | None]] = field(default_factory=dict)
    """Factor and shift of layer, RMS and group normalizations by node name, (channels,); None where it has none.

    Also what nodes multiply by, or add, that take a vector beside a result.
    """
    unclipped: Collection[str] = ()
    """Nodes of ``clip`` with ``low`` 0, such as ReLU6, that become ReLU. One that cannot be exchanged stays, and a note
    says why."""
    multiplies: Mapping[str, FloatArray] = field(default_factory=dict)
    """By ``linear`` layer, what its input is multiplied by, just before it enters in each of its calls; (input
    channels,). An operation of its own, which is added to the model."""
