"""Runs all models on the same samples and compares what they answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvis.analysis.answers import labels_of, right_answers, why_no_answers
from qvis.benchmarking.contenders import Contender, first_line
from qvis.benchmarking.outputs import Matching, match_outputs
from qvis.benchmarking.pictures import picture_of
from qvis.benchmarking.records import Answers, ChangedSample
from qvis.errors import BadArgumentError
from qvis.layers import FloatArray, decibels
from qvis.running import Batch, Track, silently

SHOWN = 24
"""So many changed samples of each variant are kept, the surest first."""
TOP = 5

Classes = NDArray[np.int64]


@dataclass
class Tally:
    """What one model put out, summed up over batches."""

    contender: Contender
    matching: Matching | None = None
    power: FloatArray | None = None
    noise: FloatArray | None = None
    scores: list[FloatArray] = field(default_factory=list)
    """Of the first output; empty where that is no scores."""
    broken: bool = False
    """Whether some outputs are NaN or infinite."""

    def add(self, outputs: Sequence[FloatArray], reference: Sequence[FloatArray] | None) -> None:
        """Take the outputs for a batch in; the reference are the baseline's, None for the baseline itself."""
        self.broken |= any(not np.isfinite(one).all() for one in outputs)
        if reference is not None:
            if self.matching is None:
                self.matching = match_outputs(self.contender.name, outputs, reference)
                self.contender.notes.extend(self.matching.notes)
            outputs = self.matching.apply(outputs)
            pairs = list(zip(outputs, reference, strict=False))
            with np.errstate(invalid="ignore", over="ignore"):  # of infinite outputs, which are told of
                power = np.array([_power(exact) for _, exact in pairs])
                noise = np.array([_power(exact.astype(np.float64) - found) for found, exact in pairs])
            self.power = power if self.power is None else self.power + power
            self.noise = noise if self.noise is None else self.noise + noise
        if outputs and outputs[0].ndim == 2:
            self.scores.append(outputs[0])

    @property
    def sqnr_db(self) -> float | None:
        """Of all outputs, each counting the same; None for the baseline."""
        if self.power is None or self.noise is None:
            return None
        used = self.power > 0
        with np.errstate(invalid="ignore"):
            shares = self.noise[used] / self.power[used]
        return decibels(1.0, float(shares.mean())) if used.any() else float("nan")


def _power(values: FloatArray) -> float:
    flat = values.astype(np.float64).reshape(-1)
    return float(flat @ flat)


@dataclass(frozen=True)
class Compared:
    """What all models answered."""

    answers: tuple[Answers | None, ...]
    sqnr_db: tuple[float | None, ...]
    per_class: tuple[tuple[tuple[str, int, int, int], ...], ...]
    classes: tuple[str, ...]
    labelled: bool
    changed: tuple[ChangedSample, ...]
    changed_counts: tuple[int, ...]
    notes: tuple[str, ...]


def compare_answers(
    contenders: Sequence[Contender],
    batches: Sequence[Batch],
    *,
    has_baseline: bool,
    strict: bool = False,
    names: Sequence[str] = (),
    track: Track = silently,
) -> Compared:
    """Run all models on all samples.

    Parameters
    ----------
    contenders
        The baseline first, where there is one.
    batches
        The samples, with labels or without.
    strict
        Whether labels must be compared with the outputs; else a note says where that cannot be.
    names
        Of the classes; numbers where there are none.

    Raises
    ------
    BadArgumentError
        Outputs do not go together, or labels are of other classes than the outputs.
    """
    tallies = [Tally(one) for one in contenders]
    no_answers = ""
    for number, batch in enumerate(track(batches, "Answering")):
        reference: list[FloatArray] | None = None
        for place, tally in enumerate(tallies):
            try:
                outputs = tally.contender.run(batch)
            except Exception as error:  # each engine has its own kinds
                why = first_line(error).removeprefix("data: ")
                raise BadArgumentError(
                    f"data: the model {tally.contender.name!r} cannot be run on them: {why}"
                ) from error
            tally.add(outputs, reference)
            if number == 0 and not no_answers and batch.labels is not None:
                no_answers = _check_labels(tally, outputs, batches, strict)
            if has_baseline and place == 0:
                reference = outputs
    labels = None
    if batches[0].labels is not None and not no_answers:
        labels = np.concatenate([labels_of(batch) for batch in batches])
    total = sum(batch.size for batch in batches)
    notes = [f"Right answers are not counted: {no_answers}."] if no_answers else []
    for tally in tallies:
        if tally.broken:
            tally.contender.notes.append("Some of its outputs are NaN or infinite.")
    scores = [None if no_answers else _whole_scores(tally, total, labels) for tally in tallies]
    return _summarize(scores, tallies, batches, labels, has_baseline=has_baseline, names=names, notes=notes)


def _check_labels(tally: Tally, outputs: Sequence[FloatArray], batches: Sequence[Batch], strict: bool) -> str:
    """Why the labels cannot be compared with the outputs, where that is not a mistake; empty where they can."""
    outputs = outputs if tally.matching is None else tally.matching.apply(outputs)
    why = why_no_answers(outputs, batches) if outputs else "there are no outputs that are numbers"
    # labels of classes that the outputs do not have are never meant; those of something else may be
    if why and (strict or why.startswith("there are labels")):
        raise BadArgumentError(
            f"labels: they do not go with the outputs of {tally.contender.name!r}: {why}; give a whole number from 0 "
            "for each sample, or leave the labels out"
        )
    return why


