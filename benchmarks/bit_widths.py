"""What a width for each layer brings over one width for all layers, on models that were really trained.

    python benchmarks/bit_widths.py
    python benchmarks/bit_widths.py --data FOLDER --models digits resnet56 --average 3 4 5

Trains some models on first use and keeps them. Widths are chosen on some samples; what they keep of the output is then
measured on others, as the mean over draws of the rounding, beside one width for all layers of the same size. So is what
the frontier was predicted to keep at sizes between the smallest and the largest.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isnan, nan
from typing import Any

import numpy as np
from rounding import count, part
from trained import Subject
from trained.command import Script, make_parser

import qvis
from qvis.analysis.answers import Answers, why_no_answers
from qvis.analysis.mixing import Mixer
from qvis.analysis.preparing import open_model
from qvis.analysis.study import Change, Study
from qvis.analysis.widths import BitWidths, Mix
from qvis.running import silently

MODELS = ("digits", "mobilenet", "transformer", "keras", "resnet56", "minilm")
AVERAGES = (3.0, 4.0, 5.0, 6.0)
POINTS = 12
"""Mixes of the frontier that are measured."""
RELIABLE_DB = 5
CLOSE_DB = 2
"""What is asked of the prediction above :data:`RELIABLE_DB`."""


@dataclass
class Row:
    """One size."""

    average: float
    bytes: int
    uniform_db: float
    mix_db: float
    spread_db: float
    gain_db: float
    error_db: float
    """Standard error of the gain."""
    predicted_db: float
    answers: tuple[float, float, float, float]
    """The share of right answers in float, with one width for all, with the mix of least damage, and with the mix that
    was chosen by answers; NaN without labels, and the last one where the mix of least damage was kept."""
    seconds: float
    """Of processor time."""


@dataclass
class Finding:
    """What was found about one model."""

    name: str
    note: str
    layers: int
    samples: int
    held_out: int
    rows: list[Row] = field(default_factory=list)
    frontier: list[tuple[float, float, float]] = field(default_factory=list)
    """Bits on average, dB predicted, and measured."""


def examine(subject: Subject, samples: int, held_out: int, averages: Sequence[float]) -> Finding:
    """Choose widths on one half of the samples, and measure them on the other."""
    half = count(subject.inputs) // 2
    given, other = part(subject.inputs, 0, half), part(subject.inputs, half, half + held_out)
    labels = [None if subject.labels is None else subject.labels[one] for one in (slice(half), slice(half, None))]
    judge: Judge | None = None
    found = Finding(subject.name, subject.note, 0, min(samples, half), 0)
    for average in averages:
        began = time.process_time()
        widths = qvis.bit_widths(subject.model, given, labels=labels[0], average_bits=average, samples=samples)
        seconds = time.process_time() - began
        judge = judge or Judge(subject.model, other, None if labels[1] is None else labels[1][:held_out], widths)
        found.layers, found.held_out = len(widths.layers), judge.study.samples
        found.rows.append(judge.row(average, widths, seconds))
        if not found.frontier:
            some = widths.frontier[:: max(1, len(widths.frontier) // POINTS)]
            measured = judge.mixer.measure(some)
            found.frontier = [(mix.average_bits, mix.predicted_db, mix.measured_db) for mix in measured]
    return found


class Judge:
    """Rounds a model for samples that its widths were not chosen on."""

    def __init__(self, model: Any, inputs: Any, labels: Any, widths: BitWidths) -> None:
        opened = open_model(model, inputs, None, labels=labels, samples=count(inputs))
        self.study = Study(opened.ready.network, opened.runner, opened.batches, [], silently)
        self.study.calibrate(locally=False)
        self.mixer = Mixer(self.study, widths.layers, widths.granularities)
        told = why_no_answers(opened.runner.run(opened.batches[0]), opened.batches)
        self.answers = None if told else Answers(self.study, opened.batches)
        self.right = nan if self.answers is None else float(self.answers.hits(Change()).mean())

    def share(self, mix: Mix | None) -> float:
        """How many answers are right with a mix."""
        if mix is None or self.answers is None:
            return nan
        return float(self.answers.hits(Change(mix.grids)).mean())

    def row(self, average: float, widths: BitWidths, seconds: float) -> Row:
        """What one mix keeps, beside one width for all of the same size or, between two widths, the narrower one."""
        near = max((mix for mix in widths.uniform if mix.average_bits <= average), key=lambda mix: mix.average_bits)
        uniform, mix = self.mixer.measure([near, widths.replaced or widths.chosen])
        gain = self.mixer.gain(uniform, mix)
        tried = [uniform, mix, None if widths.replaced is None else widths.chosen]
        assert mix.measured is not None
        return Row(
            average=average,
            bytes=mix.bytes,
            uniform_db=uniform.measured_db,
            mix_db=mix.measured_db,
            spread_db=mix.measured.spread_db,
            gain_db=gain.db,
            error_db=gain.error,
            predicted_db=mix.predicted_db,
            answers=(self.right, *map(self.share, tried)),
            seconds=seconds,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Telling


def describe(found: Finding) -> str:
    """The table of a model."""
    lines = [
        f"{found.name}: {found.note}; {found.layers} layers, widths chosen on {found.samples} samples and judged on "
        f"{found.held_out} others",
        "                                                              right answers                  CPU",
        "  bits    kB   uniform       mix        gain     predicted    float  uniform      mix  chosen    s",
    ]
    for row in found.rows:
        right = "  ".join(" " * 7 if isnan(one) else f"{one:7.1%}" for one in row.answers)
        lines.append(
            f"  {row.average:4g} {row.bytes / 1e3:6.0f} {row.uniform_db:6.1f} dB {row.mix_db:6.1f}"
            f" ±{row.spread_db:4.1f}"
            f" {row.gain_db:+6.1f} ±{row.error_db:4.1f} {row.predicted_db:8.1f} dB  {right}"
            f" {row.seconds:5.0f}"
        )
    off = [predicted - measured for _, predicted, measured in found.frontier if measured > RELIABLE_DB]
    if off:
        lines.append(
            f"  the frontier above {RELIABLE_DB} dB: predicted less measured {np.mean(off):+.1f} dB on average, "
            f"from {min(off):+.1f} to {max(off):+.1f}, at {len(off)} sizes"
        )
    return "\n".join(lines)


def judgement(findings: Sequence[Finding]) -> str:
    """Whether the bars are met."""
    rows = [(found.name, row) for found in findings for row in found.rows]
    worse = [f"{name} at {row.average:g} bits" for name, row in rows if row.gain_db < 2 * row.error_db]
    least = min(rows, key=lambda one: one[1].gain_db)
    off = [
        (abs(predicted - measured), found.name)
        for found in findings
        for _, predicted, measured in found.frontier
        if measured > RELIABLE_DB
    ]
    far = sorted({name for gap, name in off if gap > CLOSE_DB})
    return "\n".join(
        [
            f"Keeps more than one width for all of the same size, by more than chance: {len(rows) - len(worse)} of "
            f"{len(rows)}" + (f"; not {', '.join(worse)}" if worse else ""),
            f"Least gain: {least[1].gain_db:.1f} dB ({least[0]} at {least[1].average:g} bits)",
            f"Prediction of the frontier within {CLOSE_DB} dB above {RELIABLE_DB} dB: "
            f"{sum(gap <= CLOSE_DB for gap, _ in off)} of {len(off)} sizes; largest gap {max(off)[0]:.1f} dB"
            + (f"; beyond it {', '.join(far)}" if far else ""),
        ]
    )


def main() -> None:
    """Print the tables."""
    parser = make_parser(__doc__, models=MODELS, samples=64, figures=True)
    parser.add_argument("--average", nargs="+", type=float, default=AVERAGES, help="bits (default 3 4 5 6)")
    parser.add_argument("--held-out", type=int, default=256, help="other samples, to judge by (default 256)")
    script = Script(parser)
    warnings.simplefilter("ignore")
    findings: list[Finding] = []
    for subject in script.subjects():
        findings.append(examine(subject, script.chosen.samples, script.chosen.held_out, script.chosen.average))
        script.show(describe(findings[-1]) + "\n")
    script.show(judgement(findings))
    script.write([asdict(found) for found in findings])


if __name__ == "__main__":
    main()
