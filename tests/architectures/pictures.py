"""Models whose results are pictures, boxes or codes, and models of volumes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.convnets import unit


def leaky() -> nn.Module:
    return nn.LeakyReLU(0.1)


class Twice(nn.Sequential):
    """Two convolutions of a U-Net."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(*unit(inputs, outputs), *unit(outputs, outputs))


class UNet(nn.Module):
    """Down, up, and what was there on the way down beside it (Ronneberger et al., arXiv 1505.04597)."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = Twice(3, 6), Twice(6, 8), Twice(8, 10)
        self.up2, self.merge2 = nn.ConvTranspose2d(10, 8, 2, 2), Twice(16, 8)
        self.up1, self.merge1 = nn.ConvTranspose2d(8, 6, 2, 2), Twice(12, 6)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        middle = self.down2(functional.max_pool2d(fine, 2))
        x = self.bottom(functional.max_pool2d(middle, 2))
        x = self.merge2(torch.cat([middle, self.up2(x)], 1))
        x = self.merge1(torch.cat([fine, self.up1(x)], 1))
        return torch.sigmoid(self.out(x))


class Autoencoder(nn.Module):
    """A code of few numbers, and back, with transposed convolutions and their normalizations."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(unit(3, 6, stride=2), unit(6, 8, stride=2), nn.Flatten(), nn.Linear(128, 7))
        self.decoder = nn.Sequential(
            nn.Linear(7, 128), nn.ReLU(), nn.Unflatten(1, (8, 4, 4)),
            nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 3, 4, 2, 1),
            nn.Tanh(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class SuperResolution(nn.Module):
    """Residual blocks without normalizations, and channels that become places (Lim et al., arXiv 1707.02921)."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 6, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1)) for _ in range(2)
        )
        self.up = nn.Sequential(nn.Conv2d(6, 24, 3, padding=1), nn.PixelShuffle(2))
        self.tail = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.head(x)
        for block in self.body:
            x = x + 0.1 * block(x)
        return self.tail(self.up(x + first))


class Partial(nn.Module):
    """A block that only half of the channels go through, with its own shortcut (Wang et al., arXiv 1911.11929)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.one, self.two = unit(channels, half, 1, leaky), unit(channels, half, 1, leaky)
        self.inside = nn.Sequential(unit(half, half, 1, leaky), unit(half, half, 3, leaky))
        self.merge = unit(channels, channels, 1, leaky)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(x)
        return self.merge(torch.cat([self.one(x), y + self.inside(y)], 1))


class Yolo(nn.Module):
    """A detector at three scales with LeakyReLU: what is coarse is upsampled and joined (arXiv 1804.02767)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 6, 3, leaky)
        self.stages = nn.ModuleList(
            nn.Sequential(unit(c, d, 3, leaky, stride=2), Partial(d)) for c, d in ((6, 8), (8, 10), (10, 12))
        )
        self.pools = nn.ModuleList(nn.MaxPool2d(k, 1, k // 2) for k in (3, 5))
        self.pyramid = unit(36, 12, 1, leaky)
        self.lateral = nn.ModuleList([unit(12, 6, 1, leaky), unit(10, 6, 1, leaky)])
        self.merge = nn.ModuleList([unit(16, 10, 3, leaky), unit(14, 8, 3, leaky)])
        self.heads = nn.ModuleList(nn.Conv2d(c, 2 * 7, 1) for c in (12, 10, 8))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        x = self.pyramid(torch.cat([x, *(pool(x) for pool in self.pools)], 1))
        found = [x]
        for lateral, merge, fine in zip(self.lateral, self.merge, (maps[1], maps[0]), strict=True):
            x = merge(torch.cat([self.up(lateral(x)), fine], 1))
            found.append(x)
        return [self._boxes(head(one)) for head, one in zip(self.heads, found, strict=True)]

    def _boxes(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        x = x.view(n, 2, 7, h, w).permute(0, 1, 3, 4, 2).contiguous()
        return torch.cat([torch.sigmoid(x[..., :2]), torch.exp(x[..., 2:4]), torch.sigmoid(x[..., 4:])], -1)


class Ssd(nn.Module):
    """A detector whose heads are called as functions, all boxes in one result (Liu et al., arXiv 1512.02325)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(unit(3, 6, stride=2), unit(6, 8))
        self.extra = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 10, 3, 2, 1), nn.ReLU())
        self.gain = nn.Parameter(torch.tensor([0.5, -1.5, 2.0, 1.0, 0.2, 3.0, 1.0, -0.5]).view(1, 8, 1, 1))
        self.heads = nn.ParameterDict({
            "boxes0": torch.randn(8, 8, 3, 3), "boxes1": torch.randn(8, 10, 3, 3),
            "scores0": torch.randn(6, 8, 3, 3), "scores1": torch.randn(6, 10, 3, 3),
        })  # fmt: skip

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = [self.base(x)]
        maps.append(self.extra(maps[0]))
        maps[0] = maps[0] * self.gain
        result = {}
        for kind, size in (("boxes", 4), ("scores", 3)):
            parts = [functional.conv2d(one, self.heads[f"{kind}{i}"], padding=1) for i, one in enumerate(maps)]
            result[kind] = torch.cat([one.permute(0, 2, 3, 1).reshape(len(x), -1, size) for one in parts], 1)
        return result


class Retina(nn.Module):
    """One tower for all scales: its convolutions and normalizations are used three times (arXiv 1708.02002)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleList(unit(c, d, stride=2) for c, d in ((3, 6), (6, 8), (8, 10)))
        self.inner = nn.ModuleList(nn.Conv2d(c, 6, 1) for c in (6, 8, 10))
        self.outer = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(3))
        self.tower = nn.Sequential(unit(6, 8), unit(8, 8))
        self.boxes, self.scores = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        maps = []
        for stage in self.backbone:
            x = stage(x)
            maps.append(x)
        above: Tensor | None = None
        found = []
        for inner, outer, one in reversed(list(zip(self.inner, self.outer, maps, strict=True))):
            side = inner(one)
            above = side if above is None else side + functional.interpolate(above, scale_factor=2.0, mode="nearest")
            tower = self.tower(outer(above))
            found.append((self.boxes(tower), self.scores(tower)))
        return found


class Volumes(nn.Module):
    """Three-dimensional convolutions, one of them in two parts, space and time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2),
            nn.Conv3d(6, 8, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(8), nn.ReLU(),
            nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0), groups=2), nn.PReLU(8), nn.AdaptiveAvgPool3d(1),
        )  # fmt: skip
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).flatten(1))
