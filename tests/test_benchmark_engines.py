"""Files are measured in the engines that run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qvis
from tests.test_benchmark import Net


def write_onnx(file: Path, net: Net, *, normalized: bool = True) -> Path:
    """The net as an ONNX file, with its normalizations or with weights that these are folded into."""
    from onnx import TensorProto, helper, numpy_helper, save

    fuse = torch.nn.utils.fusion.fuse_conv_bn_eval
    first, second = (net.first, net.second) if normalized else (fuse(net.first, net.norm), fuse(net.second, net.after))
    tensors: dict[str, Any] = {"head.weight": net.head.weight, "head.bias": net.head.bias}
    nodes = []

    def convolve(name: str, conv: nn.Conv2d, norm: nn.BatchNorm2d, entering: str) -> str:
        tensors[f"{name}.weight"] = conv.weight
        given = [entering, f"{name}.weight"]
        if conv.bias is not None:
            tensors[f"{name}.bias"] = conv.bias
            given.append(f"{name}.bias")
        nodes.append(helper.make_node("Conv", given, [f"{name}_out"], name))
        if not normalized:
            return f"{name}_out"
        parts = {"scale": norm.weight, "shift": norm.bias, "mean": norm.running_mean, "var": norm.running_var}
        tensors.update({f"{name}_norm.{part}": values for part, values in parts.items()})
        given = [f"{name}_out", *(f"{name}_norm.{part}" for part in parts)]
        nodes.append(helper.make_node("BatchNormalization", given, [f"{name}_norm"], f"{name}_norm"))
        return f"{name}_norm"

    nodes.append(helper.make_node("Relu", [convolve("first", first, net.norm, "x")], ["a"]))
    tensors.update(low=torch.tensor(0.0), high=torch.tensor(6.0))
    nodes.append(helper.make_node("Clip", [convolve("second", second, net.after, "a"), "low", "high"], ["b"]))
    nodes.append(helper.make_node("GlobalAveragePool", ["b"], ["c"]))
    nodes.append(helper.make_node("Flatten", ["c"], ["d"]))
    nodes.append(helper.make_node("Gemm", ["d", "head.weight", "head.bias"], ["y"], "head", transB=1))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", ["n", 3, 10, 9]), ("y", ["n", 4]))
    ]
    stored = [numpy_helper.from_array(values.detach().numpy(), name) for name, values in tensors.items()]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], stored)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)
    return file


def test_files_are_measured_in_onnxruntime(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    x = np.random.default_rng(0).normal(size=(20, 3, 10, 9)).astype(np.float32)
    net = Net()
    with torch.no_grad():
        labels = net(torch.as_tensor(x)).argmax(1).numpy()
    exact = write_onnx(tmp_path / "exact.onnx", net)
    folded = write_onnx(tmp_path / "folded.onnx", net, normalized=False)
    rounded = Net()
    with torch.no_grad():
        rounded.head.weight.copy_((rounded.head.weight * 64).round() / 64)
    files = [exact, folded, write_onnx(tmp_path / "rounded.onnx", rounded)]
    found = qvis.benchmark(
        files,
        exact,
        data=x,
        labels=labels,
        calls=3,
        warmup=1,
        batch_sizes=(1, 4),
        names=["float", "same", "folded", "q"],
    )
    baseline, same, fused, changed = found.variants
    assert baseline.engine.startswith("onnxruntime")
    assert baseline.file_bytes == exact.stat().st_size
    assert baseline.parameter_bytes == 4 * sum(one.numel() for one in net.state_dict().values() if one.ndim) + 8
    for variant in found.variants:
        assert variant.answers is not None
        assert variant.answers.top1 is not None
        assert variant.answers.top1 > 0.9
        assert [(one.batch, len(one.seconds)) for one in variant.latencies] == [(1, 3), (4, 3)]
        assert (variant.peak_bytes or 0) > 0 or variant.no_memory.startswith("Windows")
    assert same.sqnr_db == np.inf
    assert [(one.name, one.found) for one in same.layers] == [(name, name) for name in ("first", "second", "head")]
    # in qvis' own runner and in the engine: nothing but float32 in between, before and behind normalizations
    assert all(one.sqnr_db > 90 for variant in (same, fused) for one in variant.layers)
    assert len(fused.layers) == 3
    errors = {one.name: one.sqnr_db for one in changed.layers}
    assert errors["first"] > 90
    assert errors["second"] > 90
    assert 10 < errors["head"] < 60
    assert same.no_layers == fused.no_layers == changed.no_layers == ""
    assert found.changed_counts[:3] == (0, 0, 0)
