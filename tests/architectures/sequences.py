"""Models of rows of numbers, of sound and of text, and ways of wiring that make equalization go wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Linear(6, 12), nn.PReLU(12), nn.Dropout(), nn.Linear(12, 10), nn.PReLU(), nn.BatchNorm1d(10),
            nn.Linear(10, 8), nn.LeakyReLU(), nn.Dropout(0.1), nn.Linear(8, 3),
        )  # fmt: skip


class Sound(nn.Module):
    """Samples of sound, (batch, 1, time)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, kernel, stride in ((1, 8, 9, 4), (8, 8, 3, 1), (8, 12, 3, 1)):
            layers += [nn.Conv1d(inputs, outputs, kernel, stride), nn.BatchNorm1d(outputs), nn.ReLU(), nn.MaxPool1d(2)]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        return functional.log_softmax(self.head(functional.avg_pool1d(x, x.shape[-1]).permute(0, 2, 1)), dim=2)


class Causal(nn.Module):
    """Two convolutions that see only the past, with weights of a fixed norm (Bai et al., arXiv 1803.01271)."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.cut = 2 * dilation
        normed = nn.utils.parametrizations.weight_norm
        self.conv1 = normed(nn.Conv1d(inputs, outputs, 3, padding=self.cut, dilation=dilation))
        self.conv2 = normed(nn.Conv1d(outputs, outputs, 3, padding=self.cut, dilation=dilation))
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.drop(torch.relu(self.conv1(x)[:, :, : -self.cut]))
        out = self.drop(torch.relu(self.conv2(out)[:, :, : -self.cut]))
        return torch.relu(out + (x if self.downsample is None else self.downsample(x)))


class Tcn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Causal(2, 6, 1), Causal(6, 6, 2), Causal(6, 8, 4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x)[:, :, -1])


# ---------------------------------------------------------------------------------------------------------------------
# Transformers


class Attention(nn.Module):
    """Query, key and value by one matrix (Vaswani et al., arXiv 1706.03762)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(n, tokens, width))


class PreNormLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, 2)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Patches, a class token and places (Dosovitskiy et al., arXiv 2010.11929)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.layers = nn.Sequential(PreNormLayer(8), PreNormLayer(8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.layers(x))[:, 0])


class PostNormEncoder(nn.Module):
    """torch's own layers, which normalize after each sum."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens)).mean(1))


class RootMeanSquare(nn.Module):
    """A normalization that is written out (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.3, 1.7, width))

    def forward(self, x: Tensor) -> Tensor:
        real = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = real * torch.rsqrt(real.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * normed.to(x.dtype)


class Llama(nn.Module):
    """RMS norms, rotated queries and keys, fewer keys than queries, a gate (Touvron et al., arXiv 2302.13971)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.layers = nn.ModuleList(LlamaLayer(16, 4, 2, 20) for _ in range(2))
        self.norm, self.head = nn.RMSNorm(16, eps=1e-5), nn.Linear(16, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        angles = torch.outer(torch.arange(tokens.shape[1]), 100.0 ** -torch.arange(0, 1, 0.5))
        cos, sin = (torch.cat([part(angles)] * 2, -1) for part in (torch.cos, torch.sin))
        for layer in self.layers:
            x = layer(x, cos.to(x.dtype), sin.to(x.dtype))
        return self.head(self.norm(x))


class LlamaLayer(nn.Module):
    def __init__(self, width: int, heads: int, groups: int, hidden: int) -> None:
        super().__init__()
        self.size = width // heads
        self.norm1, self.norm2 = RootMeanSquare(width), RootMeanSquare(width)
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, groups * self.size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n, tokens, width = x.shape
        hidden = self.norm1(x)
        q, k, v = (layer(hidden).view(n, tokens, -1, self.size).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = (one * cos + self._rotated(one) * sin for one in (q, k))
        times = q.shape[1] // k.shape[1]
        k, v = (one[:, :, None].expand(-1, -1, times, -1, -1).reshape(q.shape) for one in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(n, tokens, width))
        hidden = self.norm2(x)
        return x + self.down(functional.silu(self.gate(hidden)) * self.up(hidden))

    @staticmethod
    def _rotated(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return torch.cat([-x[..., half:], x[..., :half]], -1)


class Swin(nn.Module):
    """Attention in windows, which are shifted in every second layer (Liu et al., arXiv 2103.14030)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 2, 2)
        self.layers = nn.ModuleList([SwinLayer(6, 0), SwinLayer(6, 1)])
        self.norm, self.reduction = nn.LayerNorm(24), nn.Linear(24, 10, bias=False)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        for layer in self.layers:
            x = layer(x)
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.head(self.reduction(self.norm(x)).mean((1, 2)))


