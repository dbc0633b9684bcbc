"""Transformers of PyTorch: a small one for pictures, and the encoder BERT for a checkpoint trained by others."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, DEPTH, PATCH, SIZE, CLASSES = 64, 4, 6, 4, 32, 10


class Attention(nn.Module):
    """Attention of several heads (Vaswani et al., arXiv 1706.03762, section 3.2), a layer for each of its matrices."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(batch, tokens, width), with a mask (batch, tokens) of the tokens that may be looked at."""
        query, key, value = (
            linear(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for linear in (self.query, self.key, self.value)
        )
        seen = None if mask is None else mask[:, None, None, :]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        result: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return result


class Block(nn.Module):
    """One layer with the norms first (Xiong et al., arXiv 2002.04745), or last as in BERT."""

    def __init__(self, width: int, heads: int, inside: int, norm_first: bool, eps: float = 1e-5) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=eps) for _ in range(2))
        self.up, self.down = nn.Linear(width, inside), nn.Linear(inside, width)
        self.norm_first = norm_first

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(batch, tokens, width)."""
        if self.norm_first:
            x = x + self.attention(self.norm1(x), mask)
            return x + self.down(F.gelu(self.up(self.norm2(x))))
        x = self.norm1(x + self.attention(x, mask))
        result: Tensor = self.norm2(x + self.down(F.gelu(self.up(x))))
        return result


class VisionTransformer(nn.Module):
    """A transformer over the patches of pictures (batch, 3, 32, 32) (Dosovitskiy et al., arXiv 2010.11929)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.place = nn.Parameter(torch.randn((SIZE // PATCH) ** 2, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS, 2 * WIDTH, norm_first=True) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores (batch, 10)."""
        x = self.embed(pictures).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.classifier(self.norm(x).mean(dim=1))
        return scores


class SentenceEncoder(nn.Module):
    """BERT (Devlin et al., arXiv 1810.04805) whose tokens are averaged (Reimers and Gurevych, arXiv 1908.10084)."""

    def __init__(self, vocabulary: int, positions: int, width: int, heads: int, inside: int, depth: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.kinds = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.blocks = nn.ModuleList(Block(width, heads, inside, norm_first=False, eps=1e-12) for _ in range(depth))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Embeddings (batch, width) of length 1, of tokens (batch, length); ``mask`` says which are there."""
        there = mask.bool()
        x = self.words(tokens) + self.positions(torch.arange(tokens.shape[1])) + self.kinds(torch.zeros_like(tokens))
        x = self.norm(x)
        for block in self.blocks:
            x = block(x, there)
        weight = mask.to(x.dtype)[:, :, None]
        return F.normalize((x * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1), dim=1)


NAMES = {
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "kinds",
    "embeddings.LayerNorm": "norm",
    "encoder.layer": "blocks",
    "attention.self": "attention",
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "up",
    "output.LayerNorm": "norm2",
    "output.dense": "down",
}
"""What the parts of the checkpoint are called here."""


def load_minilm(folder: Path) -> nn.Module:
    """The encoder of the folder's ``config.json`` and ``model.safetensors``."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    sizes = ("vocab_size", "max_position_embeddings", "hidden_size", "num_attention_heads", "intermediate_size")
    model = SentenceEncoder(*(config[name] for name in sizes), config["num_hidden_layers"])
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.startswith(("embeddings.position_ids", "pooler")):
            continue
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        state[name] = tensor
    model.load_state_dict(state)
    return model.eval()
