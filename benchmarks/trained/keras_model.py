"""A functional Keras model of separable and depthwise convolutions."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from trained.pictures import SIZE, Pictures, augmented

BATCH, EPOCHS, RATE, CLASSES = 64, 8, 4e-3, 10
BLOCKS = ((24, 1), (32, 2), (32, 1), (48, 2), (48, 1), (64, 1))
"""Channels and stride of each separable convolution."""


def train_or_load(pictures: Pictures, cache: Path) -> tuple[Any, float]:
    """The model with its weights from the cache, or trained and put there, and its accuracy."""
    import keras

    keras.utils.set_random_seed(0)
    model = build()
    file = cache / f"keras-{pictures.name}.weights.h5"
    note = file.with_suffix(".json")
    if file.exists() and note.exists():
        model.load_weights(file)
        return model, json.loads(note.read_text())["accuracy"]
    began = time.perf_counter()
    train(model, pictures)
    scores = model.predict(pictures.test.transpose(0, 2, 3, 1), batch_size=100, verbose=0)
    accuracy = float((scores.argmax(axis=1) == pictures.test_labels).mean())
    print(f"trained keras in {time.perf_counter() - began:.0f} s: {accuracy:.1%} right on {pictures.name}", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    model.save_weights(file)
    note.write_text(json.dumps({"accuracy": accuracy}))
    return model, accuracy


def build() -> Any:
    """Scores (batch, 10) of pictures (batch, 32, 32, 3)."""
    import keras
    from keras import layers

    def norm(x: Any) -> Any:
        return layers.BatchNormalization(momentum=0.9)(x)

    inputs = keras.Input((SIZE, SIZE, 3))
    x = keras.ops.relu(norm(layers.Conv2D(16, 3, 2, padding="same", use_bias=False)(inputs)))
    for channels, stride in BLOCKS:
        y = layers.SeparableConv2D(channels, 3, stride, padding="same", use_bias=False)(x)
        y = keras.ops.relu(norm(y))
        y = norm(layers.DepthwiseConv2D(3, padding="same", use_bias=False)(y))
        y = norm(layers.Conv2D(channels, 1, use_bias=False)(keras.ops.relu(y)))
        x = layers.Add()([x, y]) if stride == 1 and x.shape[-1] == channels else y
        x = layers.ReLU(6.0)(x)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dense(64, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(CLASSES)(x), name="separable")


def train(model: Any, pictures: Pictures) -> None:
    """Train with Adam, its rate falling along a cosine."""
    import keras

    steps = len(pictures.train) // BATCH
    rate = keras.optimizers.schedules.CosineDecay(RATE, EPOCHS * steps)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss)
    generator = np.random.default_rng(0)
    for _ in range(EPOCHS):
        order = generator.permutation(len(pictures.train))[: steps * BATCH]
        shown = augmented(pictures.train[order], generator, mirror=pictures.name != "digits").transpose(0, 2, 3, 1)
        model.fit(shown, pictures.train_labels[order], batch_size=BATCH, shuffle=False, verbose=0)
