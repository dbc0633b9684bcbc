"""Image classifiers for telephones: few weights, and activations that are made for integers or against them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.architectures.classifiers import DropPath, Gate, Head
from tests.convnets import unit


class MobileNetV1(nn.Sequential):
    """Each channel for itself, then all of one place (Howard et al., arXiv 1704.04861)."""

    def __init__(self) -> None:
        layers = [unit(3, 8, stride=2)]
        for inputs, outputs, stride in ((8, 12, 1), (12, 16, 2), (16, 16, 1)):
            layers += [unit(inputs, inputs, 3, groups=inputs, stride=stride), unit(inputs, outputs, 1)]
        super().__init__(*layers, Head(16))


class Inverted(nn.Module):
    """Wide inside, narrow outside (Sandler et al., arXiv 1801.04381); with a gate, MobileNetV3's or EfficientNet's."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int = 1,
        act: type[nn.Module] = nn.ReLU6,
        gate: nn.Module | None = None,
        expansion: int = 3,
    ) -> None:
        super().__init__()
        wide = expansion * inputs
        self.expand = unit(inputs, wide, 1, act) if expansion > 1 else nn.Identity()
        self.depthwise = unit(wide, wide, 3, act, groups=wide, stride=stride)
        self.gate = nn.Identity() if gate is None else gate
        self.project = unit(wide, outputs, 1, None)
        self.drop = DropPath()
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.gate(self.depthwise(self.expand(x))))
        return x + self.drop(out) if self.shortcut else out


class MobileNetV2(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            unit(3, 8, act=nn.ReLU6, stride=2), Inverted(8, 6, expansion=1), Inverted(6, 8, 2), Inverted(8, 8),
            Inverted(8, 8), unit(8, 20, 1, nn.ReLU6), Head(20, 0.2),
        )  # fmt: skip


class MobileNetV3(nn.Sequential):
    """With hard swish, and gates that are hard too (Howard et al., arXiv 1905.02244)."""

    def __init__(self) -> None:
        gates = [Gate(wide, 4, nn.ReLU(), nn.Hardsigmoid()) for wide in (24, 24)]
        super().__init__(
            unit(3, 8, act=nn.Hardswish, stride=2), Inverted(8, 8, act=nn.ReLU),
            Inverted(8, 8, act=nn.ReLU, gate=gates[0]), Inverted(8, 8, 2, nn.Hardswish, gates[1]),
            unit(8, 16, 1, nn.Hardswish), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 12), nn.Hardswish(),
            nn.Linear(12, 5),
        )  # fmt: skip


class EfficientNet(nn.Sequential):
    """SiLU and gates (Tan and Le, arXiv 1905.11946)."""

    def __init__(self) -> None:
        gates = [Gate(wide, 3, nn.SiLU(), nn.Sigmoid()) for wide in (8, 18, 24)]
        super().__init__(
            unit(3, 8, act=nn.SiLU, stride=2), Inverted(8, 6, 1, nn.SiLU, gates[0], 1),
            Inverted(6, 8, 2, nn.SiLU, gates[1]), Inverted(8, 8, 1, nn.SiLU, gates[2]), unit(8, 16, 1, nn.SiLU),
            Head(16),
        )  # fmt: skip


class EfficientNetLite(nn.Sequential):
    """The same without gates and with ReLU6, for integers."""

    def __init__(self) -> None:
        super().__init__(
            unit(3, 8, act=nn.ReLU6, stride=2), Inverted(8, 6, expansion=1), Inverted(6, 8, 2), Inverted(8, 8),
            unit(8, 16, 1, nn.ReLU6), Head(16),
        )  # fmt: skip


class Fire(nn.Module):
    """A narrow layer, and two beside one another (Iandola et al., arXiv 1602.07360)."""

    def __init__(self, inputs: int, squeezed: int, outputs: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.expand1, self.expand3 = nn.Conv2d(squeezed, outputs, 1), nn.Conv2d(squeezed, outputs, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.squeeze(x))
        return torch.cat([self.act(self.expand1(x)), self.act(self.expand3(x))], 1)


class SqueezeNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(8, 4, 6), Fire(12, 4, 6),
            nn.Dropout(), nn.Conv2d(12, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip


class Shuffled(nn.Module):
    """Half of the channels go through, and both halves are mixed (Ma et al., arXiv 1807.11164)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        half = outputs // 2
        start = inputs if stride > 1 else half
        self.one = None
        if stride > 1:
            self.one = nn.Sequential(unit(inputs, inputs, 3, None, groups=inputs, stride=stride), unit(inputs, half, 1))
        self.other = nn.Sequential(
            unit(start, half, 1), unit(half, half, 3, None, groups=half, stride=stride), unit(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.one is None:
            left, right = x.chunk(2, dim=1)
            out = torch.cat((left, self.other(right)), dim=1)
        else:
            out = torch.cat((self.one(x), self.other(x)), dim=1)
        n, c, h, w = out.shape
        return out.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class ShuffleNetV2(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            unit(3, 8, stride=2), Shuffled(8, 12, 2), Shuffled(12, 12), Shuffled(12, 12), unit(12, 16, 1), Head(16)
        )
