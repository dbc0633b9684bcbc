"""Convolutional networks of PyTorch: a narrow MobileNetV2, and the ResNet-56 for CIFAR-10."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10
BLOCKS = (
    # expansion, channels, how many, stride of the first (Sandler et al., arXiv 1801.04381, table 2, narrower)
    (1, 12, 1, 1),
    (4, 16, 2, 1),
    (4, 24, 3, 2),
    (4, 32, 4, 2),
    (4, 48, 3, 1),
    (4, 64, 3, 2),
    (4, 96, 1, 1),
)
HEAD = 256


class InvertedResidual(nn.Module):
    """Widen, filter each channel by itself, narrow; the input is added where the shape stays."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        inside = inputs * expansion
        self.expand = None if expansion == 1 else unit(inputs, inside, 1)
        self.depthwise = unit(inside, inside, 3, stride, groups=inside)
        self.project = unit(inside, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, height, width) to (batch, outputs, ...)."""
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y), inplace=True))
        return x + y if self.residual else y


class MobileNet(nn.Module):
    """A MobileNetV2 of 53 layers for pictures (batch, 3, 32, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 16, 3, 2)
        blocks, channels = [], 16
        for expansion, outputs, number, stride in BLOCKS:
            for index in range(number):
                blocks.append(InvertedResidual(channels, outputs, expansion, stride if index == 0 else 1))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = unit(channels, HEAD, 1)
        self.classifier = nn.Linear(HEAD, CLASSES)

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores (batch, 10)."""
        x = F.relu6(self.head(self.blocks(F.relu6(self.stem(pictures)))))
        scores: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return scores


def unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution and its normalization."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut without weights (He et al., arXiv 1512.03385, option A of section 3.3)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, height, width) to (batch, outputs, ...)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            missing = y.shape[1] - x.shape[1]
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, missing // 2, missing - missing // 2))
        return F.relu(y + x)


class ResNet(nn.Module):
    """The network of section 4.2, three stages of blocks for pictures (batch, 3, 32, 32)."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        stages = [
            nn.Sequential(BasicBlock(inputs, outputs), *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))
            for inputs, outputs in ((16, 16), (16, 32), (32, 64))
        ]
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(64, CLASSES)

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores (batch, 10)."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(pictures))))))
        scores: Tensor = self.linear(x.mean(dim=(2, 3)))
        return scores


def load_resnet56(path: Path) -> nn.Module:
    """ResNet-56 with the weights of a checkpoint whose names begin with ``module.``."""
    state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    model = ResNet(9)
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    return model.eval()
