"""A Linear that multiplies what enters it. Loaded only where torch is; models that hold one can be pickled."""

# no deferred annotations: torch.jit.script evaluates them as they stand

from torch import Tensor, nn
from torch.nn import functional

from qvis.adapters.torch.tensors import SCALE


class ScaledLinear(nn.Linear):
    """``nn.Linear`` of its input times the buffer ``input_scale``, (in_features,).

    It is made of an ``nn.Linear`` that is there, by :func:`scale_inputs`, so that parameters, hooks and flags stay. Its
    state dict has the one key ``input_scale`` more. A tool that puts a module of its own in its place, rather than
    exchanging its weight, has to take the buffer over.
    """

    input_scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """``(..., in_features) -> (..., out_features)``."""
        return functional.linear(input * self.input_scale, self.weight, self.bias)


def scale_inputs(module: nn.Linear, factors: Tensor) -> None:
    """Multiply what enters a Linear by ``factors``, (in_features,)."""
    if isinstance(module, ScaledLinear):
        module.input_scale = factors
        return
    object.__setattr__(module, "__class__", ScaledLinear)
    module.register_buffer(SCALE, factors)
