"""Tiny models that several tests share. All are made from a fixed seed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Sequences(nn.Module):
    """Token indices (batch, 7) through one layer of nearly every kind that torch can export."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 8)
        self.bag = nn.EmbeddingBag(10, 8)
        self.conv = nn.Conv1d(8, 12, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose1d(12, 8, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 8)
        self.lstm = nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(12, 4, batch_first=True)
        self.rnn = nn.RNN(4, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.linear = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.linear.weight
        self.cell = nn.LSTMCell(4, 3)
        self.pairs = nn.Bilinear(4, 4, 3)

    def forward(self, indices: Tensor) -> Tensor:
        hidden = self.tokens(indices) + self.bag(indices)[:, None]
        hidden = self.norm(self.up(self.conv(hidden.transpose(1, 2)))).transpose(1, 2)
        for recurrent in (self.lstm, self.gru, self.rnn):
            hidden, _ = recurrent(hidden)
        hidden, _ = self.attention(hidden, hidden, hidden)
        hidden = self.tied(torch.relu(self.linear(hidden)))
        state, _ = self.cell(hidden[:, 0])
        return self.pairs(hidden, hidden) + state[:, None]


class Images(nn.Module):
    """Images (batch, 3, 8, 8) through a CNN: depthwise, grouped and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.volume = nn.ConvTranspose3d(1, 2, 2)
        self.head = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.up(self.depthwise(torch.relu(self.norm(self.stem(images)))))
        return self.head(hidden.mean((2, 3))) + self.volume(hidden[:, None]).mean()


class Unsettled(nn.Module):
    """All that reading a weight could disturb: dropout, running statistics, power iterations, hooks and masks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 6))
        self.old_spectral = nn.utils.spectral_norm(nn.Linear(6, 6))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
        self.head = nn.Linear(5, 2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.drop(self.norm(self.conv(images))).flatten(1)[:, :16]
        return self.head(self.normed(self.old_spectral(self.spectral(hidden))))


def seeded(make: type[nn.Module]) -> nn.Module:
    """One of the models above, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()
