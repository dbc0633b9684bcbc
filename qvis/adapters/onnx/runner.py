"""Runs ONNX models on other weights than their own with onnxruntime, as :mod:`qvis.running` describes.

Onnxruntime has no derivatives; where PyTorch is installed, they come from the same graph computed with PyTorch, once
that has been found to give the same outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from qvis.adapters.encodings import Array
from qvis.adapters.onnx import losses
from qvis.adapters.onnx.inputs import split
from qvis.adapters.onnx.prepared import Prepared, Use, prepare
from qvis.adapters.onnx.sessions import Alone, compute, edit, grid_feeds, own_norms, session
from qvis.errors import BadArgumentError, NotRunnableError, QvisError, suggest
from qvis.layers import FloatArray, Network, Norm
from qvis.running import Batch, Gradient, Grid, Passage, Probe
from qvis.words import listed_names

_REAL = ("tensor(float)", "tensor(float16)", "tensor(double)")
_DTYPES = {1: np.float32, 10: np.float16, 11: np.float64}
AGREEMENT = 1e-3
"""How far PyTorch's outputs may be from onnxruntime's, as a share of the largest."""


class OnnxRunner:
    """See :class:`qvis.running.Runner`. A model of a fixed batch size is run on so many samples at a time."""

    def __init__(self, model: Any, network: Network, loss: Callable[..., Any] | str | None = None) -> None:
        self._prepared = prepare(model, NotRunnableError)
        self._own_norms = own_norms(self._prepared)
        self._loss = None if loss is None else losses.Loss(loss)
        self._layers = {one.name: one for one in network.layers}
        self.layers = tuple(name for name in self._layers if name in self._prepared.layers)
        self.notes = list(_obstacles(network, self._prepared))
        self._uses = [use for use in self._prepared.uses if use.layer in self.layers]
        self._sessions: dict[tuple[bool, bool], Any] = {}
        self._alone: dict[str, Alone] = {}
        self._placed: dict[str, Array] = {}
        self._norms: dict[str, Array] = {}
        self._outputs = self._choose_outputs()
        self._checked = False
        self._torch = self._load_torch()

    @property
    def differentiable(self) -> bool:
        """Whether :meth:`differentiate` works, as far as is known before the first run."""
        return self._torch is not None

    def place(self, weights: Mapping[str, FloatArray], norms: Mapping[str, Norm]) -> None:
        """See :meth:`qvis.running.Runner.place`."""
        self._placed = {}
        self._placed = self._tensors(weights)
        self._norms = self._norm_feeds(norms)

    def run(
        self,
        batch: Batch,
        *,
        weights: Mapping[str, FloatArray] | None = None,
        grids: Mapping[str, Grid] | None = None,
        watch: Callable[[Passage], None] | None = None,
        others: Mapping[str, FloatArray] | None = None,
    ) -> list[FloatArray]:
        """See :meth:`qvis.running.Runner.run`."""
        self._check(batch)
        tensors = self._tensors(weights or {})
        feeds = {**self._norms, **tensors}
        for name, grid in (grids or {}).items():
            self._known(name, "grids")
            feeds.update(grid_feeds(name, grid) if name in self._rounded else {})
        other = {name: self._tensors({name: matrix}) for name, matrix in (others or {}).items()}
        parts, each = self._split(batch)
        chunks = [self._chunk(inputs, feeds, bool(grids), watch is not None, other) for inputs in parts]
        if watch is not None:
            for calls in zip(*(passages for _, passages in chunks), strict=True):
                watch(_joined(calls, each, batch.size))
        outputs = [_join(found, each, batch.size) for found in zip(*(found for found, _ in chunks), strict=True)]
        return outputs if self._loss is None else [self._loss(outputs, batch)]

    def differentiate(self, batch: Batch, probe: Probe) -> Iterator[Gradient]:
        """See :meth:`qvis.running.Runner.differentiate`."""
        self._check(batch)
        if self._torch is None:
            raise NotRunnableError(f"model: it cannot be differentiated: {'; '.join(self.notes)}")
        tensors = {**self._norms, **self._tensors({})}
        yield from self._torch.differentiate(*self._split(batch), batch, tensors, self._outputs, probe, self._loss)

    # -----------------------------------------------------------------------------------------------------------------
    # Weights

    def _known(self, name: str, argument: str) -> None:
        if name not in self.layers:
            reason = self._prepared.obstacles.get(name)
            told = f", which {reason}" if reason else suggest(name, self.layers)
            raise BadArgumentError(f"{argument}: no layer that can be replaced is called {name!r}{told}")

    def _tensors(self, weights: Mapping[str, FloatArray]) -> dict[str, Array]:
        """The initializers to run on where they are not the model's own."""
        found = dict(self._placed)
        for name, matrix in weights.items():
            self._known(name, "weights")
            held = self._prepared.layers[name]
            found[held.tensor] = held.write(matrix, self._stored(held.tensor, found))
        return found

    def _stored(self, name: str, tensors: Mapping[str, Array]) -> Array:
        return tensors[name] if name in tensors else self._prepared.read(name)

    def _norm_feeds(self, norms: Mapping[str, Norm]) -> dict[str, Array]:
        feeds: dict[str, Array] = {}
        for name, norm in norms.items():
            if name not in self._own_norms:
                raise BadArgumentError(
                    f"norms: no BatchNormalization that can be replaced is called {name!r}; the model has "
                    f"{listed_names(list(self._own_norms)) or 'none'}"
                )
            names, epsilon = self._own_norms[name]
            # the node's own epsilon stays, so that the variance makes up for the difference
            more = norm.epsilon - epsilon if np.float32(norm.epsilon) != np.float32(epsilon) else 0.0
            for part, values in zip(names, (norm.scale, norm.shift, norm.mean, norm.variance + more), strict=True):
                own = self._prepared.constants[part]
                feeds[part] = np.array(np.broadcast_to(values, tuple(own.dims)), dtype=_DTYPES[own.data_type])
        return feeds

    # -----------------------------------------------------------------------------------------------------------------
    # Running

    @cached_property
    def _rounded(self) -> dict[str, list[Use]]:
        """Layers whose inputs can be rounded, with their uses."""
        found: dict[str, list[Use]] = {}
        for use in self._uses:
            if use.data is not None and use.watched:
                found.setdefault(use.layer, []).append(use)
        return found

    @cached_property
    def _watched(self) -> list[Use]:
        """What can be watched, in the order in which it is computed."""
        seen = {use.layer for use in self._uses if use.watched}
        rest = [name for name in self.layers if name not in seen]
        if rest:
            self.notes.append(f"{listed_names(rest)}: what enters and leaves cannot be seen, it stays inside a node")
        order = {name: place for place, name in enumerate(self._prepared.nodes)}
        return sorted((use for use in self._uses if use.watched), key=lambda use: order[use.node])

    def _session(self, watching: bool, rounding: bool) -> Any:
        key = (watching, rounding)
        if key not in self._sessions:
            self._sessions[key] = session(self._edited(watching, rounding))
        return self._sessions[key]

    def _edited(self, watching: bool, rounding: bool) -> Any:
        replaced = {self._prepared.layers[name].tensor for name in self.layers}
        replaced |= {name for names, _ in self._own_norms.values() for name in names}
        rounded = [use for uses in self._rounded.values() for use in uses] if rounding else []
        shown = self._shown(rounding) if watching else []
        return edit(self._prepared, replaced, self._outputs, shown, rounded)

    def _shown(self, rounding: bool) -> list[str]:
        """The values that enter and leave layers, and the rest of what their nodes take, where that is computed."""
        made = {output for node in self._prepared.model.graph.node for output in node.output}
        names: dict[str, None] = {}
        for use in self._watched:
            node = self._prepared.nodes[use.node]
            given = [one for slot, one in enumerate(node.input) if slot != use.slot and one in made]
            names.update(dict.fromkeys((*given, use.node)))
            if use.data is not None and rounding:
                names[_entering(use)] = None
        return list(names)

    def _chunk(
        self,
        inputs: Mapping[str, Array],
        feeds: Mapping[str, Array],
        rounding: bool,
        watching: bool,
        others: Mapping[str, Mapping[str, Array]],
    ) -> tuple[list[Array], list[Passage]]:
        chosen = self._session(watching, rounding)
        shown = self._shown(rounding) if watching else []
        names = list(dict.fromkeys((*self._outputs, *shown)))
        values = dict(zip(names, compute(chosen, names, {**inputs, **feeds}), strict=True))
        outputs = [values[name] for name in self._outputs]
        if not watching:
            return [_real(one) for one in outputs], []
        values.update(inputs)
        passages = [self._passage(use, values, feeds, rounding, others) for use in self._watched]
        return [_real(one) for one in outputs], passages

    def _passage(
        self,
        use: Use,
        values: Mapping[str, Array],
        feeds: Mapping[str, Array],
        rounding: bool,
        others: Mapping[str, Mapping[str, Array]],
    ) -> Passage:
        node = self._prepared.nodes[use.node]
        inputs = np.zeros((0,), np.float32)
        entered = "" if use.data is None else _entering(use) if rounding else node.input[use.data]
        if entered:
            inputs = values[entered] if entered in values else self._stored(entered, feeds)
        changed = None
        if use.layer in others:
            tensor = others[use.layer][self._prepared.layers[use.layer].tensor]

            def find(name: str) -> Array:
                slot = list(node.input).index(name)
                if slot == use.slot:
                    return self._prepared.arriving(use, tensor)
                if slot == use.data:
                    return inputs
                return values[name] if name in values else self._stored(name, feeds)

            if use.node not in self._alone:
                self._alone[use.node] = Alone(self._prepared, node)
            changed = _real(self._alone[use.node].run(find))
        return Passage(use.layer, _real(inputs), use.axis, _real(values[use.node]), changed)

    # -----------------------------------------------------------------------------------------------------------------
    # Inputs and outputs

    def _choose_outputs(self) -> list[str]:
        """The real outputs; where there are none, what goes into the nodes that make them."""
        graph = self._prepared.model.graph
        outputs = {one.name: one.type for one in session(self._prepared.model).get_outputs()}
        real = [name for name, kind in outputs.items() if kind in _REAL]
        rest = [name for name in outputs if name not in real]
        if real or not outputs:
            if rest:
                self.notes.append(f"{listed_names(rest)} is no real number and is left out of the outputs")
            return real
        makers = {output: node for node in graph.node for output in node.output}
        infos = self._prepared.infos
        found: dict[str, None] = {}
        seen: set[str] = set()
        while rest:
            node = makers.get(rest.pop(0))
            for name in node.input if node is not None else ():
                if name in seen or name in self._prepared.constants:
                    continue
                seen.add(name)
                if name in infos and self._prepared.type_of(name) in (1, 10, 11):
                    found[name] = None
                else:
                    rest.append(name)
        if not found:
            raise NotRunnableError("model: none of its outputs is a tensor of real numbers, and none goes into them")
        self.notes.append(
            f"cut off before {listed_names(list(outputs))}, which is no real number; what goes in there, "
            f"{listed_names(list(found))}, counts as the output"
        )
        return list(found)

    def _split(self, batch: Batch) -> tuple[list[dict[str, Array]], int]:
        types = {one.name: one.type for one in self._session(False, False).get_inputs()}
        return split(self._prepared, types, batch)

    # -----------------------------------------------------------------------------------------------------------------
    # Derivatives

    def _load_torch(self) -> Any:
        try:
            from qvis.adapters.onnx.autograd import Differentiator
        except ImportError:
            self.notes.append("no derivatives: they are computed with PyTorch; run: pip install 'qvis[torch]'")
            return None
        found = Differentiator(self._prepared, self._uses, self.layers)
        if found.missing:
            self.notes.append(f"no derivatives: no rule for the operators {listed_names(found.missing)}")
            return None
        return found

    def _check(self, batch: Batch) -> None:
        """At the first run, compare the outputs that derivatives are made of with onnxruntime's."""
        if self._checked:
            return
        self._checked = True
        if self._torch is None:
            return
        feeds = {**self._norms, **self._tensors({})}
        parts, _ = self._split(batch)
        reason = ""
        for inputs in parts[:1]:
            ours, _ = self._chunk(inputs, feeds, False, False, {})
            try:
                theirs = self._torch.forward(inputs, feeds, self._outputs)
                reason = _differ(self._outputs, ours, theirs)
            except QvisError:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if reason:
            self._torch = None
            self.notes.append(f"no derivatives: computed with PyTorch, the graph differs from onnxruntime: {reason}")


