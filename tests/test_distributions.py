"""Histograms, grids and ranges of input channels as the page carries them, read back."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qvis.report.channels import round_bits
from qvis.report.distributions import DECADES, GRID, HEIGHTS, PAGE_POINTS, by_columns, lighten, pack_distributions

RANDOM = np.random.default_rng(0)
METHODS = ("min-max", "MSE")


def grid(method: str, zero: int, damage: float) -> dict[str, Any]:
    step = float(RANDOM.uniform(0.001, 1))
    ends = {"low": -zero * step, "high": (255 - zero) * step}
    return {"method": method, "step": step, "zero": zero, **ends, "sqnr_db": 40.5, "damage": damage}


def histogram(methods: tuple[str, ...]) -> dict[str, Any]:
    counts = np.floor(RANDOM.exponential(1000, 64))
    counts[::7] = 0
    grids = [grid(method, 10 * i, 1e-3) for i, method in enumerate(methods)]
    return {"low": -1.0, "high": 2.0, "counts": counts, "importance": RANDOM.random(64), "grids": grids}


def layer(channels: int | None, methods: tuple[str, ...] = METHODS) -> dict[str, Any]:
    entering = None
    if channels is not None:
        low, high = -RANDOM.random(channels), RANDOM.random(channels)
        ranges = {"min": low, "mean": (low + high) / 2, "max": high}
        entering = histogram(methods) | {"zeros": 0.5, "channels": channels, "channel_statistics": ranges}
    figures = {"value": [0.1], "predicted": [0.1234567], "spread": [0.1234567], "confidence": ["high"]}
    known = {"weights": {"tensor": figures}, "inputs": None}
    return {"stored": None, "sensitivity": {**known, "entering": entering, "weight_grids": histogram(methods)}}


def unpack(head: dict[str, Any], block: bytes) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The numbers and the bars."""
    size = 4 * head["numbers"]
    numbers = np.frombuffer(block[:size], np.uint8).reshape(4, -1).T.copy().view("<f4").ravel()
    return numbers, np.frombuffer(block[size:], np.uint8).reshape(-1, 2, head["bars"] or 1)


def test_grids_bars_and_ranges_come_back() -> None:
    layers = [layer(5), {"sensitivity": None}, layer(None, METHODS[:1]), layer(700)]
    head, block = pack_distributions(layers)
    numbers, bars = unpack(head, block)
    known = [one["sensitivity"] for one in layers if one["sensitivity"]]
    parts = [part for one in known for part in (one["weight_grids"], one["entering"]) if part]
    assert (head["methods"], head["bars"], len(bars)) == (list(METHODS), 64, len(parts))
    size = len(METHODS) * len(GRID) * len(parts)
    grids = numbers[:size].reshape(len(METHODS), len(GRID), len(parts))
    for p, part in enumerate(parts):
        for m, method in enumerate(METHODS):
            found = next((one for one in part["grids"] if one["method"] == method), None)
            if found is None:
                assert np.isnan(grids[m, :, p]).all()
                continue
            step, zero, low, high, sqnr, damage = grids[m, :, p]
            assert (zero, low, high) == (found["zero"], -found["zero"], 255 - found["zero"])
            np.testing.assert_allclose((step, sqnr, damage), (found["step"], 40.5, 1e-3), rtol=2.0**-16)
        for codes, values in zip(bars[p], (part["counts"], part["importance"]), strict=True):
            assert ((codes == 0) == (values == 0)).all()
            used = values > 0
            heights = (codes[used] - 1.0) / HEIGHTS * DECADES - DECADES
            assert np.abs(heights - np.log10(values[used] / values.max())).max() <= DECADES / HEIGHTS / 2 + 1e-9
    small, large = layers[0]["sensitivity"]["entering"], layers[3]["sensitivity"]["entering"]
    first = numbers[size : size + 15].reshape(3, 5)
    np.testing.assert_allclose(first, list(small["channel_statistics"].values()), rtol=1e-4)
    second = numbers[size + 15 :].reshape(3, head["most"])
    starts = [*(i * 700 // head["most"] for i in range(head["most"])), 700]
    for i, (start, end) in enumerate(pairwise(starts)):
        assert second[0, i] == pytest.approx(large["channel_statistics"]["min"][start:end].min(), rel=1e-4)
        assert second[1, i] == pytest.approx(large["channel_statistics"]["mean"][start:end].mean(), rel=1e-3, abs=1e-4)
        assert second[2, i] == pytest.approx(large["channel_statistics"]["max"][start:end].max(), rel=1e-4)


def test_many_layers_are_thinned_and_no_layers_are_nothing() -> None:
    head, _ = pack_distributions([layer(64)] * 500)
    assert 8 <= head["most"] < 64
    assert 500 * head["most"] <= PAGE_POINTS
    head, block = pack_distributions([{"sensitivity": None}, {"before": 1}])
    assert (head["numbers"], head["bars"], block) == (0, 0, b"")


def test_an_empty_histogram_has_no_bars() -> None:
    one = layer(None)
    one["sensitivity"]["weight_grids"] |= {"counts": np.zeros(64), "importance": np.full(64, np.nan), "grids": []}
    _, bars = unpack(*pack_distributions([one]))
    assert not bars.any()


def test_a_light_layer_leaves_out_what_follows_and_changes_nothing() -> None:
    one = layer(3)
    light = lighten(one)
    assert light["sensitivity"]["weights"]["tensor"] == {
        "predicted": [0.12346],
        "spread": [0.123],
        "confidence": ["high"],
    }
    assert "grids" not in light["sensitivity"]["entering"]
    assert "grids" in one["sensitivity"]["entering"]
    assert one["sensitivity"]["weights"]["tensor"]["value"] == [0.1]
    assert lighten({"sensitivity": None, "step": 0.12345678901}) == {"sensitivity": None, "step": 0.12345678901}


VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3) | st.lists(inner, max_size=3),
    max_leaves=8,
)


def by_rows(found: Any) -> Any:
    """What the page's script does with columns."""
    if not isinstance(found, dict):
        return found
    columns = {field: by_rows(column) for field, column in found["columns"].items()}
    lengths = {len(column) for column in columns.values()}
    (length,) = lengths
    rows = [{field: column[i] for field, column in columns.items()} for i in range(length)]
    for i in found["none"]:
        rows.insert(i, None)
    return rows


@given(st.lists(VALUES, max_size=5))
def test_columns_can_be_turned_back(items: list[Any]) -> None:
    assert by_rows(by_columns(items)) == items


@example(2.9774707105582116e38, 2)
@given(st.floats(width=32), st.integers(2, 23))
def test_rounded_numbers_are_as_near_as_their_bits_allow(value: float, bits: int) -> None:
    rounded = float(round_bits(np.float32([value]), bits)[0])
    if np.isfinite(value) and 1e-30 < abs(value) < 1e38:
        assert abs(rounded - value) <= abs(value) * 2.0**-bits
        assert np.float32(rounded).view(np.uint32) & (2 ** (24 - bits) - 1) == 0
    elif not np.isfinite(value):
        assert str(rounded) == str(value)
    else:
        assert np.isfinite(rounded)
