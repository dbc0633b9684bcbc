"""What stands in a graph where numbers are rounded: it finds the grid, rounds to it, and learns its step in training.

The step is learned as in "Learned Step Size Quantization" (Esser et al., arXiv 1902.08153): rounding counts as the
identity, so that the derivative by the step is the rounding error inside the grid, and the end of the grid beyond it.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from qvis.quantization.grids import Scheme

if TYPE_CHECKING:
    from torch import Tensor

ACTIVATION_BITS = 8
SMALLEST = 2.0**-40
"""Of steps."""


class Roundings(NamedTuple):
    """The classes; they exist once torch is imported."""

    base: type[Any]
    weight: type[Any]
    activation: type[Any]


@cache
def roundings() -> Roundings:
    """The modules that torchao puts into a graph, and asks for the grid in the end."""
    import torch
    from torch import nn
    from torchao.quantization.pt2e import FakeQuantizeBase, HistogramObserver

    class Rounding(FakeQuantizeBase):  # type: ignore[misc, unused-ignore]
        """Numbers on a grid: :attr:`log_step` is the logarithm of the step, which keeps it positive."""

        def __init__(self, dtype: Any, quant_min: int, quant_max: int, qscheme: Any, **_: Any) -> None:
            super().__init__()
            self.dtype, self.qscheme = dtype, qscheme
            self.quant_min, self.quant_max = quant_min, quant_max
            self.is_dynamic = False
            self.log_step: nn.Parameter | None = None
            self.zero = 0

        def place(self, step: Tensor) -> None:
            step = torch.nan_to_num(step, nan=SMALLEST, posinf=1.0).clamp(min=SMALLEST)
            self.log_step = nn.Parameter(step.to(torch.float32).log())

        def rounded(self, values: Tensor, step: Tensor) -> Tensor:
            low, high = self.quant_min - self.zero, self.quant_max - self.zero
            exact = (values / step).clamp(low, high)
            return (exact + (exact.round() - exact).detach()) * step

        def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
            if self.log_step is None:  # nothing ever came by
                self.place(torch.ones(1))
            assert self.log_step is not None
            step = self.log_step.detach().exp()
            return step, torch.full(step.shape, self.zero, dtype=torch.int64)

    class PerChannelWeightRounding(Rounding):  # by this part of the name torchao knows that it takes ch_axis
        """A weight on a symmetric grid, by channels along ``ch_axis`` or as a whole.

        Below 8 bits the grid that leaves the least mean square error, else one that covers all.
        """

        def __init__(self, ch_axis: int | None = None, **settings: Any) -> None:
            super().__init__(**settings)
            self.ch_axis = ch_axis

        def forward(self, weight: Tensor) -> Tensor:
            if self.log_step is None:
                self.fit(weight.detach())
            assert self.log_step is not None
            step = self.log_step.exp()
            if self.ch_axis is not None:
                step = step.reshape([-1 if axis == self.ch_axis else 1 for axis in range(weight.ndim)])
            return self.rounded(weight, step)

        def fit(self, weight: Tensor) -> None:
            rows = weight.movedim(self.ch_axis or 0, 0).flatten(1)
            bits = (self.quant_max + 1).bit_length()
            granularity = "tensor" if self.ch_axis is None else "channel"
            scheme = Scheme("uniform", bits, granularity, range="minmax" if bits >= 8 else "mse")
            self.place(torch.from_numpy(scheme.fit(rows.float().numpy()).scale.copy()).flatten())

    class ActivationRounding(Rounding):
        """An activation on an asymmetric grid: hands it on while torchao's histogram is filled, and rounds it then."""

        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.observer: Any = HistogramObserver(
                dtype=self.dtype, quant_min=self.quant_min, quant_max=self.quant_max, qscheme=self.qscheme
            )

        def forward(self, values: Tensor) -> Tensor:
            if self.observer is not None:
                if values.numel():
                    self.observer(values.detach())
                return values
            if self.log_step is None:
                return values
            return self.rounded(values, self.log_step.exp())

        def settle(self) -> None:
            """From now on round, on the grid that suits what has been seen; or not at all where that was nothing."""
            observer, self.observer = self.observer, None
            if observer is not None and bool((observer.max_val >= observer.min_val).all()):
                step, zero = observer.calculate_qparams()
                self.zero = int(zero)
                self.place(step.reshape(1))

    return Roundings(Rounding, PerChannelWeightRounding, ActivationRounding)
