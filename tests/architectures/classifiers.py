"""Image classifiers, (batch, 3, height, width) to (batch, classes): small, with the blocks of their papers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.convnets import unit


class Gate(nn.Module):
    """Squeeze and excite: a small network weighs the channels (Hu et al., arXiv 1709.01507)."""

    def __init__(self, channels: int, squeezed: int, act: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.act = nn.Conv2d(channels, squeezed, 1), act
        self.fc2, self.gate = nn.Conv2d(squeezed, channels, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(self.pool(x)))))


class DropPath(nn.Module):
    """Leaves whole branches out while training (Huang et al., arXiv 1603.09382)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand(len(x), 1, 1, 1) < 0.8
        return x * kept / 0.8


class Head(nn.Sequential):
    """A mean over all places, and one matrix."""

    def __init__(self, channels: int, dropout: float = 0.0) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels, 5))


# ---------------------------------------------------------------------------------------------------------------------
# ResNet and what came of it


class Basic(nn.Module):
    """Two convolutions and a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = unit(inputs, outputs, 1, None, stride=stride) if stride > 1 else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """Narrow, 3 x 3, wide; ``groups`` makes it ResNeXt's (Xie et al., arXiv 1611.05431)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1, gate: bool = False) -> None:
        super().__init__()
        width = outputs // 2 if groups > 1 else outputs // 4
        self.conv1, self.conv2 = unit(inputs, width, 1), unit(width, width, 3, stride=stride, groups=groups)
        self.gate = Gate(width, inputs // 4, nn.ReLU(), nn.Sigmoid()) if gate else nn.Identity()
        self.conv3 = unit(width, outputs, 1, None)
        same = inputs == outputs and stride == 1
        self.downsample = None if same else unit(inputs, outputs, 1, None, stride=stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.conv3(self.gate(self.conv2(self.conv1(x))))
        out += identity
        return self.relu(out)


class ResNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            unit(3, 8, 7, stride=2), nn.MaxPool2d(3, 2, 1),
            Basic(8, 8), Basic(8, 8), Basic(8, 12, 2), Basic(12, 12), Head(12),
        )  # fmt: skip


class Padded(Basic):
    """With a shortcut that has no numbers: every second place, and zeros for the channels that are new."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        more = out.shape[1] - x.shape[1]
        if more:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, more // 2, more // 2))
        return functional.relu(out + x)


class SmallResNet(nn.Sequential):
    """For small pictures, as in section 4.2 of the same paper."""

    def __init__(self) -> None:
        super().__init__(unit(3, 8), Padded(8, 8), Padded(8, 12, 2), Padded(12, 12), Padded(12, 16, 2), Head(16))
        self[2].shortcut = self[4].shortcut = nn.Identity()


class ResNetBottleneck(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            unit(3, 8), nn.MaxPool2d(2), Bottleneck(8, 16), Bottleneck(16, 16), Bottleneck(16, 24, 2), Head(24)
        )


class ResNeXt(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(unit(3, 8), Bottleneck(8, 16, groups=4), Bottleneck(16, 24, 2, groups=4), Head(24))


class RegNetY(nn.Sequential):
    """Groups of one width and gates (Radosavovic et al., arXiv 2003.13678)."""

    def __init__(self) -> None:
        super().__init__(
            unit(3, 8, stride=2),
            Bottleneck(8, 16, 2, groups=2, gate=True),
            Bottleneck(16, 16, groups=2, gate=True),
            Head(16),
        )


class PreActivated(nn.Module):
    """Normalization and activation first (He et al., arXiv 1603.05027)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(hidden)
        return self.conv2(functional.relu(self.bn2(self.conv1(hidden)))) + shortcut


class PreActivationResNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), PreActivated(8, 8), PreActivated(8, 12, 2), PreActivated(12, 12),
            nn.BatchNorm2d(12), nn.ReLU(), Head(12),
        )  # fmt: skip


class ConvNeXtBlock(nn.Module):
    """7 x 7 for each channel, then two matrices with channels last (Liu et al., arXiv 2201.03545)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.pwconv1, self.act = nn.Linear(channels, 4 * channels), nn.GELU()
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        hidden = self.gamma * self.pwconv2(self.act(self.pwconv1(hidden)))
        return x + hidden.permute(0, 3, 1, 2)


class LayerNorm2d(nn.LayerNorm):
    """Of images with channels first."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 4, 4), LayerNorm2d(6))
        self.stage1 = ConvNeXtBlock(6)
        self.downsample = nn.Sequential(LayerNorm2d(6), nn.Conv2d(6, 8, 2, 2))
        self.stage2 = nn.Sequential(ConvNeXtBlock(8), ConvNeXtBlock(8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.downsample(self.stage1(self.stem(x))))
        return self.head(self.norm(x.mean([-2, -1])))


# ---------------------------------------------------------------------------------------------------------------------
# Plain, dense and branched


class Vgg(nn.Module):
    """Convolutions, a flatten, and matrices (Simonyan and Zisserman, arXiv 1409.1556)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(unit(3, 6), unit(6, 6), nn.MaxPool2d(2), unit(6, 8), nn.MaxPool2d(2))
        self.classifier = nn.Sequential(
            nn.Linear(8 * 16, 12), nn.BatchNorm1d(12), nn.ReLU(True), nn.Dropout(), nn.Linear(12, 10), nn.ReLU(True),
            nn.Linear(10, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class DenseLayer(nn.Module):
    """It takes all that was made before it (Huang et al., arXiv 1608.06993)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(functional.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(functional.relu(self.norm2(x)))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(unit(3, 8, stride=2), nn.MaxPool2d(2))
        self.layers = nn.ModuleList(DenseLayer(8 + 4 * i, 4) for i in range(3))
        self.transition = nn.Sequential(
            nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1, bias=False), nn.AvgPool2d(2)
        )
        self.last, self.norm, self.classifier = DenseLayer(10, 4), nn.BatchNorm2d(14), nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        x = self.transition(torch.cat(features, 1))
        x = functional.relu(self.norm(torch.cat([x, self.last([x])], 1)), inplace=True)
        return self.classifier(functional.adaptive_avg_pool2d(x, (1, 1)).flatten(1))


class Inception(nn.Module):
    """Four branches, concatenated (Szegedy et al., arXiv 1409.4842); some with their kernel in two parts."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch1 = unit(inputs, 4, 1)
        self.branch2 = nn.Sequential(unit(inputs, 3, 1), unit(3, 6))
        self.branch3 = nn.Sequential(
            nn.Conv2d(inputs, 3, 1), nn.ReLU(), nn.Conv2d(3, 4, (1, 3), padding=(0, 1)),
            nn.Conv2d(4, 4, (3, 1), padding=(1, 0)), nn.ReLU(),
        )  # fmt: skip
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), unit(inputs, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class GoogLeNet(nn.Module):
    """Two of them, and a classifier between that only counts while training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 8, stride=2)
        self.one, self.two = Inception(8), Inception(16)
        self.auxiliary = Head(16)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        middle = self.one(self.stem(x))
        result = self.head(self.two(functional.avg_pool2d(middle, 2)))
        return (result, self.auxiliary(middle)) if self.training else result
