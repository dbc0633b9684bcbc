"""What a model is to be changed to: new numbers for its layers and normalizations, in a copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qvis.layers import FloatArray, Norm


@dataclass(frozen=True)
class Rewriting:
    """New numbers; what is not named stays as it is.

    An adapter's ``rewrite(model, network, rewriting, inplace)`` returns a model with them.
    """

    weights: Mapping[str, FloatArray] = field(default_factory=dict)
    """(channels, elements) by layer, laid out as :attr:`qvis.layers.Layer.weight`."""
    biases: Mapping[str, FloatArray] = field(default_factory=dict)
    """(channels,) by layer: all that the layer itself adds. Only for layers that have a bias."""
    norms: Mapping[str, Norm] = field(default_factory=dict)
    """Normalizations by fixed numbers."""
    affines: Mapping[str, tuple[FloatArray | None, FloatArray | None]] = field(default_factory=dict)
    """Factor and shift of layer, RMS and group normalizations by node name, (channels,); None where it has none."""
