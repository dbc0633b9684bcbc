"""Times calls of several models. They take turns, so that what slows the machine down slows all of them down."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from qvis.benchmarking.contenders import Contender, first_line, gather
from qvis.benchmarking.records import Latency, Ratio
from qvis.layers import FloatArray
from qvis.running import Batch, Track, silently
from qvis.words import count

SECONDS = 10.0
"""A series takes about so long at most: slow models are called less often."""
LEAST = 5
"""But so often at least."""
DRAWS = 1000
"""Resamples that the interval of a ratio is found from."""

Clock = Callable[[], int]
"""Nanoseconds since some moment."""


def take_turns(
    calls: Sequence[Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    seed: int = 0,
    seconds: float = SECONDS,
    clock: Clock = time.perf_counter_ns,
) -> FloatArray:
    """The seconds that each call took in each round, (calls, rounds).

    In a round each call is made once, in an order drawn anew. There are fewer rounds than asked for where they would
    take longer than ``seconds``, but :data:`LEAST` at least; warming up stops after a quarter of that.
    """
    order = np.random.default_rng(seed)
    taken = np.empty((len(calls), rounds))
    done = 0
    with _undisturbed():
        start = clock()
        for _ in range(warmup):
            for call in calls:
                call()
            if clock() - start > seconds * 1e9 / 4:
                break
        start = clock()
        while done < rounds and (done < LEAST or clock() - start < seconds * 1e9):
            for place in order.permutation(len(calls)):
                call = calls[place]
                before = clock()
                call()
                taken[place, done] = clock() - before
            done += 1
    return taken[:, :done] * 1e-9


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without collecting garbage in between."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def compare(seconds: FloatArray, baseline: FloatArray, *, batch: int, threads: int, seed: int = 0) -> Ratio:
    """The ratio of the medians, with the interval in which it lies in nine of ten resamples of the rounds."""
    rounds = np.random.default_rng(seed).integers(len(seconds), size=(DRAWS, len(seconds)))
    drawn = np.median(seconds[rounds], axis=1) / np.median(baseline[rounds], axis=1)
    low, high = np.quantile(drawn, (0.05, 0.95))
    value = float(np.median(seconds) / np.median(baseline))
    # few rounds may put the ratio itself outside
    return Ratio(batch, threads, value, min(float(low), value), max(float(high), value))


def measure(
    contenders: Sequence[Contender],
    batches: Sequence[Batch],
    *,
    batch_sizes: Sequence[int],
    threads: Sequence[int],
    calls: int,
    warmup: int,
    seed: int = 0,
    notes: list[str],
    track: Track = silently,
    clock: Clock = time.perf_counter_ns,
) -> dict[int, tuple[Latency, ...]]:
    """The latencies of the contenders by their places; those whose engine imitates integers have none.

    A model that takes a fixed number of samples only is timed with that, and so are all that take any number. What
    could not be timed is told in the contender's own notes, what was called less often than asked for in ``notes``.
    """
    timed = [place for place, one in enumerate(contenders) if not one.engine.simulated]
    fixed = {place: contenders[place].engine.fixed_batch for place in timed}
    sizes = sorted({*batch_sizes, *(size for size in fixed.values() if size is not None)})
    found: dict[int, list[Latency]] = {place: [] for place in timed}
    for place, size in fixed.items():
        if size is not None and set(batch_sizes) != {size}:
            contenders[place].notes.append(f"It takes {count(size, 'sample')} at once only, and was timed with that.")
    opened: dict[int, Contender] = {}
    now = 0
    for number, size in track([(number, size) for number in threads for size in sizes], "Timing"):
        if number != now:
            # one set of engines at a time: several would share the processor's caches and memory
            opened.clear()
            opened.update({place: contenders[place].on_threads(number) for place in timed})
            for place, one in opened.items():
                if one.engine.name != contenders[place].engine.name:
                    contenders[place].notes.append(f"On {count(number, 'thread')} its engine was {one.engine.name}.")
            now = number
        taking = {place: opened[place] for place in timed if fixed[place] in (None, size)}
        prepared = _prepare(taking, gather(batches, size), number)
        if not prepared:
            continue
        taken = take_turns(list(prepared.values()), rounds=calls, warmup=warmup, seed=seed, clock=clock)
        if taken.shape[1] < calls:
            notes.append(
                f"{count(size, 'sample')} on {count(number, 'thread')}: {taken.shape[1]} calls of each model were "
                f"timed instead of {calls}, since they are slow."
            )
        for place, seconds in zip(prepared, taken, strict=True):
            found[place].append(Latency(size, number, seconds))
    return {place: tuple(latencies) for place, latencies in found.items()}


def _prepare(contenders: Mapping[int, Contender], batch: Batch, threads: int) -> dict[int, Callable[[], object]]:
    """What runs each of them once; those that fail are left out, and say so."""
    prepared = {}
    for place, one in contenders.items():
        try:
            call = one.engine.prepare(one.arrange(batch))
            call()
        except Exception as error:  # each engine has its own kinds
            one.notes.append(
                f"It could not be timed with {count(batch.size, 'sample')} on {count(threads, 'thread')}: "
                f"{first_line(error)}"
            )
            continue
        prepared[place] = call
    return prepared


def ratios(latencies: Sequence[Latency], baseline: Sequence[Latency], seed: int = 0) -> tuple[Ratio, ...]:
    """Relative to the baseline, wherever both were timed."""
    known = {(one.batch, one.threads): one.seconds for one in baseline}
    return tuple(
        compare(one.seconds, known[one.batch, one.threads], batch=one.batch, threads=one.threads, seed=seed)
        for one in latencies
        if (one.batch, one.threads) in known
    )
