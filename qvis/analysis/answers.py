"""Counts how many answers of a classifier are right, with some of its weights rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvis.analysis.study import STRETCH, Change, Study
from qvis.analysis.widths import Accuracy
from qvis.layers import FloatArray
from qvis.running import Batch

DRAWS = 4
"""Draws of the rounding that an accuracy is the mean of."""

Hits = NDArray[np.float64]
"""Whether each answer is right in each draw, (draws, answers); with numbers between 0 and 1 where two are mixed."""


class Answers:
    """The labels of some samples, and how often the first output of a model agrees with them."""

    def __init__(self, study: Study, batches: Sequence[Batch], seed: int = 0) -> None:
        self.study = study
        self.batches = batches
        self.labels = [labels_of(batch) for batch in batches]
        generator = np.random.default_rng(seed)
        self.stretches = [{name: 1 + STRETCH * generator.random() for name in study.weights} for _ in range(DRAWS)]
        self.count = sum(len(labels) for labels in self.labels)

    def hits(self, change: Change) -> Hits:
        """Which answers are right with this change, (draws, answers)."""
        stretches: Sequence[Any] = self.stretches if change.weights else [{}]
        found = np.zeros((DRAWS, self.count))
        for draw, stretch in enumerate(self.study.track(stretches, "Counting right answers")):
            outputs = (self.study.run(batch, change, stretch)[0] for batch in self.batches)
            pairs = zip(outputs, self.labels, strict=True)
            found[draw:] = np.concatenate([right_answers(scores, labels) for scores, labels in pairs])
        return found


def compare(hits: Hits, others: Hits) -> Accuracy:
    """The share of right answers, and the standard error of its difference to the other one.

    Answers differ from each other, and so do draws: the variances of both means add up.
    """
    apart = hits - others
    variance = sum(mean.var(ddof=1) / mean.size if mean.size > 1 else np.inf for mean in (apart.mean(0), apart.mean(1)))
    return Accuracy(float(hits.mean()), float(np.sqrt(variance)))


def why_no_answers(outputs: Sequence[FloatArray], batches: Sequence[Batch]) -> str:
    """Why the labels cannot be compared with the outputs; empty where they can."""
    if batches[0].labels is None:
        return "no labels"
    if isinstance(batches[0].labels, Mapping):
        return "the labels are several arrays"
    scores, labels = outputs[0], _as_array(batches[0].labels)
    if scores.ndim != 2:
        return f"the first output has shape {scores.shape}, not (samples, classes)"
    several = labels.ndim == 2 and labels.shape == scores.shape and scores.shape[1] > 1
    if not several and (labels.size != len(labels) or labels.dtype.kind not in "iub"):
        return f"the labels are {labels.dtype}, {labels[0].size} for each sample, not one whole number"
    most = max(2, scores.shape[1])
    for batch in batches:
        found = labels_of(batch)
        if found.size and not 0 <= found.min() <= found.max() < most:
            return f"there are labels from {found.min()} to {found.max()}, and {scores.shape[1]} classes"
    return ""


def labels_of(batch: Batch) -> NDArray[np.int64]:
    """The class of each sample; of labels with a number for each class, the largest."""
    labels = _as_array(batch.labels)
    if labels.ndim == 2 and labels.shape[1] > 1:
        labels = labels.argmax(axis=1)
    return labels.reshape(-1).astype(np.int64)


def _as_array(labels: Any) -> NDArray[Any]:
    """Labels as NumPy has them, from another device too."""
    return np.asarray(labels.detach().cpu() if hasattr(labels, "detach") else labels)


def right_answers(scores: FloatArray, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which samples have their largest score, or of one score its side, where the label is, (samples,)."""
    if scores.shape[1] > 1:
        right: NDArray[np.bool_] = scores.argmax(axis=1) == labels
        return right
    # one score for two classes: a share, or a logit
    shares = bool(np.all((scores >= 0) & (scores <= 1)))
    return np.asarray((scores[:, 0] > (0.5 if shares else 0.0)) == (labels > 0))
