"""The shared vocabulary: what adapters hand on, what analysis makes of it, and what reports show.

Data flows one way. An adapter turns a model into a :class:`Network` of :class:`Layer`; the analysis turns each layer
into a :class:`LayerAnalysis`; a report reads the :class:`Analysis`. All records are frozen, and none knows a framework.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import cached_property
from math import inf, isfinite, log10, nan
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qvis.errors import BadArgumentError

if TYPE_CHECKING:
    from qvis.analysis.damage import LayerSensitivity, Sensitivity

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Layer:
    """One weight of a model, seen as a matrix with a row for each output channel.

    Which axis of the framework's tensor is the output channel is decided once, in the adapter. The numbers are read
    only when asked for, so that a network of many layers costs no memory until then.
    """

    name: str
    """The name of the module that owns the weight, as the framework spells it."""
    op: str
    """The kind of layer, such as ``Conv2d``; ``other`` for a parameter of a module that qvis has no rule for."""
    shape: tuple[int, ...]
    """The shape of the framework's own tensor."""
    dtype: str
    """The type it is stored in, such as ``bfloat16``."""
    read: Callable[[], FloatArray] = field(repr=False, compare=False)
    """Returns the weight as float32 or float64, (channels, elements); shares memory with the model where it can."""
    channels: str = "axis 0"
    """Where the rows of :attr:`weight` come from, in words: ``axis 0``, ``groups x axis 1``, ..."""
    aliases: tuple[str, ...] = ()
    """Other names under which the model holds the very same tensor (tied weights)."""
    notes: tuple[str, ...] = ()
    """What a reader must know about the numbers, such as that they were dequantized."""
    along: Callable[[int], Layer] | None = field(default=None, repr=False, compare=False)
    """Gives the same tensor with its output channels along another axis; None where the model says which axis it is."""
    bias: Callable[[], FloatArray] | None = field(default=None, repr=False, compare=False)
    """Returns what the layer adds to its output channels, (channels,); None where it adds nothing or it is unknown."""
    stored: Layer | None = field(default=None, repr=False, compare=False)
    """The layer as the model holds it, where :attr:`weight` has normalizations folded in."""
    norms: tuple[str, ...] = ()
    """The normalizations that are folded into :attr:`weight`."""
    tensor: str = ""
    """The initializer of an ONNX file that nodes take as this weight, just as it is stored; empty where none is."""

    @property
    def weight(self) -> FloatArray:
        """The weight, (channels, elements). Read anew at each access; never written to."""
        return self.read()


@dataclass(frozen=True)
class Skipped:
    """A tensor of the model that is not reported on, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Norm:
    """A normalization by fixed numbers, ``(x - mean) / sqrt(variance + epsilon) * scale + shift`` for each channel."""

    name: str
    mean: FloatArray
    variance: FloatArray
    scale: FloatArray
    shift: FloatArray
    epsilon: float


@dataclass(frozen=True)
class Node:
    """One operation of a model's graph."""

    name: str
    """Unique in the graph: the module's or layer's name where there is one, with ``@2`` from its second call on."""
    op: str
    """A word of :data:`OPS`, else what the framework calls it, such as ``aten.cumsum``."""
    inputs: tuple[str, ...] = ()
    """The nodes whose results it takes, in order. Constants and parameters are no nodes."""
    layer: str = ""
    """The layer whose weight it applies, for ``conv``, ``conv_transpose``, ``linear``, ``matmul``, ``embedding``."""
    shape: tuple[int, ...] = ()
    """The shape of its result for the example inputs; empty where it is not known."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """See :data:`OPS`."""
    original: str = ""
    """What it is called in the model's own graph, where other tools look for it: the name of an ONNX node."""


