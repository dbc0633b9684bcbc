"""A model and data on disk, for the tests of commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np

CODE = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
"""


def fill(folder: Path, code: str = CODE) -> Path:
    """Write ``net.py`` with this code, and ``val.npz`` with 8 inputs of 16 numbers and labels below 4."""
    (folder / "net.py").write_text(code)
    x = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    np.savez(folder / "val.npz", x=x, y=np.arange(8) % 4)
    return folder
