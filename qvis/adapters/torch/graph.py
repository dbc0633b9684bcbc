"""How data flows through a PyTorch module: found with torch.export where there is an example input, else with torch.fx.

Either way only shapes flow, on no device; see Reed et al., "torch.fx: Practical Program Capture and Transformation for
Deep Learning in Python" (arXiv 2112.08429).
"""

from __future__ import annotations

import inspect
import logging
import operator
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np

from qvis.adapters.torch.builder import build
from qvis.adapters.torch.calls import type_of
from qvis.adapters.torch.values import Traced, name_outputs, plain
from qvis.errors import NoGraphError, QvisError
from qvis.layers import Graph, Network
from qvis.running import Batch

if TYPE_CHECKING:
    from torch import Tensor, fx, nn
    from torch.export import ExportedProgram


def graph(model: nn.Module, example: Batch | None) -> Graph:
    """The operations of a module in evaluation mode, and what flows between them.

    Parameters
    ----------
    model
        Any module. Neither it nor the state of the random generators is changed.
    example
        A batch that it can be run on. Without one, torch.fx traces the module, which gives no shapes and fails where
        the module looks at what it is given.

    Raises
    ------
    NoGraphError
        The module cannot be traced.
    """
    from qvis.adapters.torch import read

    _check(model)
    network = read(model)
    failures: list[str] = []
    ways: list[Callable[[], Traced]] = []
    with _settled(model), _quiet():
        if example is not None:
            args, kwargs = _tensors(model, example)
            ways += [partial(_export, model, args, kwargs, strict, network) for strict in (False, True)]
        ways.append(partial(_symbolic, model, example, network))
        for trace in ways:
            try:
                return build(trace())
            except Exception as error:  # noqa: PERF203
                failures.append(_first_line(error))
    if example is not None:
        raise NoGraphError(
            f"no graph: torch.export cannot follow the model on the example inputs ({failures[0]}); "
            "give inputs that the model can be called with, or take out what depends on the numbers it is given"
        )
    raise NoGraphError(
        f"no graph: torch.fx cannot follow the model without inputs ({failures[0]}); give inputs that it can be run on"
    )


def graph_of_export(model: ExportedProgram | fx.GraphModule, network: Network) -> Graph:
    """The graph of a program that torch.export made, or of a graph module of bare operations."""
    make: Callable[[Any, Network], Traced] = _from_export if hasattr(model, "graph_signature") else _from_graph
    try:
        return build(make(model, network))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise NoGraphError(
            f"no graph: the exported graph cannot be read ({_first_line(error)}); give the module itself"
        ) from error