OPS = {
    "input": "a tensor that is given to the model",
    "output": "a result of the model; has no result of its own",
    "conv": "attributes: groups, padding (any not zero), channel_axis of its result",
    "conv_transpose": "attributes: groups, channel_axis",
    "linear": "a matrix times the last axis; attributes: channel_axis",
    "embedding": "rows of a table",
    "matmul": "of two results, no weight; attributes: equation (einsum's, one letter for each axis; else as in NumPy)",
    "batch_norm": "by fixed numbers: Graph.norms[name]; attributes: channel_axis, writable (where it is not: False)",
    "layer_norm": "attributes: axes (of its result), scale and shift (whether it has them)",
    "rms_norm": "the same",
    "group_norm": "also instance normalization",
    "relu": "",
    "leaky_relu": "attributes: slope",
    "prelu": "attributes: slopes (an array)",
    "clip": "attributes: low, high (None: unbounded); relu6, hardtanh",
    **dict.fromkeys(("gelu", "silu", "sigmoid", "tanh", "softmax", "hardswish", "hardsigmoid", "elu"), ""),
    "add": "of two results or of one and a constant; attributes: constant (whether one is)",
    "sub": "the same",
    "mul": "the same, and axis (along which the constant lies, where it is a vector that can be written)",
    "div": "the same, and divisor (whether the constant is what is divided by; without, it is not known)",
    "maximum": "of two results, element by element; also the minimum",
    "glu": "the first half along an axis times the sigmoid of the second; attributes: axis",
    "concat": "attributes: axis; also stacking, along an axis of the result that the operands have not",
    "split": "all kinds of taking a part; attributes: axis (None: unknown)",
    "max_pool": "also the largest or smallest over axes that are not the channels; attributes: axes, where it is so",
    "avg_pool": "also global, and mean over axes that are not the channels; the same",
    "sum": "over axes that are not the channels; the same",
    "pad": "attributes: value (None: copies of what is there), widths (before and after, by axis; if they are known)",
    "resize": "upsampling, and repeating",
    "roll": "what falls off at one end comes in at the other, or is turned around; attributes: axes",
    "pixel_shuffle": "channels become places, those next to one another one channel; or back; attributes: channel_axis",
    "flatten": "attributes: start (the first axis that is merged)",
    "reshape": "",
    "transpose": "attributes: axes (the order)",
    "identity": "hands on what it takes: also casts and copies",
    "dropout": "",
    "attention": "scaled dot product: query, key, value, and maybe a mask; attributes: tokens (their axis, else -2)",
}
"""The words for operations that all adapters share, with the attributes that such a node has."""


@dataclass(frozen=True)
class Graph:
    """How data flows through a model, in an order in which every node follows those it takes from."""

    nodes: tuple[Node, ...]
    norms: Mapping[str, Norm] = field(default_factory=dict)
    """The numbers of each ``batch_norm``, by the name of its module (that of the node without ``@2``)."""
    source: str = ""
    """What it was found with, such as ``torch.export``."""

    @cached_property
    def by_name(self) -> dict[str, Node]:
        """Each node by its name."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def users(self) -> dict[str, tuple[Node, ...]]:
        """The nodes that take each node's result; one that takes it twice is there twice."""
        found: dict[str, list[Node]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for name in node.inputs:
                found[name].append(node)
        return {name: tuple(users) for name, users in found.items()}

    @cached_property
    def calls(self) -> dict[str, tuple[Node, ...]]:
        """The nodes that apply each layer's weight."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            if node.layer:
                found.setdefault(node.layer, []).append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}


@dataclass(frozen=True)
class Network:
    """A model as qvis sees it: its layers in the model's own order, and what was left out."""

    name: str
    framework: str
    """Framework and version, such as ``PyTorch 2.13.0``."""
    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...] = ()
    parameters: int = 0
    """All trainable numbers of the model, tied ones once."""
    graph: Graph | None = field(default=None, repr=False, compare=False)
    no_graph: str = ""
    """Why there is no graph."""


@dataclass(frozen=True)
class ChannelStatistics:
    """Statistics of each output channel of one layer. All arrays have shape (channels,).

    NaN and infinite weights are left out of the statistics and counted in :attr:`nonfinite`; a channel without any
    finite weight has NaN everywhere.
    """

    min: FloatArray
    max: FloatArray
    mean: FloatArray
    std: FloatArray
    """Sample standard deviation (n - 1), as pandas computes it; NaN for channels of one weight."""
    q25: FloatArray
    q50: FloatArray
    q75: FloatArray
    nonfinite: IntArray
    """How many weights are NaN or infinite."""
    dead: BoolArray
    """Channels whose largest weight is below ``Thresholds.dead`` of the layer's largest."""
    elements: int
    """Weights in each channel."""

    @cached_property
    def range(self) -> FloatArray:
        """max - min."""
        with np.errstate(over="ignore"):
            return self.max - self.min

    @cached_property
    def peak(self) -> FloatArray:
        """max |w|: what sets the step of a symmetric grid."""
        return np.maximum(np.abs(self.min), np.abs(self.max))

    @cached_property
    def live(self) -> BoolArray:
        """Channels that hold finite weights and are not dead."""
        return ~self.dead & np.isfinite(self.peak)

    @cached_property
    def relative_range(self) -> FloatArray:
        """range / the smallest positive range of a live channel. All ones where no live channel has a range."""
        base = self.range[self.live & (self.range > 0)]
        if base.size == 0:
            return np.where(np.isfinite(self.range), 1.0, np.nan).astype(self.range.dtype)
        with np.errstate(over="ignore"):
            relative: FloatArray = self.range / base.min()
        return relative


