"""How much memory the analysis of a big file takes, against the largest tensor in it.

    .venv/bin/python benchmarks/checkpoint_memory.py

Writes 32 tensors of float32, one of them larger than the others, into a file of each format, and analyzes each in a
process of its own, in which everything is imported, and a small file analyzed, before the measurement starts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

TENSORS = 32
MB = 1e6


def main() -> None:
    """Print the table, or, as a process of it, one number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512, help="size of each file (default 512)")
    parser.add_argument("--measure", nargs=2, type=Path, metavar=("SMALL", "FILE"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        print(measure(*chosen.measure))
        return
    shapes = shapes_of(chosen.megabytes)
    largest = max(rows * columns * 4 for rows, columns in shapes) / MB
    whole = sum(rows * columns * 4 for rows, columns in shapes) / MB
    print(f"{len(shapes)} tensors, {whole:.0f} MB of float32, the largest {largest:.0f} MB")
    print(f"{'':14}{'growth MB':>10}{'x largest':>10}")
    for name, write in WRITERS.items():
        with tempfile.TemporaryDirectory() as folder:
            small, path = Path(folder, "small", name), Path(folder, "big", name)
            for file, wanted in ((small, [(64, 64)] * 2), (path, shapes)):
                file.parent.mkdir()
                write(file, wanted)
            command = [sys.executable, __file__, "--measure", str(small), str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        growth = float(done.stdout) / MB
        print(f"{name:14}{growth:10.0f}{growth / largest:10.1f}")


def measure(small: Path, path: Path) -> int:
    """By how many bytes the peak of this process grows while it analyzes a file."""
    from measure_call import PeakMemory

    from qvis.analysis import analyze

    analyze(small)
    memory = PeakMemory()
    assert len(analyze(path).layers) == TENSORS
    return memory.growth()


def shapes_of(megabytes: int) -> list[tuple[int, int]]:
    """As many rows of 1024 numbers as make the size; the last tensor is twice as large as the others."""
    rows = megabytes * 10**6 // (4 * 1024) // (TENSORS + 1)
    return [(rows, 1024)] * (TENSORS - 1) + [(2 * rows, 1024)]


# ---------------------------------------------------------------------------------------------------------------------
# The files, written tensor by tensor where the format's package can


def weights(shapes: list[tuple[int, int]]) -> Iterator[tuple[str, np.ndarray]]:
    """Names and random numbers, the same for each format."""
    random = np.random.default_rng(0)
    for i, shape in enumerate(shapes):
        yield f"layer{i}", random.standard_normal(shape, dtype=np.float32)


def safetensors(path: Path, shapes: list[tuple[int, int]]) -> None:
    """A file of the package ``safetensors``."""
    from safetensors.numpy import save_file

    save_file({f"{name}.weight": weight for name, weight in weights(shapes)}, path)


def npz(path: Path, shapes: list[tuple[int, int]]) -> None:
    """Arrays of NumPy, not compressed."""
    np.savez(path, **dict(weights(shapes)))


def torch_state(path: Path, shapes: list[tuple[int, int]]) -> None:
    """A state dict of PyTorch."""
    import torch

    torch.save({f"{name}.weight": torch.from_numpy(weight) for name, weight in weights(shapes)}, path)


def keras_weights(path: Path, shapes: list[tuple[int, int]]) -> None:
    """Weights of Keras 3, laid out as ``Model.save_weights`` does."""
    import h5py

    with h5py.File(path, "w") as file:
        for name, weight in weights(shapes):
            file[f"layers/{name}/vars/0"] = weight


def onnx_external(path: Path, shapes: list[tuple[int, int]]) -> None:
    """A chain of matrix products, whose numbers are in a file beside the model."""
    import onnx
    from onnx import TensorProto, helper

    nodes, initializers, offset = [], [], 0
    with path.with_name("weights.data").open("wb") as data:
        for name, weight in weights(shapes):
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=weight.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "weights.data"), ("offset", offset), ("length", weight.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            offset += data.write(weight.tobytes())
            initializers.append(tensor)
            size = weight.shape[0]
            nodes.append(helper.make_node("Gemm", [f"x{size}", name], [f"{name}_out"]))
    floats = {rows: helper.make_tensor_value_info(f"x{rows}", TensorProto.FLOAT, [1, rows]) for rows, _ in shapes}
    outputs = [
        helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, [1, columns])
        for node, (_, columns) in zip(nodes, shapes, strict=True)
    ]
    graph = helper.make_graph(nodes, "graph", list(floats.values()), outputs, initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)


WRITERS: dict[str, Callable[[Path, list[tuple[int, int]]], None]] = {
    "m.safetensors": safetensors,
    "m.npz": npz,
    "m.pt": torch_state,
    "m.weights.h5": keras_weights,
    "m.onnx": onnx_external,
}

if __name__ == "__main__":
    main()
