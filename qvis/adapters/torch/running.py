"""Runs a PyTorch module on other weights than its own, and differentiates it, as :mod:`qvis.running` describes.

The module is run as it is, by its own code, so that whatever Python it contains works. For the time of a run its
weights are exchanged, and everything is put back after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from qvis.adapters.torch.exchange import Belongings, Matrix, eagerly, settings_kept
from qvis.adapters.torch.losses import find_loss, losses_of
from qvis.adapters.torch.outputs import Cut, find_cut, outputs_of
from qvis.adapters.torch.tap import Tap
from qvis.data import split
from qvis.errors import BadArgumentError, NotRunnableError, QvisError
from qvis.layers import FloatArray, Network, Norm
from qvis.running import Batch, Gradient, Grid, Passage, Probe

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.overrides import TorchFunctionMode


class TorchRunner:
    """See :class:`qvis.running.Runner`."""

    differentiable = True

    def __init__(
        self,
        model: nn.Module,
        network: Network,
        loss: Callable[..., Any] | str | None = None,
        matrices: Iterable[Matrix] | None = None,
    ) -> None:
        import torch

        from qvis.adapters.torch import _unwrap

        self._model = _unwrap(model)
        self._loss = find_loss(loss)
        wanted = {layer.name for layer in network.layers}
        self._held = Belongings(self._model, wanted, matrices)
        self._leaves = self._held.leaves
        self.layers = tuple(layer.name for layer in network.layers if any(layer.name in x.parts for x in self._leaves))
        self.notes: list[str] = []
        missing = [layer.name for layer in network.layers if layer.name not in self.layers]
        if missing:
            self.notes.append(f"{', '.join(map(repr, missing))}: the weights are packed and cannot be replaced")
        self._norms: Mapping[str, Norm] = {}
        self._cut: Cut | None = None
        self._singly = False
        """Whether each sample has to be run alone."""
        self._saving = False
        """Whether what operations in place overwrite has to be saved for derivatives."""
        numbers = [*self._model.parameters(), *self._model.buffers()]
        self._device = numbers[0].device if numbers else torch.device("cpu")
        real = [one.dtype for one in numbers if one.is_floating_point()]
        self._type = torch.float64 if real[:1] == [torch.float64] else torch.float32
        recurrent = any(isinstance(module, torch.nn.RNNBase) for module in self._held.modules)
        self._without_cudnn = recurrent and self._device.type == "cuda"

    def place(self, weights: Mapping[str, FloatArray], norms: Mapping[str, Norm]) -> None:
        """See :meth:`qvis.running.Runner.place`."""
        for leaf in self._leaves:
            leaf.placed = None
            if any(name in weights for name in leaf.parts):
                leaf.placed = leaf.now(weights)
        self._norms = dict(norms)

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
        import torch

        self._prepare(batch)
        tensors = [leaf.now(weights or {}) for leaf in self._leaves]
        tried = others or {}
        changed = {name: leaf.now({name: tried[name]}) for leaf in self._leaves for name in leaf.parts if name in tried}
        tap = self._tap(tensors, grids=grids, watch=watch, others=changed)
        with torch.no_grad(), self._exchanged(tensors, tap):
            return [to_numpy(one) for one in self._outputs(batch, tap)]

    def differentiate(self, batch: Batch, probe: Probe) -> Iterator[Gradient]:
        """See :meth:`qvis.running.Runner.differentiate`."""
        self._prepare(batch)
        if not self.differentiable:
            raise NotRunnableError(f"model: {self.notes[-1]}")
        try:
            return iter(self._differentiate(batch, probe))
        except RuntimeError as error:
            if self._saving or "inplace operation" not in str(error):
                raise self._failure(error, "the derivatives", "") from error
        self._saving = True
        return iter(self._differentiate(batch, probe))

    def imitate(self, example: Batch, samples: int, seed: int = 0) -> tuple[list[Batch], str]:
        """See :meth:`qvis.running.Runner.imitate`."""
        from qvis.adapters.torch.imitation import imitate

        own = [leaf.own for leaf in self._leaves]
        norms, self._norms = self._norms, {}

        def call(batch: Batch, mode: TorchFunctionMode) -> None:
            tap = Tap(self._leaves, own, protected=self._held.memory)
            with self._exchanged(own, tap), mode:
                self._call(batch, tap, constant=False)

        try:
            return imitate(call, example, samples, seed, self._device)
        finally:
            self._norms = norms

    # -----------------------------------------------------------------------------------------------------------------

    def _tap(self, tensors: list[Tensor], **wishes: Any) -> Tap:
        cut = self._cut
        if cut is not None:
            wishes.update(at=cut.at, follow=cut.before_selection)
        return Tap(self._leaves, tensors, protected=self._held.memory, **wishes)

    def _prepare(self, batch: Batch) -> None:
        """Find in a first run where outputs end that can be differentiated, and how the model has to be run."""
        if self._cut is not None:
            return
        one = split(batch, 1)[0] if batch.size > 1 else batch
        try:
            singly, cut, result = self._try(batch)
        except BadArgumentError as failure:
            if batch.size == 1:
                raise
            try:
                singly, cut, result = True, *self._try(one)[1:]
            except BadArgumentError:
                raise failure from None
            self.notes.append("samples are run one by one, since the model takes no more")
        else:
            if self._loss is not None:
                # where a loss is one number for all samples, it is taken of each
                losses = losses_of(self._loss, result, self._labels(batch), batch.size)
                singly, cut = losses.ndim == 0, Cut(())
            elif singly and batch.size > 1:
                cut = self._try(one)[1]
        self._singly, self._cut = singly, cut
        self.notes += cut.notes

    def _try(self, batch: Batch) -> tuple[bool, Cut, Any]:
        """Run once. Whether each sample has to be run alone, where the outputs end, and what is returned."""
        import torch

        tensors = [leaf.now().detach().requires_grad_() for leaf in self._leaves]
        tap = self._tap(tensors, follow=True)
        try:
            with torch.enable_grad(), self._exchanged(tensors, tap):
                result = self._call(batch, tap)
        except BadArgumentError as failure:
            # some operations in place are forbidden to what is to be differentiated
            plain = self._tap(tensors)
            with torch.no_grad(), self._exchanged(tensors, plain):
                result = self._call(batch, plain)
            self._cannot(f"it cannot be differentiated: {str(failure).removeprefix('inputs: ').partition('; they')[0]}")
        real = [(path, one) for path, one in outputs_of(result) if one.is_floating_point()]
        if any(one.is_inference() for _, one in real):
            self._cannot("it runs under torch.inference_mode, where nothing can be differentiated; use torch.no_grad")
        if not self.differentiable:
            return isinstance(result, list), Cut(tuple(path for path, _ in real)), result
        assert tap.follower is not None
        cut = find_cut(tap.follower, result, batch.size)
        self._check_used(tap)
        listed = isinstance(result, list) and len(result) == batch.size
        return listed or cut.before_selection, cut, result

    def _cannot(self, why: str) -> None:
        self.differentiable = False
        self.notes.append(why)

    def _check_used(self, tap: Tap) -> None:
        assert tap.follower is not None
        idle = [name for leaf in self._leaves for name in leaf.parts if id(leaf) not in tap.used]
        note = f"{', '.join(map(repr, idle))}: takes no part in the outputs" if idle else ""
        if note and note not in self.notes:
            self.notes.append(note)

    def _differentiate(self, batch: Batch, probe: Probe) -> list[Gradient]:
        import torch

        tensors = [leaf.now().detach().requires_grad_() for leaf in self._leaves]
        tap = self._tap(tensors, differentiate=True)
        saving = torch.autograd.graph.allow_mutation_on_saved_tensors() if self._saving else nullcontext()
        with torch.enable_grad(), self._exchanged(tensors, tap), saving:
            outputs = self._outputs(batch, tap)
            alive = [(one, v) for one, v in zip(outputs, probe([to_numpy(x) for x in outputs]), strict=True)]
            alive = [(one, v) for one, v in alive if one.requires_grad]
            if not alive:
                raise NotRunnableError(
                    "model: no output depends on a weight by way of differentiable operations; give a module that "
                    "returns what comes before"
                )
            used = [x for calls in tap.entered.values() for x, _ in calls]
            found = torch.autograd.grad(
                [one for one, _ in alive],
                [*tensors, *used],
                [torch.as_tensor(v, dtype=one.dtype, device=one.device) for one, v in alive],
                allow_unused=True,
            )
        by_input = dict(zip(map(id, used), found[len(tensors) :], strict=True))
        gradients = []
        for leaf, tensor, gradient in zip(self._leaves, tensors, found, strict=False):
            gradient = torch.zeros_like(tensor) if gradient is None else gradient
            for name, part in leaf.parts.items():
                calls = [(x, by_input[id(x)], axis) for x, axis in tap.entered.get(name, ())]
                pairs = tuple((to_numpy(x), to_numpy(g)) for x, g, _ in calls if g is not None)
                axis = calls[0][2] if calls else -1
                gradients.append(Gradient(name, to_numpy(part.view(gradient)), pairs, axis))
        return gradients

    def _outputs(self, batch: Batch, tap: Tap) -> list[Tensor]:
        """Run the model; its outputs, or the loss."""
        if self._singly and batch.size > 1:
            parts = [self._outputs(one, tap) for one in split(batch, 1)]
            return [_joined(same) for same in zip(*parts, strict=True)]
        tap.begin()
        result = self._call(batch, tap)
        if self._loss is not None:
            losses = losses_of(self._loss, result, self._labels(batch), batch.size)
            if losses.ndim == 0 and batch.size > 1:
                raise BadArgumentError("loss: got one number for several samples, expected one for each")
            return [losses.reshape(batch.size)]
        assert self._cut is not None
        return self._cut.choose(result, tap.caught, tap.follower)

    def _labels(self, batch: Batch) -> Any:
        return None if batch.labels is None else self._moved(batch.labels)

    def _call(self, batch: Batch, tap: Tap, constant: bool = True) -> Any:
        """Run the model; with ``constant`` no derivative by the inputs is wanted."""
        args, kwargs = (self._moved(x, constant) for x in (batch.args, dict(batch.kwargs)))
        try:
            with tap:
                return _inner(self._model)(*args, **kwargs)
        except (QvisError, KeyboardInterrupt):
            raise
        except Exception as error:
            raise self._failure(error, "the model", tap.last, batch) from error

    def _failure(self, error: Exception, what: str, operation: str, batch: Batch | None = None) -> BadArgumentError:
        text = (str(error).strip().splitlines() or [""])[0][:300]
        at = f" at {operation}" if operation else ""
        if batch is None:
            return BadArgumentError(f"model: {what} failed with {type(error).__name__}: {text}")
        given = _describe(batch)
        hint = "; images of type uint8 have to be turned into float32 and scaled first" if "uint8" in given else ""
        return BadArgumentError(
            f"inputs: {what} failed on them{at} with {type(error).__name__}: {text}; they were {given}{hint}"
        )

    @contextmanager
    def _exchanged(self, tensors: list[Tensor], tap: Tap) -> Iterator[None]:
        """The model in evaluation mode, with other numbers in it, and everything put back in the end."""
        import torch

        cudnn = torch.backends.cudnn.flags(enabled=False) if self._without_cudnn else nullcontext()
        with settings_kept(self._device), self._held.kept(), eagerly(), cudnn:
            try:
                self._held.exchange(tensors, self._norms)
                yield
            finally:
                tap.put_back()

    def _moved(self, value: Any, constant: bool = True) -> Any:
        """Arrays and tensors in a nest of containers as tensors on the device, real ones of the model's type."""
        import numpy as np
        import torch

        if isinstance(value, Mapping):
            return {name: self._moved(item, constant) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            moved = [self._moved(item, constant) for item in value]
            return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
        if not isinstance(value, torch.Tensor):
            if not hasattr(value, "__array__"):
                return value
            array = np.array(value)
            if array.dtype.kind not in "biufc":
                return value
            value = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
        kind = self._type if value.is_floating_point() else value.dtype
        if not (constant or value.requires_grad):
            return value.to(self._device, kind)
        # the model may write to what it is given
        return (value.detach() if constant else value).to(self._device, kind, copy=True)


def _joined(samples: tuple[Tensor, ...]) -> Tensor:
    """The outputs of samples that were run one by one."""
    import torch

    if all(one.shape == samples[0].shape for one in samples):
        return torch.cat(samples) if samples[0].shape[:1] == (1,) else torch.stack(samples)
    return torch.cat([one.flatten() for one in samples])


def _inner(model: nn.Module) -> nn.Module:
    """What does the work in a module that spreads it over devices."""
    from torch import nn

    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, wrappers):
        model = model.module
    return model


def _describe(batch: Batch) -> str:
    """The shapes and types of the inputs, for an error message."""
    flat: list[str] = []

    def visit(value: Any, name: str) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                visit(item, f"{name}{key}=")
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item, name)
        else:
            shape = "x".join(map(str, getattr(value, "shape", ())))
            flat.append(f"{name}{shape} {str(getattr(value, 'dtype', type(value).__name__)).removeprefix('torch.')}")

    visit(batch.args, "")
    visit(batch.kwargs, "")
    return ", ".join(flat) or "none"


def to_numpy(tensor: Tensor) -> FloatArray:
    """The numbers of a tensor, float64 as it is and all others as float32."""
    import torch

    tensor = tensor.detach().resolve_conj().resolve_neg()
    tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    return tensor.cpu().numpy()