@dataclass(frozen=True)
class RoundingNoise:
    """What rounding one layer to a symmetric signed grid does to its weights. Arrays have shape (channels,).

    The step is max|w| / (2^(bits-1) - 1) and rounding is to nearest, so no weight is clipped. Sums are over the finite
    weights of a channel; where weights are so small or large that their squares leave floating point, both power and
    noise are in units of a power of two, squared.
    """

    bits: int
    step: float
    """The step of the grid that the whole tensor shares; 0 where all weights are zero."""
    power: FloatArray
    """Sum of w^2."""
    noise_tensor: FloatArray
    """Sum of (w - w_rounded)^2 with one step for the tensor."""
    noise_channel: FloatArray
    """The same with a step for each channel."""
    levels: IntArray
    """How many of the 2^bits levels of the shared grid lie between a channel's smallest and largest weight."""

    @cached_property
    def sqnr_tensor(self) -> float:
        """Signal to quantization noise of the layer in dB, one step per tensor."""
        return decibels(float(self.power.sum()), float(self.noise_tensor.sum()))

    @cached_property
    def sqnr_channel(self) -> float:
        """Signal to quantization noise of the layer in dB, one step per channel."""
        return decibels(float(self.power.sum()), float(self.noise_channel.sum()))


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise): inf without noise, NaN without signal or where either is unknown."""
    if not signal > 0 or noise != noise:
        return nan
    ratio = signal / noise if noise > 0 else inf
    return 10 * log10(ratio) if ratio > 0 else -inf


class Severity(str, Enum):
    """How much a layer needs attention."""

    OK = "ok"
    WATCH = "watch"
    PROBLEM = "problem"
    UNUSABLE = "unusable"

    @property
    def rank(self) -> int:
        """0 for ok to 3 for unusable."""
        return list(Severity).index(self)

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Reason:
    """One finding about a layer, in plain words with its numbers."""

    kind: str
    """``nonfinite``, ``zero``, ``damage``, ``inputs``, ``noise``, ``starved``, ``outliers``, ``dead``, ``near_dead`` or
    ``single``."""
    text: str
    severity: Severity
    """How severe it makes the layer; a layer is as severe as its weightiest reason."""
    channels: tuple[int, ...] = ()
    """The channels it is about."""
    evidence: str = "from the weights alone"
    """What it rests on."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Remedy:
    """What would help a layer."""

    kind: str
    """``per_channel``, ``equalize``, ``more_bits``, ``clip``, ``prune`` or ``float``."""
    text: str
    damage: float = nan
    """What would be left of the damage; NaN where it is not known."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class LayerAnalysis:
    """Everything a report knows about one layer."""

    name: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    channels: str
    aliases: tuple[str, ...]
    notes: tuple[str, ...]
    statistics: ChannelStatistics
    rounding: RoundingNoise
    noise_share: float
    """What layers are ranked by, 0 is best; see :func:`qvis.analysis.problems.noise_share`. NaN without any power."""
    noise_share_channel: float
    """The same with a grid for each channel."""
    severity: Severity
    reasons: tuple[Reason, ...]
    flags: dict[str, IntArray] = field(default_factory=dict)
    """Channel indices by finding: ``outliers``, ``starved``, ``dead``, ``near_dead``, ``nonfinite``."""
    digest: str = ""
    """sha256 of the weight's bytes, as hexadecimal digits."""
    norms: tuple[str, ...] = ()
    """The normalizations that are folded into the weights shown here."""
    stored: LayerAnalysis | None = None
    """The same of the weights as the model holds them, where normalizations were folded."""
    sensitivity: LayerSensitivity | None = None
    """What quantizing the layer does to the output of the model; None where the weights alone are known."""
    remedies: tuple[Remedy, ...] = ()
    """What would help, what costs nothing first; for layers that need help."""

    @property
    def weights(self) -> int:
        """How many weights the layer has."""
        return int(self.statistics.min.size) * self.statistics.elements

    @property
    def rounded(self) -> bool:
        """Whether the weights lie on an integer grid already: what rounding cost them can no longer be seen in them.

        So it is where an adapter dequantized them, and says so in :attr:`notes`, or where rounding them again, on one
        grid or on a grid for each channel of several weights, changes nothing.
        """
        if not self.statistics.live.any():
            return False
        grids = [self.rounding.noise_tensor] + [self.rounding.noise_channel] * (self.statistics.elements > 1)
        return any(not noise.any() for noise in grids) or any("dequantized" in note for note in self.notes)


