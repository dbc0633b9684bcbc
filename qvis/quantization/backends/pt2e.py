"""PyTorch models to ``.pt2`` files: torch.export, torchao's quantization by export, and a grid for each weight.

A file holds each weight as 8-bit integers, of fewer bits where a layer has fewer, beside its steps; biases stay floats.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from qvis.errors import BadArgumentError, UnsupportedModelError
from qvis.quantization.backends.pt2e_program import Opened, open_model, quietly
from qvis.quantization.backends.pt2e_quantizer import Weight, is_real, weights_in, width_of
from qvis.quantization.backends.pt2e_saving import save, settled
from qvis.quantization.backends.torch_training import calibrated, check_training, prepared, train
from qvis.quantization.methods import FLOAT, Epoch, Job
from qvis.words import listed_names

_opened: dict[int, Opened] = {}
"""Models of jobs that have been checked and are still to be converted, which need not be followed twice."""


def check(job: Job) -> None:
    """Refuse what cannot be done; see :class:`qvis.quantization.methods.Backend`."""
    opened = _opened[id(job)] = open_model(job)
    weakref.finalize(job, _opened.pop, id(job), None)
    weights = list(weights_in(opened.graph, opened.layers))
    _check_widths(weights, job.bits)
    if not any(width_of(weight, job.bits) != FLOAT for weight in weights):
        raise UnsupportedModelError(
            "model: none of its layers is to be quantized and used by an operation that takes a quantized weight; "
            "those are convolutions, linear layers, products with a matrix, embeddings and recurrent layers"
        )
    if job.training is not None:
        check_training(job, opened)


def convert(job: Job, target: Path) -> tuple[Epoch, ...]:
    """Write the quantized model; see :class:`qvis.quantization.methods.Backend`."""
    epochs: tuple[Epoch, ...] = ()
    opened = _opened.pop(id(job), None) or open_model(job)
    job.notes.extend(_notes(job, opened))
    if job.training is not None and job.cell.method == "quantization_aware":
        graph, epochs = train(job, opened)
    else:
        graph = prepared(job, opened)
        calibrated(graph, job, opened)
    with quietly():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        converted = settled(convert_pt2e(graph, fold_quantize=False), opened.named(job.bits))
    save(converted, opened, target)
    return epochs


def _check_widths(weights: Sequence[Weight], bits: Mapping[str, int]) -> None:
    """One tensor has one width, also where several layers are rows of it."""
    for weight in weights:
        widths = {name: bits[name] for name in weight.names if name in bits}
        if len(set(widths.values())) > 1:
            raise BadArgumentError(
                f"bits: {listed_names(list(widths))} are parts of one tensor, and have widths "
                f"{', '.join(map(str, widths.values()))}; give them the same"
            )


def _notes(job: Job, opened: Opened) -> list[str]:
    """What is not as one might expect."""
    found = []
    if opened.batch is not None:
        found.append(f"the number of samples is fixed: the file takes {opened.batch} at once")
    weights = list(weights_in(opened.graph, opened.layers))
    used = {name for weight in weights for name in weight.names}
    idle = [name for name, width in job.bits.items() if width != FLOAT and name not in used]
    if idle:
        found.append(f"stay in float, since no operation takes them as a weight: {listed_names(idle)}")
    if job.cell.method == "weight_only":
        return found
    alone = [
        weight.names[0] if len(weight.names) < 2 else weight.path.rpartition(".")[0]
        for weight in weights
        if weight.names and width_of(weight, job.bits) != FLOAT and (weight.input is None or not is_real(weight.input))
    ]
    if alone:
        found.append(f"weights alone are integers, the arithmetic stays in float: {listed_names(sorted(set(alone)))}")
    return found
