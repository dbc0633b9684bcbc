"""Run in a process of its own: opens a model, runs it, and prints by how many bytes that raised the process' peak.

``python -m qvis.benchmarking.peak MODEL INPUTS.npz THREADS``
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path

import numpy as np

from qvis.running import Batch

NEEDED = {
    ".tflite": ("ai_edge_litert.interpreter",),
    ".onnx": ("onnx", "onnxruntime"),
    ".pt2": (
        "torch._inductor.compile_fx",
        "torch._export",
        "torchao.quantization.pt2e.quantize_pt2e",
        "torchao.quantization.pt2e.lowering",
    ),
    ".keras": ("keras",),
    ".h5": ("keras",),
}
"""What opening and running a file imports, most of it: it is there before the count begins."""
NAMED = "name "
"""Begins the names of inputs by name in the file of inputs."""


def peak() -> int:
    """The most memory that this process has had, in bytes.

    Raises
    ------
    OSError
        The system does not tell.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        raise OSError(f"{sys.platform} does not tell a process the peak of its memory") from None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def forget() -> None:
    """Let the peak begin anew where the system can: importing may have taken more than is kept."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def write_inputs(file: Path, batch: Batch) -> None:
    """Arrays of a batch into a file, for :func:`read_inputs`."""
    positional = {str(place): array for place, array in enumerate(batch.args)}
    np.savez(file, **positional, **{NAMED + name: array for name, array in batch.kwargs.items()})


def read_inputs(file: Path) -> Batch:
    """The batch that :func:`write_inputs` wrote."""
    with np.load(file, allow_pickle=False) as archive:
        found = {name: archive[name] for name in archive.files}
    kwargs = {name.removeprefix(NAMED): array for name, array in found.items() if name.startswith(NAMED)}
    args = tuple(found[str(place)] for place in range(len(found) - len(kwargs)))
    return Batch(args, kwargs, size=len(next(iter(found.values()))))


def rise(model: Path, batch: Batch, threads: int) -> int:
    """By how many bytes opening the model and running it once raises the peak of this process."""
    from qvis.quantization.engines import open_engine

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in NEEDED.get(model.suffix.lower(), ()):
            with suppress(ImportError):
                import_module(name)
    forget()
    before = peak()
    open_engine(model, threads=threads).prepare(batch)()
    return peak() - before


def main(arguments: list[str]) -> None:
    """Print the result, or what failed, as one line of JSON."""
    model, inputs, threads = arguments
    printed = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            found: dict[str, int | str] = {"bytes": rise(Path(model), read_inputs(Path(inputs)), int(threads))}
    except Exception as error:  # each engine has its own kinds
        found = {"failed": f"{type(error).__name__}: {error}"}
    print(f"\n{json.dumps(found)}", file=printed, flush=True)
    # threads of frameworks may hang while the interpreter ends
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