def _whole_scores(tally: Tally, total: int, labels: Classes | None) -> FloatArray | None:
    """The scores of all samples, (samples, classes); None where the first output is none.

    A single number for each sample is only a score of two classes where labels say so.
    """
    if not tally.scores or len({one.shape[1] for one in tally.scores}) > 1:
        return None
    scores: FloatArray = np.concatenate(tally.scores)
    if len(scores) != total or scores.shape[1] < (2 if labels is None else 1):
        return None
    return scores


def _summarize(
    scores: Sequence[FloatArray | None],
    tallies: Sequence[Tally],
    batches: Sequence[Batch],
    labels: Classes | None,
    *,
    has_baseline: bool,
    names: Sequence[str],
    notes: Sequence[str],
) -> Compared:
    widths = [max(2, one.shape[1]) for one in scores if one is not None]
    spelled: tuple[str, ...] = ()
    if labels is not None and widths:
        spelled = tuple(names[place] if place < len(names) else str(place) for place in range(max(widths)))
    first = _answer(scores[0], labels, None) if scores[0] is not None else None
    baseline = first if has_baseline else None
    answers = [
        first if place == 0 else None if one is None else _answer(one, labels, baseline)
        for place, one in enumerate(scores)
    ]
    found = [
        [] if place == 0 or baseline is None or answer is None else find_changed(place, answer, baseline, labels)
        for place, answer in enumerate(answers)
    ]
    per_class = tuple(
        count_classes(answer, baseline, labels, spelled)
        if place and baseline is not None and answer is not None and labels is not None
        else ()
        for place, answer in enumerate(answers)
    )
    return Compared(
        tuple(answers),
        tuple(tally.sqnr_db for tally in tallies),
        per_class,
        spelled,
        labels is not None,
        tuple(_with_picture(one, batches) for one in keep(found)),
        tuple(len(samples) for samples in found),
        tuple(notes),
    )


def _answer(scores: FloatArray, labels: Classes | None, baseline: Answers | None) -> Answers:
    chosen, confidence = choose(scores)
    top1 = top5 = agreement = None
    if labels is not None:
        top1 = float(right_answers(scores, labels).mean())
        top5 = float((rank(scores, labels) < TOP).mean()) if scores.shape[1] > TOP else None
    if baseline is not None and baseline.chosen is not None:
        agreement = float((chosen == baseline.chosen).mean())
    return Answers(top1, top5, agreement, chosen, confidence)


def choose(scores: FloatArray) -> tuple[Classes, FloatArray]:
    """The class with the largest score of each sample, and how far that is above the next one, (samples,) each."""
    if scores.shape[1] == 1:
        # one score for two classes: a share or a logit, whose distance to the threshold counts
        positive = right_answers(scores, np.ones(len(scores), np.int64))
        shares = bool(np.all((scores >= 0) & (scores <= 1)))
        return positive.astype(np.int64), np.abs(scores[:, 0] - (0.5 if shares else 0.0))
    two = np.partition(scores.astype(np.float64), -2, axis=1)[:, -2:]
    with np.errstate(invalid="ignore"):
        return scores.argmax(axis=1).astype(np.int64), two[:, 1] - two[:, 0]


def rank(scores: FloatArray, labels: Classes) -> Classes:
    """How many classes come before the label, (samples,); of equal scores the class with the smaller number does."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = np.arange(scores.shape[1]) < labels[:, None]
    found: Classes = ((scores > own) | ((scores == own) & before)).sum(axis=1)
    return found


def find_changed(place: int, answer: Answers, baseline: Answers, labels: Classes | None) -> list[ChangedSample]:
    """The samples that a variant answers otherwise than the baseline, those that were the surest first."""
    assert answer.chosen is not None
    assert baseline.chosen is not None
    assert baseline.confidence is not None
    changed = np.flatnonzero(answer.chosen != baseline.chosen)
    order = changed[np.argsort(-baseline.confidence[changed], kind="stable")]
    return [
        ChangedSample(
            place,
            int(at),
            None if labels is None else int(labels[at]),
            int(baseline.chosen[at]),
            int(answer.chosen[at]),
            float(baseline.confidence[at]),
        )
        for at in order
    ]


def keep(found: Sequence[Sequence[ChangedSample]]) -> list[ChangedSample]:
    """The first :data:`SHOWN` samples of each variant, with what all others answer to these; the surest first."""
    kept = {one.index for samples in found for one in samples[:SHOWN]}
    chosen = [one for samples in found for one in samples if one.index in kept]
    return sorted(chosen, key=lambda one: (-one.confidence, one.index, one.variant))


def _with_picture(sample: ChangedSample, batches: Sequence[Batch]) -> ChangedSample:
    at = sample.index
    for batch in batches:
        if at < batch.size:
            return replace(sample, picture=picture_of(batch, at))
        at -= batch.size
    return sample


def count_classes(
    answer: Answers, baseline: Answers, labels: Classes, names: Sequence[str]
) -> tuple[tuple[str, int, int, int], ...]:
    """For each class that has labels: its name, its samples, and the right answers of the baseline and of this one."""
    rows = []
    for label, name in enumerate(names):
        own = labels == label
        if own.any():
            right = [int((one.chosen[own] == label).sum()) for one in (baseline, answer) if one.chosen is not None]
            rows.append((name, int(own.sum()), right[0], right[1]))
    return tuple(rows)


def class_names(data: Any) -> tuple[str, ...]:
    """The names of the classes where the data are a folder of folders of images, numbered in their order."""
    folder = Path(data) if isinstance(data, (str, Path)) else None
    if folder is None or not folder.is_dir():
        return ()
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))
