"""Data and models for the examples beside this file: pictures of handwritten digits, and networks that read them.

The pictures are those of scikit-learn, 8 x 8 pixels. Every fifth is held out: nothing here is trained on it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from qvis.adapters.digits import load_digits_model


class Data(NamedTuple):
    """Pictures and the digits that they show."""

    train_x: NDArray[np.float32]
    """(1437, 8, 8, 1) or, for PyTorch, (1437, 1, 8, 8), with values from 0 to 1."""
    train_y: NDArray[np.int64]
    test_x: NDArray[np.float32]
    test_y: NDArray[np.int64]


def load_data(framework: str) -> Data:
    """All pictures, in the layout of ``torch`` or ``keras``."""
    digits = load_digits()
    pictures = np.expand_dims((digits.images / 16).astype(np.float32), 1 if framework == "torch" else -1)
    held_out = np.arange(len(pictures)) % 5 == 0
    labels = digits.target.astype(np.int64)
    return Data(pictures[~held_out], labels[~held_out], pictures[held_out], labels[held_out])


def load_model(framework: str, data: Data, keras_epochs: int) -> Any:
    """A trained network of a framework; that of Keras is trained now."""
    return load_digits_model() if framework == "torch" else train_keras_model(data, keras_epochs)


def train_keras_model(data: Data, epochs: int) -> Any:
    """A small convolutional network, trained in about ten seconds for 20 epochs."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow tells much when it is imported
    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.DepthwiseConv2D(3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10, activation="softmax"),
        ],
        name="digits",
    )
    model.compile(keras.optimizers.Adam(5e-3), "sparse_categorical_crossentropy")
    model.fit(data.train_x, data.train_y, batch_size=32, epochs=epochs, verbose=0)
    return model


def save_data(data: Data, folder: Path) -> None:
    """Write the pictures to files that the commands of qvis, and the other examples, can be given."""
    np.savez_compressed(folder / "train.npz", x=data.train_x, y=data.train_y)
    np.savez_compressed(folder / "test.npz", x=data.test_x, y=data.test_y)
