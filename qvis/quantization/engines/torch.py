"""PyTorch: modules as they are, exported programs, and quantized programs with the integer kernels of oneDNN."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qvis.adapters.torch.tensors import framework
from qvis.errors import NotRunnableError, UnsupportedModelError
from qvis.layers import FloatArray
from qvis.quantization.contents import Arithmetic, Contents
from qvis.quantization.engines import Engine, Looked
from qvis.quantization.engines.torch_lowering import NotLoweredError, lower
from qvis.running import Batch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

Node = Any
"""Of torch.fx; the arguments of its nodes could be anything."""


def open_engine(model: Any, threads: int = 1) -> Engine:
    """Open a module, an exported program or a ``.pt2`` file; see :func:`qvis.quantization.engines.open_engine`."""
    from qvis.adapters.torch import exported

    if isinstance(model, Path):
        if model.suffix.lower() != ".pt2":
            raise UnsupportedModelError(
                f"model: {model.name!r} holds numbers without what is computed with them; give the module that they "
                "were loaded into, or a .pt2 file"
            )
        return cast(Engine, ProgramEngine(exported.opened(model), threads))
    if exported._is_export(model):
        return cast(Engine, ProgramEngine(model, threads))
    return ModuleEngine(model, threads)


def inspect(path: Path) -> Contents:
    """What is in a ``.pt2`` or ``.safetensors`` file."""
    from qvis.quantization.engines.torch_contents import contents_of_program, contents_of_tensors

    return contents_of_tensors(path) if path.suffix.lower() == ".safetensors" else contents_of_program(path)


class ModuleEngine:
    """A module, run by its own code on its own device, in evaluation mode."""

    simulated = ""
    fixed_batch: int | None = None

    def __init__(self, model: nn.Module, threads: int = 1) -> None:
        from qvis.adapters.torch import _unwrap

        self.model = model
        self.threads = threads
        self._module = _evaluating(_unwrap(model))
        held = [*self._module.parameters(), *self._module.buffers()]
        import torch

        self._device = held[0].device if held else torch.device("cpu")
        real = [one.dtype for one in held if one.is_floating_point()]
        self._type = next(iter(real), torch.float32)
        if self._device.type == "meta":
            raise NotRunnableError("model: it has shapes but no numbers (meta device); load the weights first")
        where = f" on {torch.cuda.get_device_name(self._device)}" if self._device.type == "cuda" else ""
        kind = "" if self._type == torch.float32 else f", {str(self._type).removeprefix('torch.')}"
        self.name = f"{framework()}, eager{kind}{where}"

    def run(self, batch: Batch, /) -> list[FloatArray]:
        """See :class:`qvis.quantization.engines.Engine`."""
        from qvis.adapters.torch.outputs import outputs_of
        from qvis.adapters.torch.running import to_numpy

        with _threads(self.threads), _inference():
            result = _ran(self._module, *self._inputs(batch))
        return [to_numpy(one) for _, one in outputs_of(result) if one.is_floating_point()]

    def prepare(self, batch: Batch, /) -> Callable[[], object]:
        """See :class:`qvis.quantization.engines.Engine`."""
        args, kwargs = self._inputs(batch)
        return _once(self._module, args, kwargs, self.threads, self._device)

    def look(self, batch: Batch, /) -> Mapping[str, Looked]:
        """See :class:`qvis.quantization.engines.Engine`."""
        from qvis.adapters import read, runner
        from qvis.running import Passage

        network = read(self._module)
        ops = {layer.name: layer.op for layer in network.layers}
        found: dict[str, Looked] = {}

        def keep(passage: Passage) -> None:
            if passage.layer in ops:
                found.setdefault(passage.layer, Looked(passage.outputs, _axis(ops[passage.layer])))

        with _threads(self.threads):
            runner(self._module, network).run(batch, watch=keep)
        return found

    def _inputs(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        from torch.utils import _pytree as pytree

        from qvis.quantization.backends.pt2e_program import tensors_of

        def placed(one: Any) -> Any:
            if not hasattr(one, "is_floating_point"):
                return one
            return one.to(self._device, self._type if one.is_floating_point() else None)

        args, kwargs = pytree.tree_map(placed, tensors_of(batch))
        return args, kwargs


class ProgramEngine:
    """An exported program. Where layers have integers for weights and inputs, they are computed with by oneDNN.

    As a file has it, such a program turns integers into floats before each layer, and back after it: this is how
    :meth:`run` runs it. What is timed has been lowered to kernels that multiply the integers themselves, for one number
    of samples at a time.
    """

    def __init__(self, program: ExportedProgram, threads: int = 1) -> None:
        from qvis.adapters.torch.exported import _from_export
        from qvis.quantization.backends.pt2e_program import _fixed_batch
        from qvis.quantization.engines.torch_contents import KERNELS, _Reading

        self.program = program
        self.threads = threads
        self.fixed_batch = _fixed_batch(program)
        self._module: Any = program.module(check_guards=False)
        held = _from_export(program)
        self._reading = _Reading(held)
        self._operations = self._reading.operations()
        self._layers = [one for one in self._operations if one.arithmetic is Arithmetic.INTEGER and one.kind in KERNELS]
        self._lowered: dict[Any, Any] = {}

    @property
    def name(self) -> str:
        """See :class:`qvis.quantization.engines.Engine`."""
        hybrid = {one.kind for one in self._operations if one.arithmetic is Arithmetic.HYBRID}
        if "aten._int_mm" in hybrid:
            return f"{framework()}, eager, int8 products of inputs that are rounded at each call"
        if self._layers and not self.simulated:
            return f"{framework()}, int8 by oneDNN"
        what = ", float arithmetic on weights that are dequantized at each call"
        return f"{framework()}, eager{what if hybrid or self._layers else ''}"

    @cached_property
    def simulated(self) -> str:
        """See :class:`qvis.quantization.engines.Engine`."""
        if not self._layers:
            return ""
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return f"oneDNN's integer kernels are for x86 processors, and this one is {platform.machine()}"
        if self.program.example_inputs is None:
            return "the program has no example inputs to lower it for"
        args, kwargs = self.program.example_inputs
        try:
            self._lower(args, kwargs)
        except NotLoweredError as error:
            return str(error)
        return ""

    def run(self, batch: Batch, /) -> list[FloatArray]:
        """See :class:`qvis.quantization.engines.Engine`."""
        from qvis.adapters.torch.outputs import outputs_of
        from qvis.adapters.torch.running import to_numpy
        from qvis.quantization.backends.pt2e_program import tensors_of

        with _threads(self.threads), _inference():
            result = _ran(self._module, *tensors_of(batch))
        return [to_numpy(one) for _, one in outputs_of(result) if one.is_floating_point()]

    def prepare(self, batch: Batch, /) -> Callable[[], object]:
        """See :class:`qvis.quantization.engines.Engine`."""
        import torch

        from qvis.quantization.backends.pt2e_program import tensors_of

        args, kwargs = tensors_of(batch)
        if self._layers and not self.simulated:
            try:
                lowered = self._lower(args, kwargs)
            except NotLoweredError as error:
                raise NotRunnableError(f"model: {error}, with these inputs; give fewer or more samples") from error
            return _once(lowered, tuple(_leaves((args, kwargs))), {}, self.threads, torch.device("cpu"))
        return _once(self._module, args, kwargs, self.threads, torch.device("cpu"))

    def look(self, batch: Batch, /) -> Mapping[str, Looked]:
        """See :class:`qvis.quantization.engines.Engine`."""
        import torch
        from torch import fx

        from qvis.adapters.torch.running import to_numpy
        from qvis.quantization.backends.pt2e_program import tensors_of

        args, kwargs = tensors_of(batch)
        reading = self._reading
        used = {call.result: reading.layers(call) for call in reading.program.calls}
        layers = {reading.ends.get(value, value): names for value, names in used.items() if names}
        found: dict[str, Looked] = {}

        class Watching(fx.Interpreter):
            def run_node(self, node: Node) -> Any:
                result = super().run_node(node)
                names = layers.get(node.name, ())
                if names and names[0] not in found and isinstance(result, torch.Tensor):
                    axis = _axis("Conv" if "conv" in str(node.target) else "")
                    for name, part in zip(names, result.tensor_split(len(names), axis), strict=True):
                        found[name] = Looked(to_numpy(part).copy(), axis)
                return result

        with _threads(self.threads), _inference():
            if kwargs and self.program.example_inputs is not None:
                kwargs = {name: kwargs[name] for name in self.program.example_inputs[1] if name in kwargs}
            Watching(self._module).run(*_leaves((args, kwargs)), enable_io_processing=False)
        return found

    def _lower(self, args: Any, kwargs: Any) -> Any:
        """The program with integer kernels, for inputs of these shapes."""
        key = tuple((tuple(one.shape), str(one.dtype)) for one in _leaves((args, kwargs)) if hasattr(one, "shape"))
        if key not in self._lowered:
            self._lowered[key] = lower(self._module, args, kwargs, len(self._layers))
        return self._lowered[key]


def _axis(op: str) -> int:
    """The axis of the channels in what a layer puts out."""
    return 1 if op.startswith("Conv") else -1


def _leaves(value: Any) -> list[Any]:
    from torch.utils import _pytree as pytree

    return list(pytree.tree_leaves(value))


def _evaluating(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode that shares the numbers, since a second model may not fit beside the first."""
    from qvis.adapters.torch.copying import copied
    from qvis.quantization.backends.pt2e_program import quietly

    shared = {id(one): one for one in (*model.parameters(), *model.buffers())}
    with quietly():
        try:
            return copy.deepcopy(model, shared).eval()
        except Exception:  # whatever a class of the user's raises
            return copied(model)[0].eval()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if before != count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if before != count:
            torch.set_num_threads(before)


@contextmanager
def _inference() -> Iterator[None]:
    import torch

    from qvis.quantization.backends.pt2e_program import quietly

    with quietly(), torch.no_grad():
        yield


def _ran(module: Any, args: Any, kwargs: Any) -> Any:
    from qvis.quantization.backends.torch_training import _called

    return _called(module, args, kwargs)


def _once(module: Any, args: Any, kwargs: Any, threads: int, device: Any) -> Callable[[], Tensor]:
    import torch

    synchronize = torch.cuda.synchronize if device.type == "cuda" else None

    def call() -> Any:
        with _threads(threads), torch.inference_mode():
            result = module(*args, **kwargs)
            if synchronize is not None:
                synchronize(device)
        return result

    return call
