"""A Linear that multiplies integers. Loaded only where torch is."""

# no deferred annotations: torch.export evaluates them as they stand

import torch
from torch import Tensor, nn

_SMALLEST = torch.finfo(torch.float32).eps
"""Of a step."""


class IntegerLinear(nn.Module):
    """``nn.Linear`` with a weight of integers, which rounds each row that enters it by that row's own range.

    What it computes is what ``torchao.quantization.Int8Tensor`` does, in operations of PyTorch alone, so that a program
    made of it needs torchao neither to be loaded nor to be run.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight)  # (out_features, in_features), int8
        self.register_buffer("weight_scale", scale)  # (out_features,)
        self.register_buffer("bias", bias)
        self.levels = 2**bits

    def forward(self, input: Tensor) -> Tensor:
        """``(..., in_features) -> (..., out_features)``."""
        rows = input.float().reshape(-1, input.shape[-1])
        scale = (rows.abs().amax(dim=1, keepdim=True) / ((self.levels - 1) / 2)).clamp(min=_SMALLEST)
        codes = (rows / scale).round().clamp(-(self.levels // 2), self.levels // 2 - 1).to(torch.int8)
        sums = torch._int_mm(codes, self.weight.t()).float() * scale * self.weight_scale
        if self.bias is not None:
            sums = sums + self.bias
        output: Tensor = sums.to(input.dtype).reshape(*input.shape[:-1], -1)
        return output


def multiplies_exactly() -> bool:
    """Whether this processor's product of 8-bit integers is right for the largest of them.

    On x86 processors without VNNI, oneDNN adds two products in 16 bits, too few for large ones.
    """
    full = torch.full((8, 64), 127, dtype=torch.int8)
    return bool(torch._int_mm(full, full.t().contiguous())[0, 0] == 127 * 127 * 64)
