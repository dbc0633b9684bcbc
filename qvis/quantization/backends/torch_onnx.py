"""Quantizes PyTorch models into ``.onnx`` files: exported by PyTorch, then quantized by ONNX Runtime.

``quantization_aware`` trains as for ``.pt2``; what comes of it is exported and quantized like any trained model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qvis.errors import BadArgumentError, UnsupportedModelError
from qvis.layers import Layer, Network
from qvis.quantization.backends import onnxruntime
from qvis.quantization.methods import CALIBRATED_ON, Epoch, Job, find_cell
from qvis.running import Batch
from qvis.words import listed_names

if TYPE_CHECKING:
    from qvis.quantization.backends.pt2e_program import Opened


def check(job: Job) -> None:
    """Refuse what cannot be followed or trained; see :class:`qvis.quantization.methods.Backend`.

    What ONNX Runtime cannot do shows once the model is exported, which takes long enough to do it once.
    """
    from qvis.quantization.backends.pt2e_program import open_model
    from qvis.quantization.backends.torch_training import check_training

    opened = open_model(job)
    if job.training is not None:
        check_training(job, opened)


def convert(job: Job, target: Path) -> tuple[Epoch, ...]:
    """Write the quantized model; see :class:`qvis.quantization.methods.Backend`."""
    from qvis.quantization.backends.pt2e_program import open_model
    from qvis.quantization.backends.torch_training import trained_module

    epochs: tuple[Epoch, ...] = ()
    opened = open_model(job)
    exported = _exported(job, opened)
    onnxruntime.check(exported)
    if job.cell.method == "quantization_aware":
        module, epochs, steps = trained_module(job)
        job = replace(job, model=module)
        exported = _exported(job, open_model(job))
        known = {name: layer.name for layer in exported.network.layers for name in (layer.name, *layer.aliases)}
        exported = replace(exported, steps={known[name]: one for name, one in steps.items() if name in known})
    onnxruntime.convert(exported, target)
    if opened.batch is not None:
        job.notes.append(f"the number of samples is fixed: the file takes {opened.batch} at once")
    return epochs


def _exported(job: Job, opened: Opened) -> Job:
    """What is left to do once the model is one of ONNX."""
    import torch

    from qvis import adapters
    from qvis.adapters.torch.graph import _first_line
    from qvis.quantization.backends.pt2e_program import quietly

    try:
        with quietly():
            program = torch.onnx.export(opened.program, dynamo=True, verbose=False)
            assert program is not None
            proto = program.model_proto
    except Exception as error:
        raise UnsupportedModelError(
            f"model: PyTorch cannot export it to ONNX ({_first_line(error)}); name the output .pt2, or .safetensors"
        ) from error
    network = adapters.read(proto, name=job.network.name)
    static = job.cell.method in ("post_training", "quantization_aware")
    return replace(
        job,
        model=proto,
        network=network,
        cell=find_cell("onnx", "post_training" if static else job.cell.method, ".onnx"),
        bits=widths_of(network, job.network, job.bits),
        calibration=[_in_order(batch, opened) for batch in _calibration(job)] if static else (),
        training=None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Layers


def widths_of(exported: Network, original: Network, bits: Mapping[str, int]) -> dict[str, int]:
    """The width of each layer of the exported graph.

    Most layers keep the names of their modules. Others, such as the gates of an LSTM, are known by their numbers, or by
    the module that they lie in where all of its layers have the same width.

    Raises
    ------
    UnsupportedModelError
        A layer could be several that have different widths.
    """
    found: dict[str, int] = {}
    known = {name: layer.name for layer in original.layers for name in (layer.name, *layer.aliases)}
    rest: list[Layer] = []
    for layer in exported.layers:
        name = next((known[one] for one in (layer.name, *layer.aliases) if known.get(one) in bits), None)
        if name is None:
            rest.append(layer)
        else:
            found[layer.name] = bits[name]
    taken = {known[name] for name in found if name in known}
    others = [layer for layer in original.layers if layer.name in bits and layer.name not in taken]
    for layer in rest:
        widths = {bits[name] for name in _alike(layer, others)} or _around(layer.name, bits) or set(bits.values())
        if len(widths) > 1:
            raise UnsupportedModelError(
                f"bits: in the exported graph {layer.name!r} is made of layers of the widths "
                f"{listed_names([str(one) for one in sorted(widths)])}; give the layers of that module the same width"
            )
        found[layer.name] = widths.pop()
    return found


def _alike(layer: Layer, others: Sequence[Layer]) -> list[str]:
    """The layers with the same numbers, maybe the other way round."""
    weight = layer.weight
    same = (weight.shape, weight.shape[::-1])
    candidates = [(other.name, other.weight) for other in others if _size(other) == weight.size]
    found = [(name, one) for name, one in candidates if one.shape in same]
    return [name for name, one in found if np.array_equal(one, weight) or np.array_equal(one.T, weight)][:1]


def _size(layer: Layer) -> int:
    return int(np.prod(layer.weight.shape))


def _around(name: str, bits: Mapping[str, int]) -> set[int]:
    """The widths of the layers in the innermost module that holds any."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        widths = {width for one, width in bits.items() if one == module or one.startswith(f"{module}.")}
        if widths:
            return widths
    return set()


# ---------------------------------------------------------------------------------------------------------------------
# Data


def _calibration(job: Job) -> list[Batch]:
    if job.calibration or job.training is None:
        return list(job.calibration)
    found: list[Batch] = []
    for batch in job.training.batches:
        if sum(one.size for one in found) >= CALIBRATED_ON:
            break
        found.append(batch)
    return found


def _in_order(batch: Batch, opened: Opened) -> Batch:
    """The tensors of a batch one after the other, as the exported graph takes them."""
    from torch.utils import _pytree as pytree

    unknown = [name for name in batch.kwargs if name not in opened.kwargs]
    if unknown:
        raise BadArgumentError(
            f"calibration_data: {unknown[0]!r} is no input of the example, which has "
            f"{listed_names(list(opened.kwargs)) or 'none by name'}"
        )
    named = {name: batch.kwargs[name] for name in opened.kwargs if name in batch.kwargs}
    leaves = [one for one in pytree.tree_leaves((tuple(batch.args), named)) if hasattr(one, "shape")]
    return Batch(tuple(leaves), labels=batch.labels, size=batch.size)
