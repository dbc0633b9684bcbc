"""Makes a model ready to be judged: reads it, finds its graph, and folds normalizations into weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import NamedTuple

import numpy as np

from qvis import adapters
from qvis.data import example_batch, load_batches, noise_like, split
from qvis.errors import BadArgumentError, NoGraphError
from qvis.folding import Folded, fold_network, verify
from qvis.layers import Network
from qvis.running import Batch, Runner
from qvis.words import count

PASSES = 64
"""Backward passes that the samples are spread over: more give no better ranking."""
MOST_PASSES = 256
MOST_TOGETHER = 16
"""Samples in one of them, which all are in memory with what the model keeps of them."""
BATCH_BYTES = 2**22
"""Inputs of about this size are run together."""
KEPT = 1e-5
"""How far outputs may move, relative to the largest, when normalizations are folded."""


@dataclass(frozen=True)
class Ready:
    """A model's layers as they will be quantized."""

    network: Network
    """With normalizations folded in, and the graph where there is one."""
    folded: Folded | None = None
    """None where nothing was folded."""
    notes: tuple[str, ...] = ()

    @property
    def refused(self) -> Mapping[str, str]:
        """Why a normalization was not folded, by its name."""
        return {} if self.folded is None else self.folded.refused


def prepare(
    model: object,
    *,
    example: Batch | None = None,
    fold: bool = True,
    name: str | None = None,
    channel_axis: int | Mapping[str, int] | None = None,
) -> Ready:
    """Read all layers of a model, and fold what a quantizer would fold; the arguments are those of ``qvis.analyze``.

    ``example`` is a batch that the model can be run on; without it some models' graphs cannot be found.
    """
    network = adapters.read(model, name=name, channel_axis=channel_axis)
    try:
        network = replace(network, graph=adapters.graph(model, example))
    except NoGraphError as error:
        network = replace(network, no_graph=str(error))
    folded = None
    if fold and network.graph is not None and network.graph.norms:
        folded = fold_network(network)
        network = folded.network
    return Ready(network, folded)


def place(ready: Ready, model: object, runner: Runner, batch: Batch, name: str | None = None) -> Ready:
    """Have the runner run on the folded weights, after checking that they compute the same.

    Where they do not, the weights as they are stored are judged, and a note says so.
    """
    if ready.folded is None or not ready.folded.folds:
        return ready
    change = verify(runner, split(batch, min(batch.size, 4))[:1], ready.folded)
    if change <= KEPT:
        note = f"{count(len(ready.folded.folds), 'normalization')} folded; the outputs changed by {change:.0e} at most."
        return replace(ready, notes=(*ready.notes, note))
    runner.place({}, {})
    unfolded = prepare(model, example=batch, fold=False, name=name)
    note = f"Normalizations were not folded: that changed the outputs by {change:.1e} of the largest."
    return replace(unfolded, notes=(*ready.notes, note))


class Opened(NamedTuple):
    """A model that is ready to be run, and what to run it on."""

    ready: Ready
    runner: Runner
    batches: Sequence[Batch]
    source: str
    """What the batches are: ``32 samples``, or ``made-up inputs``."""


def open_model(
    model: object,
    inputs: object,
    example_inputs: object,
    *,
    labels: object = None,
    loss: object = None,
    samples: int,
    fold: bool = True,
    name: str | None = None,
    seed: int = 0,
) -> Opened:
    """Load data or have inputs made up, and make the model ready; the arguments are those of ``qvis.sensitivity``."""
    notes: list[str] = []
    batches: Sequence[Batch] = ()
    if inputs is not None:
        batches = cut(load_batches(inputs, labels=labels, samples=samples, notes=notes))
    elif example_inputs is None or loss is not None:
        what = "a loss cannot be judged without data" if loss is not None else "got none"
        raise BadArgumentError(
            f"inputs: {what}; give data, or instead example_inputs, of which only shapes and types are used, such as "
            "(1, 3, 224, 224)"
        )
    example = example_batch(example_inputs) if example_inputs is not None else split(batches[0], 2)[0]
    ready = prepare(model, example=example, fold=fold, name=name)
    runner = adapters.runner(model, ready.network, loss)
    source = count(sum(batch.size for batch in batches), "sample")
    if not batches:
        batches, how = _imitate(runner, example, samples, seed)
        source = "made-up inputs"
        trust = "Layers are ranked well, figures" if "shaped" in how else "Layers are ranked roughly, figures"
        notes.append(f"No data: the inputs are made up ({how}). {trust} may be off by several dB.")
    ready = place(ready, model, runner, batches[0], name)
    return Opened(replace(ready, notes=(*ready.notes, *notes)), runner, batches, source)


def cut(batches: Sequence[Batch]) -> list[Batch]:
    """Batches of large samples cut into smaller ones, which run quicker, since what they make stays in the cache."""
    pieces: list[Batch] = []
    for batch in batches:
        arrays = [*batch.args, *batch.kwargs.values()]
        each = sum(getattr(one, "nbytes", 0) for one in arrays) // batch.size
        together = BATCH_BYTES // each if each else batch.size
        pieces += split(batch, min(batch.size, 1 << max(0, together.bit_length() - 1)))
    return pieces


def _imitate(runner: Runner, example: Batch, samples: int, seed: int) -> tuple[list[Batch], str]:
    """Inputs made up for a model, and how."""
    imitate = getattr(runner, "imitate", None)
    if imitate is None:
        return noise_like(example, samples, seed), "plain noise"
    made: tuple[list[Batch], str] = imitate(example, samples, seed)
    return made


def spread_passes(batches: Iterable[Batch], probes: int, seed: int) -> list[Batch]:
    """The samples cut into batches for the backward passes, in random order, as often as there are probes.

    Of very many samples a random part is taken: :data:`MOST_PASSES` are enough for any ranking.
    """
    batches = list(batches)
    total = sum(batch.size for batch in batches)
    size = min(MOST_TOGETHER, max(1, ceil(total * probes / PASSES)))
    pieces = [piece for batch in batches for piece in split(batch, size)]
    generator = np.random.default_rng(seed)
    return [pieces[i] for _ in range(probes) for i in generator.permutation(len(pieces))][:MOST_PASSES]