class SwinLayer(nn.Module):
    def __init__(self, width: int, shift: int) -> None:
        super().__init__()
        self.shift = shift
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, 2)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        hidden = self.norm1(x)
        if self.shift:
            hidden = torch.roll(hidden, (-self.shift, -self.shift), (1, 2))
        windows = hidden.view(n, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        hidden = self.attn(windows).view(n, h // 2, w // 2, 2, 2, c).transpose(2, 3).reshape(n, h, w, c)
        if self.shift:
            hidden = torch.roll(hidden, (self.shift, self.shift), (1, 2))
        x = x + hidden
        return x + self.mlp(self.norm2(x))


class Mixer(nn.Module):
    """Matrices along the tokens, and along the channels (Tolstikhin et al., arXiv 2105.01601)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(5))
        self.mixing = nn.ModuleList(
            nn.Sequential(nn.Linear(size, 10), nn.ReLU(), nn.Linear(10, size)) for size in (5, 8, 5, 8)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i in (0, 2):
            x = x + self.mixing[i](self.norms[i](x).transpose(1, 2)).transpose(1, 2)
            x = x + self.mixing[i + 1](self.norms[i + 1](x))
        return self.head(self.norms[4](x).mean(dim=1))


class Tagger(nn.Module):
    """A label for each word, by an LSTM and a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.project = nn.Embedding(11, 6), nn.Linear(6, 8)
        self.lstm = nn.LSTM(8, 5, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(10, 6, batch_first=True)
        self.hidden, self.head = nn.Linear(6, 7), nn.Linear(7, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.lstm(torch.relu(self.project(self.embed(tokens))))
        x, _ = self.gru(x)
        return self.head(torch.relu(self.hidden(x)))


class TextCnn(nn.Module):
    """The largest of each feature over all words (Kim, arXiv 1408.5882)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.convs = nn.ModuleList(nn.Conv1d(6, 5, size) for size in (2, 3))
        self.hidden, self.head = nn.Linear(10, 8), nn.Linear(8, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).transpose(1, 2)
        found = [functional.relu(conv(x)).amax(-1) for conv in self.convs]
        return self.head(torch.relu(self.hidden(torch.cat(found, 1))))


# ---------------------------------------------------------------------------------------------------------------------
# Ways of wiring


class Siamese(nn.Module):
    """Two inputs through the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU())
        self.last, self.head = nn.Linear(8, 5), nn.Linear(5, 1)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        first, second = (self.last(self.trunk(x)) for x in (one, other))
        return self.head(functional.relu(first - second))


class Outputs(nn.Module):
    """Several results by name, one of them from the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Linear(6, 10), nn.Linear(10, 8)
        self.features, self.score, self.box = nn.Linear(8, 7), nn.Linear(7, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor | list[Tensor]]:
        x = functional.relu(self.body(functional.relu(self.stem(x))))
        features = self.features(x)
        return {"features": features, "scores": [self.score(functional.relu(features)), self.box(x)]}


class Recurrent(nn.Module):
    """One block and one activation, used again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.act = nn.Linear(6, 8), nn.ReLU()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.start(x))
        for _ in range(3):
            x = self.act(x + self.down(self.act(self.up(x))))
        return self.head(x)


class Dead(nn.Module):
    """Channels that are zero on one side, on the other, or on both."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        with torch.no_grad():
            self.layers[0].weight[:3] = 0
            self.layers[2].weight[:, 2:5] = 0
            self.layers[2].weight[6:] = 0
            self.layers[4].weight[:, 5:7] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Tied(nn.Module):
    """A language model whose last matrix is its table of words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(self.norm(x + self.down(functional.relu(self.up(x)))))
