"""Small models with the structure of well-known architectures, each with inputs. Weights and statistics are random."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.architectures import classifiers, pictures, sequences, telephones
from tests.convnets import settled

WORDS = 11
"""How many words models of text know."""


class Built(NamedTuple):
    """A model in evaluation mode, and what it is called with."""

    model: nn.Module
    inputs: tuple[Tensor, ...]


class Architecture(NamedTuple):
    """How a model is made."""

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    """Of its inputs."""
    words: bool = False
    """Whether it takes numbers of words."""

    def build(self, seed: int = 0) -> Built:
        """Make the model and its inputs, the same at every call."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = settled(self.make(), seed)
            for module in model.modules():
                _unsettle(module)
            inputs = tuple(torch.randint(WORDS, one) if self.words else torch.randn(one) for one in self.shapes)
        return Built(model.eval(), inputs)


def _unsettle(module: nn.Module) -> None:
    """Nothing is trivial: biases are not zero, some factors are zero or negative, and signals do not die out."""
    scale, shift = (getattr(module, name, None) for name in ("weight", "bias"))
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and bool((module.weight != 0).all()):
        nn.init.normal_(module.weight, 0, (2 / module.weight[0].numel()) ** 0.5)
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and isinstance(scale, Tensor):
        scale[0] = 0
        scale[1] = -scale[1].abs() - 0.1
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)) and isinstance(scale, Tensor):
        scale.normal_(1, 0.4)
        scale[1] *= -1
    if isinstance(shift, Tensor):
        shift.normal_(0, 0.4)
    for name, parameter in module.named_parameters(recurse=False):
        if name.startswith("bias_"):  # of a recurrent layer
            parameter.normal_(0, 0.4)


_PICTURE, _ROW, _TEXT = ((2, 3, 16, 16),), ((3, 6),), ((2, 5),)

ARCHITECTURES = {
    **{
        cls.__name__: Architecture(cls, _PICTURE)
        for cls in (
            classifiers.ResNet, classifiers.SmallResNet, classifiers.ResNetBottleneck, classifiers.ResNeXt,
            classifiers.RegNetY,
            classifiers.PreActivationResNet, classifiers.ConvNeXt, telephones.MobileNetV1, telephones.MobileNetV2,
            telephones.MobileNetV3, telephones.EfficientNet, telephones.EfficientNetLite, telephones.SqueezeNet,
            telephones.ShuffleNetV2, classifiers.Vgg, classifiers.DenseNet, classifiers.GoogLeNet, pictures.UNet,
            pictures.Autoencoder, pictures.SuperResolution, pictures.Yolo, pictures.Ssd, pictures.Retina,
        )
    },
    "Volumes": Architecture(pictures.Volumes, ((1, 2, 4, 6, 6),)),
    "Sound": Architecture(sequences.Sound, ((2, 1, 96),)),
    "Tcn": Architecture(sequences.Tcn, ((2, 2, 12),)),
    "VisionTransformer": Architecture(sequences.VisionTransformer, ((2, 3, 8, 8),)),
    "Swin": Architecture(sequences.Swin, ((1, 3, 8, 8),)),
    "Mixer": Architecture(sequences.Mixer, ((2, 5, 6),)),
    **{
        cls.__name__: Architecture(cls, _ROW)
        for cls in (sequences.Mlp, sequences.Outputs, sequences.Recurrent, sequences.Dead)
    },
    "Siamese": Architecture(sequences.Siamese, (*_ROW, *_ROW)),
    **{
        cls.__name__: Architecture(cls, _TEXT, words=True)
        for cls in (
            sequences.PostNormEncoder, sequences.Llama, sequences.Tagger, sequences.TextCnn, sequences.Tied,
        )
    },
}  # fmt: skip
