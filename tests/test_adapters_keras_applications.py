"""Well-known architectures with random weights: every kernel is found, in memory and in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qvis import adapters
from tests import keras_models

keras = keras_models.require()
pytestmark = keras_models.QUIET


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("MobileNetV2", {"Conv2D": 35, "DepthwiseConv2D": 17, "Dense": 1}),
        ("EfficientNetB0", {"Conv2D": 65, "DepthwiseConv2D": 16, "Dense": 1}),
        ("ResNet50", {"Conv2D": 53, "Dense": 1}),
    ],
)
def test_every_kernel_of_an_application_is_found(name: str, kinds: dict[str, int], tmp_path: Path) -> None:
    model = getattr(keras.applications, name)(weights=None)
    network = adapters.read(model)
    # What the model itself says it has: all variables with two axes or more.
    matrices = {one.path: one for one in model.variables if len(one.shape) >= 2}
    assert {f"{layer.name}/kernel": layer.shape for layer in network.layers} == {
        path: tuple(one.shape) for path, one in matrices.items()
    }
    assert {kind: sum(layer.op == kind for layer in network.layers) for kind in kinds} == kinds
    assert sum(kinds.values()) == len(matrices)
    assert network.parameters == sum(int(np.prod(one.shape)) for one in model.trainable_variables)
    print(f"{name}: {len(matrices)} kernels in {network.parameters} parameters")
    for layer in network.layers:
        values = model.get_layer(layer.name).kernel.numpy()
        depthwise = layer.op == "DepthwiseConv2D"
        channels = int(np.prod(values.shape[-2:])) if depthwise else values.shape[-1]
        np.testing.assert_array_equal(layer.weight, values.reshape(-1, channels).T)
    check_files(model, tmp_path)


def check_files(model: Any, folder: Path) -> None:
    model.save(folder / "model.keras")
    keras_models.assert_same(model, folder / "model.keras")
    model.save(folder / "model.h5")
    keras_models.assert_same(model, folder / "model.h5")
    model.save_weights(folder / "model.weights.h5")
    found = {layer.name: layer for layer in adapters.read(folder / "model.weights.h5").layers}
    for layer in adapters.read(model).layers:
        assert found[layer.name].op == layer.op
        np.testing.assert_array_equal(found.pop(layer.name).weight, layer.weight)
    assert not found
