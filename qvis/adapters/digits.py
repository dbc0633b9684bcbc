"""The model that comes with qvis: a small network that reads handwritten digits, for the demo, tests and first steps.

``examples/train_digits.py`` trained it. :class:`DigitsNet` is built like a small MobileNetV2, so that a report on it
has what reports on bigger models have: ordinary, depthwise and pointwise convolutions, BatchNorm, ReLU, residual
additions and a Linear layer. On a command line it is ``qvis.adapters.digits:load_digits_model``.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from qvis.errors import QvisError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

WEIGHTS = "models/digits.safetensors"
"""Where the trained weights are, within the package."""

SAMPLES = "models/digits_samples.npz"
"""Pictures for it."""

STEM = 24
"""Channels after the first convolution."""
BLOCKS = ((24, 1), (24, 1), (48, 2), (48, 1), (48, 1))
"""Output channels and stride of each block. A block that changes neither adds its input to its output."""
EXPANSION = 2
"""How many times more channels a block has inside than it is given."""
HEAD = 96
"""Channels that are averaged over the picture and given to the classifier."""


def load_digits_model(folded: bool = False) -> nn.Module:
    """Load the shipped model, in evaluation mode, on the CPU. Draws no random numbers.

    Parameters
    ----------
    folded
        Whether each BatchNorm is folded into the convolution before it. The outputs stay the same to about 1e-6, and
        so do the names: an ``Identity`` stands where the BatchNorm was.

    Returns
    -------
    torch.nn.Module
        Takes pictures (batch, 1, 8, 8) with values from 0 to 1, and returns scores (batch, 10).

    Raises
    ------
    QvisError
        PyTorch is not installed.
    """
    _require_torch()
    import torch
    from safetensors.torch import load

    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        model = _network()()
    model.load_state_dict(load((files("qvis") / WEIGHTS).read_bytes()), assign=True)
    model.eval()
    if folded:
        _fold(model)
    return model


def load_digits_samples() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Load 128 of the pictures that the shipped model never saw in training, and the digits that they show.

    They are of the data set "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, UCI Machine Learning
    Repository, 1998, CC BY 4.0), as scikit-learn has it.

    Returns
    -------
    pictures, digits
        (128, 1, 8, 8) with values from 0 to 1, and (128,).
    """
    import numpy as np

    with np.load(str(files("qvis") / SAMPLES)) as stored:
        return (stored["x"][:, None] / 16).astype(np.float32), stored["y"].astype(np.int64)


def __getattr__(name: str) -> Any:
    # The class exists once torch is imported, and importing this module must not do that.
    if name == "DigitsNet":
        _require_torch()
        return _network()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _require_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise QvisError('the digits model needs PyTorch; install it with: pip install "qvis[torch]"') from error


@cache
def _network() -> type[nn.Module]:
    from torch import nn
    from torch.nn.functional import relu

    class DigitsNet(nn.Module):
        """An untrained network of 18 layers for pictures (batch, 1, 8, 8)."""

        __qualname__ = "DigitsNet"  # where pickle finds it

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential()
            self.stem.add_module("conv", nn.Conv2d(1, STEM, 3, padding=1, bias=False))
            self.stem.add_module("norm", nn.BatchNorm2d(STEM))
            self.stem.add_module("relu", nn.ReLU())
            self.blocks = nn.ModuleList()
            channels = STEM
            self.residual = []
            for outputs, stride in BLOCKS:
                self.blocks.append(_block(channels, outputs, stride))
                self.residual.append(stride == 1 and channels == outputs)
                channels = outputs
            self.head = nn.Sequential()
            self.head.add_module("conv", nn.Conv2d(channels, HEAD, 1, bias=False))
            self.head.add_module("norm", nn.BatchNorm2d(HEAD))
            self.head.add_module("relu", nn.ReLU())
            self.head.add_module("pool", nn.AdaptiveAvgPool2d(1))
            self.head.add_module("flatten", nn.Flatten())
            self.classifier = nn.Linear(HEAD, 10)

        def forward(self, pictures: Tensor) -> Tensor:
            """Scores (batch, 10) of pictures (batch, 1, 8, 8)."""
            x: Tensor = self.stem(pictures)
            for block, residual in zip(self.blocks, self.residual, strict=True):
                x = relu(x + block(x)) if residual else block(x)
            scores: Tensor = self.classifier(self.head(x))
            return scores

    return DigitsNet


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """An inverted residual: widen with a pointwise convolution, filter each channel by itself, narrow again."""
    from torch import nn

    inside = EXPANSION * inputs
    block = nn.Sequential()
    block.add_module("expand", nn.Conv2d(inputs, inside, 1, bias=False))
    block.add_module("expand_norm", nn.BatchNorm2d(inside))
    block.add_module("expand_relu", nn.ReLU())
    block.add_module("depthwise", nn.Conv2d(inside, inside, 3, stride, padding=1, groups=inside, bias=False))
    block.add_module("depthwise_norm", nn.BatchNorm2d(inside))
    block.add_module("depthwise_relu", nn.ReLU())
    block.add_module("project", nn.Conv2d(inside, outputs, 1, bias=False))
    block.add_module("project_norm", nn.BatchNorm2d(outputs))
    return block


def _fold(model: nn.Module) -> None:
    """Fold each BatchNorm of this model into the convolution before it; they follow one another in a Sequential."""
    from itertools import pairwise

    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    for sequence in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for (conv_name, conv), (norm_name, norm) in pairwise(list(sequence.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                # The bias that the convolution gains would be frozen, unlike everything else.
                sequence.register_module(conv_name, fuse_conv_bn_eval(conv, norm).requires_grad_())
                sequence.register_module(norm_name, nn.Identity().eval())
