"""The models that the benchmarks measure: real sizes and shapes, random weights, the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Table 2 of https://arxiv.org/abs/1801.04381: expansion, output channels, repeats, stride of the first."""


class ConvNormReLU(nn.Sequential):
    """Convolution without bias, BatchNorm, ReLU6."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(inplace=True),
        )


class InvertedResidual(nn.Module):
    """Widen, filter each channel by itself, narrow; added to the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inside = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            *([ConvNormReLU(inputs, inside, 1)] if expansion != 1 else []),
            ConvNormReLU(inside, inside, 3, stride, groups=inside),
            nn.Conv2d(inside, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, height, width) -> (batch, outputs, height / stride, width / stride)."""
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """MobileNetV2 at width 1 for 1,000 classes: 53 layers with weights, 3,504,872 parameters."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [ConvNormReLU(3, 32, 3, 2)]
        channels = 32
        for expansion, outputs, repeats, first_stride in MOBILENET_V2:
            for repeat in range(repeats):
                layers.append(InvertedResidual(channels, outputs, first_stride if repeat == 0 else 1, expansion))
                channels = outputs
        layers.append(ConvNormReLU(channels, 1280, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, pictures: Tensor) -> Tensor:
        """(batch, 3, 224, 224) -> (batch, 1000)."""
        scores: Tensor = self.classifier(self.features(pictures).mean((2, 3)))
        return scores


class EncoderLayer(nn.Module):
    """The six Linear layers of a Transformer encoder layer, without what lies between them: it holds no matrices."""

    def __init__(self, width: int, inside: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.up = nn.Linear(width, inside)
        self.down = nn.Linear(inside, width)


class BertBaseStack(nn.Module):
    """The Linear layers of BERT-base, in its sizes: 12 layers of 6 and a pooler, 85,608,192 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(768, 3072) for _ in range(12))
        self.pooler = nn.Linear(768, 768)


BUILDERS: dict[str, Callable[[], nn.Module]] = {"mobilenet_v2": MobileNetV2, "bert_base_stack": BertBaseStack}


def build(name: str, seed: int = 0) -> nn.Module:
    """The model of that name in :data:`BUILDERS`, in evaluation mode, with PyTorch's own random initial weights."""
    torch.manual_seed(seed)
    return BUILDERS[name]().eval()


@torch.no_grad()
def optimized(model: nn.Module) -> nn.Module:
    """A copy to compare the model with: each convolution and Linear weight rounded to 8 bits, one step per tensor."""
    copy = deepcopy(model)
    for module in copy.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            step = module.weight.abs().max() / 127
            module.weight.copy_(torch.round(module.weight / step) * step)
    return copy
