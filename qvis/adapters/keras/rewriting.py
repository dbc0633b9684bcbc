"""Writes new numbers and operations into copies of Keras models, variable by variable, and saves models."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qvis.adapters.keras import parts
from qvis.adapters.keras.copying import copied
from qvis.adapters.keras.live import collect, numbers, walk
from qvis.adapters.keras.outputs import first_line
from qvis.adapters.keras.rewiring import (
    check_clips,
    check_multiplies,
    exchange_clips,
    multipliable_layers,
    multiply_inputs,
)
from qvis.adapters.keras.units import AnyArray, Source
from qvis.adapters.rewritten import Rewritten, check_layers, check_stored, express, fitted, precision_notes
from qvis.errors import BadArgumentError, OutputError, suggest
from qvis.layers import FloatArray, IntArray, Network
from qvis.rewriting import Rewriting
from qvis.words import listed_names

_STATISTICS = {"scale": "gamma", "shift": "beta", "mean": "moving_mean", "variance": "moving_variance"}
_FACTORS = ("gamma", "scale")
"""What normalizations of other kinds call what they multiply by; a word that is no variable means whether they do."""


def rewrite_model(
    model: Any, network: Network, rewriting: Rewriting, inplace: bool = False, *, is_fresh: bool = False
) -> Rewritten:
    """Write new numbers and operations into a copy of a model, or with ``inplace`` into the model itself.

    Parameters
    ----------
    model
        A model of Keras 3 of any kind; of Keras 2, one that is made of layers.
    network
        What was read of it.
    rewriting
        The numbers and operations. Multiplications are put before layers of functional and sequential models.
    inplace
        Whether to write into ``model``. Everything is checked first. No multiplications can be added then.
    is_fresh
        Whether nobody else holds the model, as one that was loaded just now: then it takes the place of a copy.

    Returns
    -------
    Rewritten
        The copy is not compiled, and has no optimizer.

    Raises
    ------
    BadArgumentError
        A name or a shape is wrong, a layer has no bias, numbers do not fit a type, or what enters a layer cannot be
        multiplied.
    UnsupportedModelError
        No exact copy can be made of the model.
    """
    plan = _Plan(model)
    plan.add(network, rewriting)
    if inplace and rewriting.multiplies:
        names = listed_names(list(rewriting.multiplies))
        raise BadArgumentError(
            f"inplace: nothing can be put before {names} in the model itself, since a Keras model cannot be rewired; "
            "leave out inplace to get a copy"
        )
    new, notes = (model, list[str]()) if inplace or is_fresh else copied(model)
    if new is model:
        variables = {id(one): one for one in plan.held.values()}
    else:
        variables = {id(one): other for one, other in zip(_all(model), _all(new), strict=True)}
    for key, value in plan.values.items():
        variables[key].assign(value)
    notes += exchange_clips(new, network.graph, rewriting.unclipped, inplace=inplace)
    multiply_inputs(new, rewriting.multiplies)
    return Rewritten(new, (*notes, *precision_notes(plan.rounded)))


def affines_of(model: Any) -> dict[str, tuple[FloatArray | None, FloatArray | None]]:
    """Factor and shift of the layer, RMS and group normalizations that have a factor, by name.

    As float32 where they are not float64.
    """
    kinds = {"LayerNormalization", "RMSNormalization", "GroupNormalization"}
    found: dict[str, tuple[FloatArray | None, FloatArray | None]] = {}
    for name, _, layer in walk(model):
        held = _affine(layer) if kinds & {cls.__name__ for cls in type(layer).__mro__} else {}
        values: dict[str, FloatArray] = {part: numbers(one, None) for part, one in held.items()}
        values = {part: one if one.dtype == np.float64 else one.astype(np.float32) for part, one in values.items()}
        if "factor" in values:
            found[name] = (values["factor"], values.get("shift"))
    return found


def multipliable(model: Any, network: Network) -> list[str]:
    """The layers before which a multiplication can be put in a copy, by name."""
    return multipliable_layers(model, network, _places(model))


def save_model(model: Any, path: Path) -> None:
    """Write a model as Keras does.

    Raises
    ------
    OutputError
        The suffix is neither ``.keras`` nor ``.h5``, or Keras cannot save the model.
    """
    if path.suffix.lower() not in (".keras", ".h5"):
        raise OutputError(f"path: a Keras model cannot be saved to {path.name!r}; name it .keras or .h5")
    if not hasattr(model, "save"):
        raise OutputError(f"model: {model.name!r} is a layer alone, which Keras does not save; put it into a model")
    logger = logging.getLogger("absl")
    level = logger.level
    with warnings.catch_warnings():
        # that .h5 is an old format
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            model.save(path)
        except Exception as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            raise OutputError(f"path: Keras cannot save {model.name!r} to {path.name!r} ({why})") from error
        finally:
            logger.setLevel(level)


def _all(model: Any) -> list[Any]:
    """All variables that the layers hold, in their own order."""
    found: dict[int, Any] = {}
    for _, _, layer in walk(model):
        for one in layer.weights:
            found.setdefault(id(one), one)
    return list(found.values())


def _places(model: Any) -> dict[str, list[Source]]:
    """Where the weights that can be written come from, by all names of their layers."""
    found = collect(model)
    return {
        name: found.sources[key]
        for key, layer in found.layers.items()
        for name in (layer.name, *layer.aliases)
        if found.sources[key][0].variable.is_float
    }


@dataclass
class _Plan:
    """What is to become of which variable, by its place in memory."""

    model: Any
    held: dict[int, Any] = field(default_factory=dict)
    values: dict[int, AnyArray] = field(default_factory=dict)
    rounded: dict[str, list[str]] = field(default_factory=dict)
    """By type, what it cannot hold exactly."""

    def add(self, network: Network, rewriting: Rewriting) -> None:
        """Take in all that is asked for."""
        places = _places(self.model)
        sources = {name: several[0] for name, several in places.items()}
        biases = {name: _bias(source) for name, source in sources.items()}
        check_layers(network, "weights", rewriting.weights, sources)
        check_layers(network, "biases", rewriting.biases, [name for name, one in biases.items() if one is not None])
        for name, matrix in rewriting.weights.items():
            source = sources[name]
            update = source.variable.read() - numbers(source.variable.held, None) if source.variable.notes else None
            self._put("weights", name, source.variable.held, matrix, source.places(), update)
        for name, bias in rewriting.biases.items():
            held, channels = biases[name] or (None, None)
            self._put("biases", name, held, bias, channels)
        check_clips(network.graph, rewriting.unclipped)
        check_multiplies(self.model, network, rewriting.multiplies, places)
        self._add_norms(rewriting)
        self._add_affines(rewriting)

    def _add_norms(self, rewriting: Rewriting) -> None:
        layers = {name: layer for name, _, layer in walk(self.model) if hasattr(layer, "moving_variance")}
        for name, norm in rewriting.norms.items():
            if name not in layers:
                raise BadArgumentError(
                    f"norms: no normalization by fixed numbers is called {name!r}{suggest(name, layers)}"
                )
            layer = layers[name]
            has = {"has_scale": layer.gamma is not None, "has_shift": layer.beta is not None}
            for key, value in express(norm, float(layer.epsilon), **has).items():
                self._put("norms", name, getattr(layer, _STATISTICS[key]), value)

    def _add_affines(self, rewriting: Rewriting) -> None:
        layers = {name: layer for name, _, layer in walk(self.model)}
        for name, (factor, shift) in rewriting.affines.items():
            layer = layers.get(name.partition("@")[0])
            held = {} if layer is None else _affine(layer)
            if not held:
                raise BadArgumentError(f"affines: no normalization with numbers of its own is called {name!r}")
            for part, value in (("factor", factor), ("shift", shift)):
                if value is not None and part not in held:
                    raise BadArgumentError(f"affines: {name!r} has no {part}; give None for it")
                if value is not None:
                    self._put("affines", name, held[part], value)

    def _put(
        self,
        argument: str,
        name: str,
        held: Any,
        given: FloatArray,
        places: IntArray | None = None,
        update: AnyArray | None = None,
    ) -> None:
        """Plan new numbers for a variable, or for what lies at some places of it; an ``update`` comes on top."""
        self.held[id(held)] = held
        before = self.values.get(id(held), numbers(held, None))
        if places is None:
            shape = tuple(before.shape)
            wanted = np.reshape(given, shape) if np.size(given) == before.size else fitted(argument, name, given, shape)
        else:
            matrix = fitted(argument, name, given, places.shape)
            wanted = np.array(before, np.float64 if matrix.dtype == np.float64 else np.float32)
            wanted.reshape(-1)[places] = matrix
            if not np.array_equal(wanted.reshape(-1)[places], matrix, equal_nan=True):
                raise BadArgumentError(f"{argument}: {name!r} holds one number for several channels; make them equal")
            if update is not None:
                wanted.reshape(-1)[places] -= update.reshape(-1)[places]
        with np.errstate(over="ignore"):
            stored = np.asarray(wanted).astype(before.dtype)
        kind = str(before.dtype)
        kept = check_stored(argument, name, np.asarray(wanted), stored.astype(np.float64), kind)
        if not kept and before.dtype.itemsize < 4:
            self.rounded.setdefault(kind, []).append(name)
        self.values[id(held)] = stored


def _bias(source: Source) -> tuple[Any, IntArray] | None:
    """The variable that a layer adds to its channels, and the places of the channels in it."""
    unit, variable = source.unit, source.variable
    added = next((one for one in unit.variables if one.name == "bias" and one.is_float), None)
    if added is None:
        return None
    view = parts.bias(unit.op, unit.config, variable.name, variable.shape, source.part, added.shape)
    if view is None:
        return None
    index: Any = np.arange(added.size).reshape(added.shape)
    places: Any = view(index)
    return added.held, np.asarray(places)


def _affine(layer: Any) -> Mapping[str, Any]:
    """The factor and the shift of a normalization."""
    found = {"factor": [getattr(layer, name, None) for name in _FACTORS], "shift": [getattr(layer, "beta", None)]}
    return {
        part: one for part, several in found.items() for one in several if hasattr(one, "assign") and one is not None
    }