def _check(model: nn.Module) -> None:
    """Refuse what cannot be traced, in words that say what to do."""
    import torch
    from torch.nn.parameter import is_lazy

    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"{name!r} is" if name else "the model is"
            raise NoGraphError(
                f"no graph: {what} a TorchScript module, which cannot be traced; give the module it was made from"
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise NoGraphError(f"no graph: {name!r} is not initialized yet; run the model once on an example input")
        if tensor.is_meta:
            raise NoGraphError(f"no graph: {name!r} has a shape but no numbers (meta device); load the weights first")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    line = text.splitlines()[0].strip() if text else ""
    return line if isinstance(error, QvisError) else f"{type(error).__name__}: {line}".removesuffix(": ")


# ---------------------------------------------------------------------------------------------------------------------
# Leaving the model as it was


@contextmanager
def _settled(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; what the forward pass sets on the modules, and draws at random, is taken back."""
    import torch

    devices = {tensor.device for tensor in model.parameters() if tensor.is_cuda}
    modules = list(model.modules())
    saved = [(module, _snapshot(module.__dict__)) for module in modules]
    fast = torch.backends.mha.get_fastpath_enabled()
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=sorted(devices, key=str)), torch.no_grad():
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # one operation without a name for a whole encoder layer
            for module in modules:
                module.__dict__["training"] = False
            yield
        finally:
            for module, snapshot in saved:
                _restore(module.__dict__, snapshot)
            torch.backends.mha.set_fastpath_enabled(fast)
            random.setstate(python)
            np.random.set_state(numpy)


_Snapshot = list[tuple[str, Any, Any]]


def _snapshot(attributes: Mapping[str, Any]) -> _Snapshot:
    """What a module holds, and what is in its lists, sets and dictionaries."""
    return [
        (name, value, value.copy() if isinstance(value, (dict, list, set)) else None)
        for name, value in attributes.items()
    ]


def _restore(attributes: dict[str, Any], snapshot: _Snapshot) -> None:
    attributes.clear()
    for name, value, content in snapshot:
        if content is not None and not _holds(value, content):
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)
        attributes[name] = value


def _holds(value: Any, content: Any) -> bool:
    """Whether a container still holds the very objects that it held. Compares no tensors."""
    if len(value) != len(content):
        return False
    if isinstance(value, dict):
        pairs: Iterable[tuple[Any, Any]] = zip(value.items(), content.items(), strict=True)
        return all(a[0] is b[0] and a[1] is b[1] for a, b in pairs)
    if isinstance(value, set):
        return {id(one) for one in value} == {id(one) for one in content}
    return all(a is b for a, b in zip(value, content, strict=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without all that torch warns of, logs and prints where it cannot trace: the error that it raises says enough."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _tensors(model: nn.Module, example: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example as tensors on the model's device; arrays of real numbers in the model's own precision."""
    import torch
    from torch.utils import _pytree as pytree

    held = [*model.parameters(), *model.buffers()]
    device = held[0].device if held else torch.device("cpu")
    real = next((tensor.dtype for tensor in held if tensor.is_floating_point()), torch.get_default_dtype())

    def convert(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            tensor = torch.from_numpy(np.array(value))
            return tensor.to(device, real if tensor.is_floating_point() else None)
        return value.to(device) if isinstance(value, torch.Tensor) else value

    args, kwargs = pytree.tree_map(convert, (tuple(example.args), dict(example.kwargs)))
    return args, kwargs


# ---------------------------------------------------------------------------------------------------------------------
# Tracing


def _unwrap(model: nn.Module) -> nn.Module:
    from qvis.adapters.torch import _unwrap

    return _unwrap(model)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], strict: bool, network: Network) -> Traced:
    import torch

    model = _unwrap(model)
    traced = _from_export(torch.export.export(model, args, kwargs, strict=strict), network)
    traced.modules = {plain(path): one for path, one in model.named_modules(remove_duplicate=False)}
    return traced


def _from_export(program: Any, network: Network) -> Traced:
    from torch.utils import _pytree as pytree

    signature = program.graph_signature
    held = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    returned = [spec.arg for spec in signature.output_specs if spec.kind.name == "USER_OUTPUT"]

    def outputs(result: Any) -> Iterator[tuple[str, fx.Node]]:
        nodes = {getattr(node, "name", None): node for node in result}
        flat = [nodes.get(getattr(one, "name", None)) for one in returned]
        try:
            structure = pytree.tree_unflatten(flat, program.call_spec.out_spec)
            yield from name_outputs(structure)
        except (TypeError, ValueError, AttributeError):  # a class of one's own that checks what it is made of
            yield from name_outputs(flat)

    return Traced(
        graph=program.graph,
        tensors=_by_path({**program.constants, **program.state_dict}),
        network=network,
        source="torch.export",
        held=held,
        inputs=frozenset(name for name in signature.user_inputs if isinstance(name, str)),
        outputs=outputs,
    )


def _from_graph(model: fx.GraphModule, network: Network) -> Traced:
    return Traced(
        graph=model.graph,
        tensors=_by_path(dict(_held_by(model))),
        network=network,
        source="torch.fx",
        modules=dict(model.named_modules(remove_duplicate=False)),
    )


def _held_by(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _by_path(held: Mapping[str, Any]) -> dict[str, Tensor]:
    import torch

    return {plain(path): tensor for path, tensor in held.items() if isinstance(tensor, torch.Tensor)}


def _symbolic(model: nn.Module, example: Batch | None, network: Network) -> Traced:
    """Traced by calling the module with stand-ins. Arguments that the example leaves out keep their defaults."""
    from torch import fx

    model = _unwrap(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    known = {id(module) for module in modules.values()}

    class Proxy(fx.Proxy):
        """A stand-in that also notes down what is done to it in place; by itself, ``x += 1`` makes a new value."""

        def __setitem__(self, index: Any, value: Any) -> None:
            self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def noting(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})

    for function in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
        setattr(Proxy, f"__{function.__name__}__", noting(function))

    class Tracer(fx.Tracer):
        proxy_buffer_attributes = True  # so that what is done in place to a buffer is only noted down

        def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:  # noqa: ARG002
            return _is_leaf(module)

        def proxy(self, node: fx.Node) -> fx.Proxy:
            return Proxy(node, self)

        def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if id(m) in known:
                return super().call_module(m, forward, args, kwargs)
            return forward(*args, **kwargs)  # made on the spot, as by nn.ReLU()(x)

    if _is_leaf(model):
        traced = fx.Graph()
        called = traced.create_node("call_module", "", (traced.placeholder("input"),))
        traced.output(called)
        return Traced(traced, _by_path(dict(_held_by(model))), network, "torch.fx", modules=modules)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(type(model).forward).parameters.items()
        if parameter.default is not parameter.empty
    }
    given: dict[str, Any] = {}
    if example is not None:
        with suppress(TypeError):
            given = inspect.signature(model.forward).bind(*example.args, **example.kwargs).arguments
    constant = {name: value for name, value in defaults.items() if name not in given}
    traced = Tracer().trace(model, concrete_args=constant)
    names = [node.name for node in traced.nodes if node.op == "placeholder"]
    return Traced(
        graph=traced,
        tensors=_by_path(dict(_held_by(model))),
        network=network,
        source="torch.fx",
        inputs=frozenset(name for name in names if name.rstrip("_0123456789") not in constant and name not in constant),
        modules=modules,
    )


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module does what one of torch does, so that it need not be looked into."""
    from torch import nn

    return bool(type_of(type(module))) and not isinstance(module, nn.Sequential)
