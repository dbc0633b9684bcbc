"""The pictures that models are trained on: CIFAR-10 from a folder, or the digits that come with scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the channels, as models trained on ImageNet expect; those for CIFAR-10 mostly use them too."""
SIZE = 32


class Pictures(NamedTuple):
    """Pictures (number, 3, 32, 32) in float32, normalized, and their classes, of which there are ten."""

    name: str
    train: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    test: NDArray[np.float32]
    test_labels: NDArray[np.int64]


def load_pictures(folder: Path | None) -> Pictures:
    """Those of the folder's ``cifar10_subset.npz``; without a folder, digits of the same size."""
    if folder is None:
        small, labels = digit_pictures()
        large = normalized(np.repeat(np.kron(small, np.ones((1, 1, 4, 4), np.float32)), 3, axis=1))
        held_out = np.arange(len(labels)) % 5 == 0
        return Pictures("digits", large[~held_out], labels[~held_out], large[held_out], labels[held_out])
    with np.load(folder / "cifar10_subset.npz") as file:
        train, test = (
            normalized(file[name].astype(np.float32).transpose(0, 3, 1, 2) / 255) for name in ("x_train", "x_test")
        )
        labels = [file[name].astype(np.int64) for name in ("y_train", "y_test")]
    mixed = np.random.default_rng(0).permutation(len(test))  # they lie there class by class
    return Pictures("cifar10", train, labels[0], test[mixed], labels[1][mixed])


def digit_pictures() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """All digits of scikit-learn (1797, 1, 8, 8), with values from 0 to 1, and which they are."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images[:, None] / 16).astype(np.float32), found.target.astype(np.int64)


def normalized(pictures: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each channel less its mean, over its deviation."""
    mean, deviation = (np.array(one, np.float32)[:, None, None] for one in (MEAN, DEVIATION))
    return np.ascontiguousarray((pictures - mean) / deviation)


def augmented(pictures: NDArray[np.float32], generator: np.random.Generator, mirror: bool) -> NDArray[np.float32]:
    """Each picture moved by up to three pixels, and half of them mirrored."""
    padded = np.pad(pictures, ((0, 0), (0, 0), (3, 3), (3, 3)), mode="edge")
    down, right = generator.integers(0, 7, (2, len(pictures), 1))
    turn = np.where(mirror & (generator.random((len(pictures), 1)) < 0.5), -1, 1)
    columns = np.arange(SIZE)[None] * turn + np.where(turn < 0, SIZE - 1, 0) + right
    rows = np.arange(SIZE)[None] + down
    index = np.arange(len(pictures))[:, None, None]
    moved = padded.transpose(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
    return np.ascontiguousarray(moved.transpose(0, 3, 1, 2))
