"""Inputs made up for a PyTorch model where no data is at hand: noise, shaped until normalizations see what they expect.

A BatchNorm remembers the mean and the deviation of what it saw in training. Inputs for which each of them sees that
again resemble the training data in what matters to rounding (Haroush et al., The Knowledge Within, arXiv 1912.01274;
Cai et al., ZeroQ, arXiv 2001.00281, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch.overrides import TorchFunctionMode

from qvis.running import Batch

if TYPE_CHECKING:
    from torch import Tensor

STEPS = 20
RATE = 0.1
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
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]  # in a program it is followed by the overload's
        if name == "_set_grad_enabled":
            return None
        if name == "batch_norm" and not callable(args[0]):
            given = dict(zip(("input", "running_mean", "running_var"), args, strict=False)) | kwargs
            if given.get("running_mean") is not None and given.get("running_var") is not None:
                self.misfit.append(_misfit(given["input"], given["running_mean"], given["running_var"]))
        if name == "embedding" and len(args) > 1:
            self.tables[args[0].data_ptr()] = args[1].shape[0]
        return func(*args, **kwargs)


def _misfit(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """How far the statistics of ``x`` are from the expected ones, in units of the expected deviation."""
    axes = [axis for axis in range(x.ndim) if axis != 1]
    deviation = variance.clamp_min(1e-10).sqrt()
    off = ((x.mean(axes) - mean) / deviation).square() + (x.std(axes, correction=0) / deviation - 1).square()
    # a dead channel has hardly any deviation to be measured in
    return off.clamp_max(100).mean()


def imitate(
    call: Callable[[Batch, Any], Any], example: Batch, samples: int, seed: int
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

    Returns
    -------
    list of Batch, str
        The inputs, and how they were made.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    seen = _Norms()
    first_try = _mapped(example, lambda x: _plain(x, x.shape[:1], generator, {}))
    call(first_try, seen)
    places = {index: x.data_ptr() for index, x in enumerate(_leaves(first_try))}
    tables = {index: seen.tables[place] for index, place in places.items() if place in seen.tables}
    batches = []
    for first in range(0, samples, TOGETHER):
        size = min(TOGETHER, samples - first)
        batches.append(_shaped(call, example, size, generator, tables, bool(seen.misfit)))
    how = f"noise, shaped in {STEPS} steps to the statistics of {len(seen.misfit)} normalizations"
    return batches, how if seen.misfit else "noise, since the model has no normalization that remembers its data"


def _shaped(
    call: Callable[[Batch, Any], Any],
    example: Batch,
    size: int,
    generator: Any,
    tables: Mapping[int, int],
    has_norms: bool,
) -> Batch:
    import torch

    made = [_plain(x, (size,), generator, tables, index) for index, x in enumerate(_leaves(example))]
    iterator = iter(made)
    batch = _mapped(example, lambda _: next(iterator), size)
    real = [x for x in made if x.is_floating_point()]
    if not (has_norms and real):
        return batch
    with torch.enable_grad():
        for x in real:
            x.requires_grad_()
        optimizer = torch.optim.Adam(real, lr=RATE)
        for _ in range(STEPS):
            mode = _Norms()
            call(batch, mode)
            if not mode.misfit:
                break
            loss = torch.stack(mode.misfit).mean()
            for x, gradient in zip(real, torch.autograd.grad(loss, real, allow_unused=True), strict=True):
                x.grad = torch.zeros_like(x) if gradient is None else gradient
            optimizer.step()
    for x in real:
        x.grad = None
        x.requires_grad_(False)
    return batch


def _plain(x: Any, leading: Any, generator: Any, tables: Mapping[int, int], index: int = -1) -> Tensor:
    """Noise of the shape and type of ``x``; numbers of rows where rows of a table are chosen, else ones."""
    import torch

    like = torch.as_tensor(x)
    shape = (*leading, *like.shape[1:])
    if like.is_floating_point():
        return torch.randn(shape, generator=generator)
    if like.dtype == torch.bool:
        return torch.ones(shape, dtype=like.dtype)
    if index in tables:
        return torch.randint(0, tables[index], shape, generator=generator).to(like.dtype)
    return torch.ones(shape, dtype=like.dtype)


def _leaves(batch: Batch) -> list[Any]:
    found: list[Any] = []
    _mapped(batch, lambda x: (found.append(x), x)[1])  # type: ignore[func-returns-value]
    return found


def _mapped(batch: Batch, change: Callable[[Any], Any], size: int | None = None) -> Batch:
    """The batch with each array or tensor in it changed."""

    def visit(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: visit(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(visit(item) for item in value)
        return change(value) if hasattr(value, "shape") and len(value.shape) > 0 else value

    return Batch(visit(batch.args), visit(dict(batch.kwargs)), None, batch.size if size is None else size)
