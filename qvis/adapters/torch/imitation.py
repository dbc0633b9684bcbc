"""Inputs made up for a PyTorch model where no data is at hand: noise, shaped until normalizations see what they expect.

A BatchNorm remembers the mean and the deviation of what it saw in training. Inputs for which each of them sees that
again resemble the training data in what matters to rounding (Haroush et al., The Knowledge Within, arXiv 1912.01274;
Cai et al., ZeroQ, arXiv 2001.00281, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.overrides import TorchFunctionMode

from qvis.adapters.torch.exchange import memory_of
from qvis.errors import BadArgumentError
from qvis.running import Batch

if TYPE_CHECKING:
    from torch import Tensor

STEPS = 40
"""Of L-BFGS, which costs about as many backward passes."""
TOGETHER = 16
"""Samples in a batch: enough for a mean."""


class _Norms(TorchFunctionMode):
    """Sees what enters the normalizations, and the tables that rows are taken from."""

    def __init__(self) -> None:
        super().__init__()
        self.misfit: list[Tensor] = []
        self.tables: dict[int, int] = {}
        """The length of the table that an input chooses from, by the memory of the input."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.nn import functional

        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]  # in a program it is followed by the overload's
        if name == "_set_grad_enabled" and not args[0]:
            return None
        if name in ("batch_norm", "_native_batch_norm_legit_no_training"):
            order: tuple[str, ...] = ("input", "running_mean", "running_var")
            if func is not functional.batch_norm:
                order = ("input", "weight", "bias", "running_mean", "running_var")
            given = dict(zip(order, args, strict=False)) | kwargs
            if given.get("running_mean") is not None and given.get("running_var") is not None:
                self.misfit.append(_misfit(given["input"], given["running_mean"], given["running_var"]))
        if name in ("embedding", "embedding_bag") and len(args) > 1:
            rows, table = sorted(args[:2], key=lambda one: one.is_floating_point())  # ATen has the table first
            self.tables[memory_of(rows)] = table.shape[0]
        return func(*args, **kwargs)


def _misfit(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """How far the statistics of ``x`` are from the expected ones, in units of the expected deviation."""
    axes = [axis for axis in range(x.ndim) if axis != 1]
    deviation = variance.clamp_min(1e-10).sqrt()
    off = ((x.mean(axes) - mean) / deviation).square() + (x.std(axes, correction=0) / deviation - 1).square()
    # a dead channel has hardly any deviation to be measured in
    return off.clamp_max(100).mean()


class Recipe(NamedTuple):
    """What inputs are made by."""

    call: Callable[[Batch, Any], Any]
    """Runs the model on a batch, seen by a mode."""
    example: Batch
    device: Any
    generator: Any
    tables: Mapping[int, int]
    """The length of the table that an integer input chooses from, by its place among the inputs."""

    def plain(self, size: int) -> Batch:
        """Noise in the shapes and types of the example."""
        made = iter([self._noise(x, size, index) for index, x in enumerate(_leaves(self.example))])
        return _mapped(self.example, lambda _: next(made), size)

    def _noise(self, x: Any, size: int, index: int) -> Tensor:
        """Noise for one input; numbers of rows where rows of a table are chosen, bytes of images, else ones."""
        import torch

        like = torch.as_tensor(x)
        shape = (size, *like.shape[1:]) if like.shape[0] == self.example.size else like.shape
        if like.is_floating_point():
            made = torch.randn(shape, generator=self.generator)
            return made.to(self.device, torch.float64 if like.dtype == torch.float64 else torch.float32)
        ends = {torch.uint8: 256}.get(like.dtype)
        ends = self.tables.get(index, ends)
        if ends is None or like.dtype == torch.bool:
            return torch.ones(shape, dtype=like.dtype, device=self.device)
        return torch.randint(0, ends, shape, generator=self.generator).to(self.device, like.dtype)


def imitate(
    call: Callable[[Batch, Any], Any], example: Batch, samples: int, seed: int, device: Any
) -> tuple[list[Batch], str]:
    """Make up inputs of the shapes and types of ``example``.

    Parameters
    ----------
    call
        Runs the model on a batch, seen by a mode.
    example
        Only the shapes after the first axis, and the types, are used.
    samples
        How many to make.
    seed
        Of the noise.
    device
        Where to make them.

    Returns
    -------
    list of Batch, str
        The inputs, and how they were made.
    """
    import torch

    recipe = Recipe(call, example, device, torch.Generator().manual_seed(seed), {})
    first = recipe.plain(example.size)
    seen = _Norms()
    call(first, seen)
    places = {index: memory_of(x) for index, x in enumerate(_leaves(first))}
    recipe = recipe._replace(tables={i: seen.tables[place] for i, place in places.items() if place in seen.tables})
    together = min(TOGETHER, samples)
    try:
        call(recipe.plain(together), _Norms())
    except BadArgumentError:
        together = example.size  # some models take no other number
    batches, shaped = [], bool(seen.misfit)
    for start in range(0, samples, together):
        batch = recipe.plain(min(together, samples - start))
        shaped = shaped and _shape(batch, call)
        batches.append(batch)
    if shaped:
        return batches, f"noise, shaped in up to {STEPS} steps to the statistics of {len(seen.misfit)} normalizations"
    if seen.misfit:
        return batches, "noise, since the model cannot be differentiated by its inputs"
    return batches, "noise, since the model has no normalization that remembers its data"


def _shape(batch: Batch, call: Callable[[Batch, Any], Any]) -> bool:
    """Change the real inputs until each normalization sees what it expects. Whether that could be done."""
    import torch

    real = [x for x in _leaves(batch) if x.is_floating_point()]
    if not real:
        return False
    kept = [x.clone() for x in real]
    done = True

    def improve() -> Tensor:
        mode = _Norms()
        call(batch, mode)
        loss = torch.stack(mode.misfit).mean()
        gradients = torch.autograd.grad(loss, real, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise RuntimeError("the normalizations do not depend on the inputs")
        for x, gradient in zip(real, gradients, strict=True):
            x.grad = torch.zeros_like(x) if gradient is None else gradient
        return loss.detach()

    with torch.enable_grad():
        for x in real:
            x.requires_grad_()
        optimizer = torch.optim.LBFGS(real, max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe")
        try:
            optimizer.step(improve)  # type: ignore[no-untyped-call]
        except (BadArgumentError, RuntimeError):  # what is written in place, or made without derivatives
            done = False
    with torch.no_grad():
        for x, before in zip(real, kept, strict=True):
            x.grad = None
            x.requires_grad_(False)
            if not done or not x.isfinite().all():
                x.copy_(before)
    return done


def _leaves(batch: Batch) -> list[Any]:
    """The arrays or tensors in a batch, in order."""
    found: list[Any] = []

    def visit(x: Any) -> Any:
        found.append(x)
        return x

    _mapped(batch, visit)
    return found


def _mapped(batch: Batch, change: Callable[[Any], Any], size: int | None = None) -> Batch:
    """The batch with each array or tensor in it changed."""

    def visit(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: visit(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            changed = [visit(item) for item in value]
            return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
        return change(value) if hasattr(value, "shape") and len(value.shape) > 0 else value

    return Batch(visit(batch.args), visit(dict(batch.kwargs)), None, batch.size if size is None else size)
