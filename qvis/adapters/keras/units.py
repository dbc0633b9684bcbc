"""From the variables of Keras layers to a :class:`~qvis.layers.Network`: what live models and files share."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qvis.adapters.keras.parts import Config, Part, bias, is_state, quantization, weights
from qvis.layers import FloatArray, IntArray, Layer, Network, Skipped

AnyArray = NDArray[Any]


@dataclass(frozen=True)
class Variable:
    """One array of a layer, read when asked for."""

    name: str
    """Without the layer's: ``kernel``."""
    shape: tuple[int, ...]
    dtype: str
    key: Hashable
    """Equal for two variables exactly when they are the same numbers."""
    read: Callable[[], AnyArray] = field(repr=False, compare=False)
    notes: tuple[str, ...] = ()
    learned: bool = True
    """Whether it counts as a parameter."""
    held: Any = field(default=None, repr=False, compare=False)
    """Keras's own variable, of a model in memory."""

    @property
    def is_float(self) -> bool:
        return "float" in self.dtype

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Unit:
    """A layer with variables of its own."""

    name: str
    """The names of the layers around it and its own, joined by slashes."""
    op: str
    config: Config
    variables: tuple[Variable, ...]
    holder: Any = field(default=None, repr=False, compare=False)
    """Keras's own layer, of a model in memory."""


class Source(NamedTuple):
    """Where a layer's weight comes from."""

    unit: Unit
    variable: Variable
    part: Part

    def places(self) -> IntArray:
        """Where in the flattened variable each number of the weight lies, (channels, elements)."""
        index: Any = np.arange(self.variable.size).reshape(self.variable.shape)
        found: Any = self.part.view(index)
        return np.asarray(found)


@dataclass
class Collector:
    """Gathers the layers of one model: each variable once, further names of it as aliases."""

    layers: dict[Hashable, Layer] = field(default_factory=dict)
    sources: dict[Hashable, list[Source]] = field(default_factory=dict)
    """Where each of the layers comes from: all its places in the model."""
    skipped: dict[str, Skipped] = field(default_factory=dict)
    sizes: dict[Hashable, int] = field(default_factory=dict)
    names: dict[str, Hashable] = field(default_factory=dict)

    def add(self, unit: Unit) -> None:
        """Add all weights of a layer."""
        mode = quantization(unit.config)
        for variable in unit.variables:
            parts = weights(unit.op, unit.config, variable.name, variable.shape)
            if variable.learned and not is_state(variable.name) and (variable.is_float or parts):
                self.sizes[variable.key] = variable.size
            reason = _obstacle(unit, variable, mode)
            if reason is not None and (parts or variable.name == "quantized_kernel"):
                self.skip("/".join(filter(None, (unit.name, parts[0].label if parts else variable.name))), reason)
            elif reason is None:
                for part in parts:
                    self._put(unit, variable, part)

    def _put(self, unit: Unit, variable: Variable, part: Part) -> None:
        key = (variable.key, part.label.rpartition("/")[2] if "part" in part.channels else "")
        name = "/".join(filter(None, (unit.name, part.label))) or "(root)"
        self.sources.setdefault(key, []).append(Source(unit, variable, part))
        known = self.layers.get(key)
        if known is not None:
            if name not in (known.name, *known.aliases):
                self.layers[key] = replace(known, aliases=(*known.aliases, name))
            return
        number = 2
        base = name
        while name in self.names:  # Keras does not forbid two layers of one name, except in functional models
            name, number = f"{base}#{number}", number + 1
        self.names[name] = key
        get, notes = variable.read, list(variable.notes)
        if not variable.is_float:
            get = _dequantizer(unit, variable)
            notes.append(f"dequantized from {variable.dtype}")
        if part.note:
            notes.append(part.note)
        self.layers[key] = Layer(
            name=name,
            op=part.op,
            shape=part.shape,
            dtype=variable.dtype,
            read=lambda: _matrix(get(), part),
            channels=part.channels,
            notes=tuple(notes),
            bias=_bias(unit, variable, part),
        )

    def skip(self, name: str, reason: str) -> None:
        """Say why a weight is not among the layers."""
        self.skipped.setdefault(name, Skipped(name, reason))

    def network(self, name: str, framework: str) -> Network:
        """What was gathered, in the order it came."""
        parameters = sum(self.sizes.values())
        return Network(name, framework, tuple(self.layers.values()), tuple(self.skipped.values()), parameters)


def _bias(unit: Unit, variable: Variable, part: Part) -> Callable[[], FloatArray] | None:
    """Reads what the layer adds to the channels of a part."""
    added = next((one for one in unit.variables if one.name == "bias" and one.is_float), None)
    if added is None:
        return None
    view, read = bias(unit.op, unit.config, variable.name, variable.shape, part, added.shape), added.read
    if view is None:
        return None

    def numbers() -> FloatArray:
        array = read()
        return view(array if array.dtype == np.float64 else array.astype(np.float32))

    return numbers


def _obstacle(unit: Unit, variable: Variable, mode: str | None) -> str | None:
    """Why a weight cannot be shown, None for a good one."""
    if variable.size == 0:
        return f"has no elements, shape {variable.shape}"
    if variable.is_float:
        return None
    if "complex" in variable.dtype:
        return f"is complex ({variable.dtype}), and qvis reads real weights"
    if mode in ("int4", "gptq", "awq"):
        return f"is packed by Keras's quantization {mode!r}, which qvis does not unpack"
    if variable.dtype == "int8" and _scale(unit, variable) is not None:
        return None
    return f"holds {variable.dtype} numbers that do not say how to turn them back into weights"


def _scale(unit: Unit, variable: Variable) -> Variable | None:
    return next((one for one in unit.variables if one.name == f"{variable.name}_scale"), None)


def _dequantizer(unit: Unit, variable: Variable) -> Callable[[], AnyArray]:
    """Reads an int8 variable as ``quantize("int8")`` of Keras means it: divided by the scale of its output channel."""
    scale = _scale(unit, variable)
    assert scale is not None

    def read() -> AnyArray:
        factors = _spread(scale.read().astype(np.float32), unit, variable)
        return variable.read().astype(np.float32) / factors

    return read


def _spread(scale: FloatArray, unit: Unit, variable: Variable) -> FloatArray:
    """The scales with an axis for each of the variable's, 1 where all share one."""
    if unit.op in ("Embedding", "ReversibleEmbedding"):
        return scale.reshape(-1, 1) if variable.name == "embeddings" else scale.reshape(1, -1)
    if unit.op != "EinsumDense":
        return scale.reshape(1, -1)
    # The scales are laid out like the layer's output, the kernel in the order of its own letters.
    kernel, _, output = str(unit.config.get("equation", "")).partition(",")[2].partition("->")
    kernel = kernel.strip()
    sizes = dict(zip(kernel, variable.shape, strict=True))
    held = [letter for letter in output if letter in sizes]
    ordered = [letter for letter in kernel if letter in held]
    scale = scale.reshape([sizes[letter] for letter in held]).transpose([held.index(letter) for letter in ordered])
    return scale.reshape([sizes[letter] if letter in held else 1 for letter in kernel])


def _matrix(array: AnyArray, part: Part) -> FloatArray:
    """The numbers as (channels, elements), float64 as it is and all others as float32; read-only."""
    if array.dtype != np.float64:
        array = array.astype(np.float32, copy=False)
    matrix: FloatArray = part.view(array)
    matrix = matrix.view()
    matrix.flags.writeable = False
    return matrix
