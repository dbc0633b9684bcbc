"""The digits model quantized into .pt2 files, each once, and the pictures that this takes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

import qvis
from qvis.adapters.digits import load_digits_model
from qvis.quantization.result import QuantizedModel

FOLDER = Path(mkdtemp())
TRAINED_ON, TESTED_ON = 384, 400


@cache
def pictures() -> tuple[Any, Any]:
    """All 1797 digits of scikit-learn, as the model takes them, and what they show; mixed."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.images))
    return (found.images[order, None] / 16).astype(np.float32), found.target[order]


def digits(method: str, bits: int = 8, epochs: int = 2, granularity: str = "channel") -> QuantizedModel:
    """The model, quantized."""
    return _digits(method, bits, epochs, granularity)


@cache
def _digits(method: str, bits: int, epochs: int, granularity: str) -> QuantizedModel:
    images, labels = pictures()
    some = images[:TRAINED_ON]
    given: dict[str, Any] = {
        "weight_only": {"example_inputs": some[:2]},
        "post_training": {"calibration_data": some[:128]},
        "quantization_aware": {"train_data": (some, labels[:TRAINED_ON])},
    }[method]
    if method == "quantization_aware":
        given |= {"epochs": epochs, "learning_rate": 2e-3 if bits < 8 else 1e-4}
    path = FOLDER / f"{method}_{bits}_{epochs}_{granularity}.pt2"
    return qvis.quantize(load_digits_model(), path, method, bits=bits, granularity=granularity, **given)


def accuracy(path: Any) -> float:
    """The share of right answers to the pictures that nothing was trained on."""
    from qvis.quantization.engines import open_engine
    from qvis.running import Batch

    images, labels = (one[TRAINED_ON:][:TESTED_ON] for one in pictures())
    (scores,) = open_engine(path).run(Batch((images,), size=len(images)))
    return float((scores.argmax(1) == labels).mean())