@dataclass(frozen=True)
class Thresholds:
    """Where findings begin. The defaults suit int8; their reasons stand in the documentation's chapter on severity."""

    watch_db: float = 30.0
    """A layer is to be watched when a quarter of its channels keep fewer dB than this on the shared grid."""
    problem_db: float = 20.0
    """It is a problem below this: 20 dB is 1 % of a channel's power turned to noise."""
    starved_levels: int = 8
    """A channel that gets fewer levels of the shared grid than this is starved."""
    watch_starved: float = 0.25
    """Share of the live channels that must be starved for ``watch``."""
    problem_starved: float = 0.5
    """Share of the live channels that must be starved for ``problem``."""
    dead: float = 1e-6
    """A channel is dead when its largest weight is below this share of the layer's largest."""
    near_dead: float = 1e-3
    """A live channel is near dead when its largest weight is below this share of the channels' upper quartile."""
    outlier_iqr: float = 1.5
    """A channel is an outlier when its relative range exceeds Q3 + this many interquartile ranges (AIMET's rule)."""

    def __post_init__(self) -> None:
        for threshold in fields(self):
            value = getattr(self, threshold.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
                raise BadArgumentError(f"{threshold.name}: got {value!r}, expected a finite number")


@dataclass(frozen=True)
class Analysis:
    """The finding about a whole model; made by :func:`qvis.analyze`, read by every report."""

    name: str
    framework: str
    parameters: int
    layers: tuple[LayerAnalysis, ...]
    """In the model's own order."""
    skipped: tuple[Skipped, ...]
    thresholds: Thresholds
    bits: int
    fingerprint: str
    """sha256 over names, shapes and weights of the layers: the same for the same model, whatever the machine."""
    evidence: str = "from the weights alone"
    sensitivity: Sensitivity | None = None
    """What quantization does to the output; None where the weights alone are known."""
    graph: Graph | None = field(default=None, repr=False)
    no_graph: str = ""
    """Why there is no graph."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Why a normalization was not folded, by its name."""

    @cached_property
    def ranked(self) -> tuple[LayerAnalysis, ...]:
        """The layers, worst first: by severity, then by the larger damage or, where none is known, the noise."""
        order = sorted(
            range(len(self.layers)),
            key=lambda i: (-self.layers[i].severity.rank, -np.nan_to_num(self.badness(self.layers[i]), nan=inf), i),
        )
        return tuple(self.layers[i] for i in order)

    def badness(self, layer: LayerAnalysis) -> float:
        """What layers of one severity are ranked by: the larger damage, of weights or inputs, else the noise share."""
        if layer.sensitivity is None or self.sensitivity is None:
            return layer.noise_share
        return float(np.fmax(self.damage(layer), self.damage(layer, "inputs")))

    def damage(self, layer: LayerAnalysis, what: str = "weights") -> float:
        """What rounding a layer's weights, or its inputs, does to the output, at the width and on the grid judged."""
        if layer.sensitivity is None or self.sensitivity is None:
            return nan
        return layer.sensitivity.damage(self.bits, self.sensitivity.granularities[0], what).value

    @property
    def problematic_layers(self) -> tuple[LayerAnalysis, ...]:
        """Layers that are a problem or unusable, worst first."""
        return tuple(layer for layer in self.ranked if layer.severity.rank >= Severity.PROBLEM.rank)