def runner(model: Any, network: Network, loss: Callable[..., Any] | str | None = None) -> OnnxRunner:
    """Make an ONNX model ready to be run; ``loss(outputs, labels)`` gives a number for each sample.

    Raises
    ------
    NotRunnableError
        Onnxruntime or onnx is not installed, onnxruntime cannot load the model, or it is larger than 2 GB.
    """
    return OnnxRunner(model, network, loss)


def _obstacles(network: Network, prepared: Prepared) -> Iterator[str]:
    by_reason: dict[str, list[str]] = {}
    for layer in network.layers:
        if layer.name not in prepared.layers:
            default = "is used by no operator whose weights can be replaced"
            by_reason.setdefault(prepared.obstacles.get(layer.name, default), []).append(layer.name)
    for reason, names in by_reason.items():
        yield f"{listed_names(names)} {reason}"


def _entering(use: Use) -> str:
    """The value that enters a layer where it may be rounded."""
    return f"qvis:{use.node}:{use.data}:9"


def _real(array: Array) -> FloatArray:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _join(parts: Sequence[Array], each: int, size: int) -> FloatArray:
    """The results of several runs of ``each`` sample as one of ``size``."""
    if len(parts) == 1:
        return parts[0]
    stacked = parts[0].ndim and len(parts[0]) == each
    joined: FloatArray = np.concatenate(parts) if stacked else np.stack(parts)
    return joined[:size]


def _joined(calls: Sequence[Passage], each: int, size: int) -> Passage:
    first = calls[0]
    if len(calls) == 1:
        return first
    changed = [one.changed for one in calls if one.changed is not None]
    return Passage(
        first.layer,
        _join([one.inputs for one in calls], each, size) if first.inputs.size else first.inputs,
        first.axis,
        _join([one.outputs for one in calls], each, size),
        _join(changed, each, size) if changed else None,
    )


def _differ(names: Sequence[str], ours: Sequence[FloatArray], theirs: Sequence[FloatArray]) -> str:
    for name, one, other in zip(names, ours, theirs, strict=True):
        if one.shape != other.shape:
            return f"{name!r} has the shape {other.shape} instead of {one.shape}"
        if not one.size:
            continue
        difference = float(np.abs(one - other).max())
        if not difference <= AGREEMENT * max(float(np.abs(one).max()), 1e-30):
            return f"{name!r} by up to {difference:.2g}, its largest number is {float(np.abs(one).max()):.2g}"
    return ""
