"""Small models with BatchNorm, in the ways in which such models are written. Statistics and weights are random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in evaluation mode with random statistics, gains and shifts, some of them negative."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.5, generator=random)
                module.running_var.uniform_(0.3, 2.0, generator=random)
                if module.affine:
                    module.weight.uniform_(-1.5, 1.5, generator=random)
                    module.bias.normal_(0, 0.5, generator=random)
    return model.eval()


def unit(
    inputs: int, outputs: int, kernel: int = 3, act: type[nn.Module] | None = nn.ReLU, **given: Any
) -> nn.Sequential:
    """A convolution, its normalization and an activation."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **given)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([] if act is None else [act()]))


class Residual(nn.Module):
    """A ResNet's basic block: one activation used twice, an in-place sum, a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = unit(inputs, outputs, 1, None, stride=stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 8)
        self.pool = nn.MaxPool2d(2)
        self.layer1 = Residual(8, 8)
        self.layer2 = Residual(8, 12, 2)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.pool(self.stem(x))))
        return self.fc(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))


class PreActivation(nn.Module):
    """BN, ReLU, convolution: the first normalization has nothing linear before or after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        hidden = self.conv1(functional.relu(self.bn1(x)))
        return x + self.conv2(functional.relu(self.bn2(hidden)))


class Inverted(nn.Module):
    """MobileNetV2's block."""

    def __init__(self, inputs: int, outputs: int, act: type[nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        wide = 2 * inputs
        self.shortcut = inputs == outputs
        self.body = nn.Sequential(
            unit(inputs, wide, 1, act), unit(wide, wide, 3, act, groups=wide), unit(wide, outputs, 1, None)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.shortcut else self.body(x)


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            unit(3, 8, act=nn.ReLU6), Inverted(8, 8), Inverted(8, 12), unit(12, 16, 1, nn.ReLU6)
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class Squeezed(nn.Module):
    """EfficientNet's and MobileNetV3's block: the channels are weighed by a small network of their own."""

    def __init__(self, channels: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.expand = unit(channels, 2 * channels, 1, act)
        self.depthwise = unit(2 * channels, 2 * channels, 5, act, groups=2 * channels)
        self.reduce, self.restore = nn.Conv2d(2 * channels, 4, 1), nn.Conv2d(4, 2 * channels, 1)
        self.project = unit(2 * channels, channels, 1, None)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.depthwise(self.expand(x))
        weights = functional.relu(self.reduce(functional.adaptive_avg_pool2d(hidden, 1)))
        return x + self.project(hidden * torch.sigmoid(self.restore(weights)))


class EfficientNet(nn.Module):
    def __init__(self, act: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.stem = unit(3, 8, act=act)
        self.blocks = nn.Sequential(Squeezed(8, act), Squeezed(8, act))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


class MobileNetV3(EfficientNet):
    def __init__(self) -> None:
        super().__init__(nn.Hardswish)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = unit(3, 6), unit(6, 8)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.up_norm = nn.BatchNorm2d(6)
        self.merge = unit(12, 6)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        coarse = self.down2(functional.max_pool2d(fine, 2))
        hidden = torch.cat([fine, self.up_norm(self.up(coarse))], dim=1)
        hidden = functional.interpolate(self.merge(hidden), scale_factor=2, mode="bilinear")
        return self.out(hidden)


class Dense(nn.Module):
    """DenseNet: what is normalized is a concatenation, or used several times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(10), nn.Conv2d(10, 4, 3, padding=1, bias=False)
        self.norm3, self.transition = nn.BatchNorm2d(14), nn.Conv2d(14, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        features.append(self.conv1(functional.relu(self.norm1(features[0]))))
        features.append(self.conv2(functional.relu(self.norm2(torch.cat(features, 1)))))
        return self.transition(self.norm3(torch.cat(features, 1)))


class Vgg(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Linear(8 * 4 * 4, 10), nn.BatchNorm1d(10), nn.ReLU(True), nn.Dropout(), nn.Linear(10, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


class Detector(nn.Module):
    """One pair of heads for two scales, so that their weights and normalizations are used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = unit(3, 6), unit(6, 6, stride=2)
        self.tower = unit(6, 6)
        self.boxes, self.scores = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        maps = [self.small(x)]
        maps.append(self.large(maps[0]))
        towers = [self.tower(one) for one in maps]
        return {"boxes": [self.boxes(one) for one in towers], "scores": tuple(self.scores(one) for one in towers)}


IMAGE_MODELS: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (ResNet, PreActivation, MobileNet, EfficientNet, MobileNetV3, UNet, Dense, Vgg, Detector)
}
"""Models of images (batch, 3, 16, 16)."""


def image_model(name: str) -> nn.Module:
    """One of them, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return settled(IMAGE_MODELS[name]())


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))
