"""What the bits of a layer cost the shipped model is what measuring anew gives."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from qvis.adapters.digits import load_digits_model
from qvis.images.layers import load_layers

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "measure_layers.py"
BITS = (4, 1)
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="the examples are not in this tree")


def test_the_layers_and_costs_that_are_shipped_are_those_of_the_shipped_model() -> None:
    spec = importlib.util.spec_from_file_location("measure_layers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = script.measure(bits=BITS)
    folded = load_digits_model()
    for one, layer in enumerate(load_layers()):
        weight = found[f"weight_{one}"]
        assert weight.shape[0] == folded.get_submodule(layer.name).weight.shape[0]
        assert layer.ends == pytest.approx((weight.min(), weight.max()), rel=1e-3)
        for two, grid in enumerate(("tensor", "channel", "codebook")):
            stored = np.array([(cost.db, cost.right) for cost in layer.costs[grid] if cost.bits in BITS])
            measured = np.stack([found["db"][one, two], found["right"][one, two]], axis=1)
            assert np.abs(stored - measured).max(axis=0).tolist() == pytest.approx([0, 0], abs=2.5)
        assert layer.sign.db == pytest.approx(found["db"][one, 3, -1], abs=0.5)
        assert abs(layer.right_before - int(found["right_before"])) <= 1
