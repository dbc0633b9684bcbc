"""Whether equalized models round better, against folding alone, grids per channel and AIMET, on really trained models.

    python benchmarks/equalization.py
    python benchmarks/equalization.py --data FOLDER --models digits resnet56 --draws 4 --no-aimet

Trains some models on first use and keeps them. AIMET runs in an environment of its own, which is made on first use.
Rounding and running share no code with qvis (``rounding.py``).
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import nan, sqrt
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from environments import AIMET, HERE
from rounding import Floats, Setting, count, draw_all, part, run_all, wrap
from same_scales import scale_gaps
from trained import Subject
from trained.command import Script, make_parser

import qvis
from qvis import adapters
from qvis.analysis.preparing import prepare
from qvis.data import example_batch
from qvis.rewriting import Rewriting

MODELS = ("digits", "resnet56", "mobilenet", "transformer", "keras", "minilm")
BITS = (8, 6, 4)
STRETCH = 0.08
"""One rounding is an accident; each draw makes the step of every layer larger by a random share of up to this."""
SEED = 0
SEEN = 0.005
"""dB; less is not seen in the figures. Models that are equal but for the order of additions differ by less."""
KEPT = 1e-5
"""How far the outputs of an equalized model may be from those of the given one, relative to the largest."""

FOLDED, BY_CHANNEL = "folded", "folded, per channel"
SCALING, EQUALIZE_MODEL = "AIMET, scaling alone", "AIMET, equalize_model"
ROOT, MADE_UP, DATA = "qvis, square root", "qvis, without data", "qvis, with data"
REPLACED = "qvis, ReLU6 replaced"
PEERS = {SCALING: "scaling", EQUALIZE_MODEL: "equalize_model"}
TIMED = {"aimet": EQUALIZE_MODEL, "square root": ROOT, "noise": f"{DATA}, 32 pictures"}


@dataclass
class Row:
    """One way to prepare a model, and what rounding does then."""

    name: str
    note: str = ""
    changed: float = nan
    """How far its outputs are from those of the given model without rounding, relative to the largest."""
    seconds: float = nan
    sqnr: dict[Setting, Floats] = field(default_factory=dict)
    """dB of the outputs, (draws,)."""
    right: dict[Setting, Floats] = field(default_factory=dict)
    """Whether each sample is classified correctly, (draws, samples); empty without labels."""


@dataclass
class Finding:
    """What was found about one model."""

    name: str
    note: str
    samples: int
    draws: int
    accuracy: float
    """Of the model that was given, on the same samples."""
    rows: dict[str, Row] = field(default_factory=dict)
    pairs: int = 0
    """Of layers that AIMET scales."""
    gaps: dict[tuple[str, str], float] = field(default_factory=dict)
    """By how much the scales of the square-root rule differ from AIMET's, for the pairs that qvis can scale as well."""


@dataclass(frozen=True)
class Bar:
    """Something that is asked of the results."""

    model: str
    promise: str
    figures: str
    reached: bool | None
    """None when it was not measured."""


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


class Trial:
    """One model, the samples that it is equalized with, and others that it is judged by."""

    def __init__(self, subject: Subject, bits: Sequence[int], samples: int, held_out: int, draws: int) -> None:
        self.bits = list(bits)
        self.settings = [*(Setting(one) for one in bits), Setting(max(bits), inputs=True)]
        samples = min(samples, count(subject.inputs) // 2)
        self.subject = subject
        self.given = part(subject.inputs, 0, samples)
        self.judged = part(subject.inputs, samples, samples + held_out)
        self.labels = None if subject.labels is None else subject.labels[samples : samples + held_out]
        wrapped = wrap(subject.model)
        self.exact = run_all(wrapped, self.judged)
        generator = np.random.default_rng(SEED)
        self.draws = [{name: 1 + STRETCH * generator.random() for name in wrapped.weights} for _ in range(draws)]
        accuracy = nan if self.labels is None else float((self.exact.argmax(axis=1) == self.labels).mean())
        self.found = Finding(subject.name, subject.note, count(self.judged), draws, accuracy)

    def examine(self, with_aimet: bool) -> Iterator[Row]:
        """All rows, each as soon as it is there."""
        model = self.subject.model
        example = part(self.given, 0, 2)
        folded = fold(model, example)
        yield self.judge(FOLDED, dict.fromkeys(self.settings, folded))
        channel = {setting: setting._replace(granularity="channel") for setting in self.settings}
        yield self.judge(BY_CHANNEL, dict.fromkeys(self.settings, folded), channel)
        if with_aimet:
            yield from self.run_aimet(example)
        asked: dict[str, dict[str, Any]] = {
            ROOT: {"method": "square root"},
            MADE_UP: {"example_inputs": example},
            DATA: {"inputs": self.given},
            REPLACED: {"inputs": self.given, "replace_relu6": True},
        }
        if not has_clips(model, example):
            del asked[REPLACED]
        for name, arguments in asked.items():
            began = time.perf_counter()
            results = {bits: qvis.equalize(model, bits=bits, **arguments) for bits in self.bits}
            seconds = (time.perf_counter() - began) / len(self.bits)
            row = self.judge(name, {setting: results[setting.bits].model for setting in self.settings})
            row.seconds, row.note = seconds, describe_results(results)
            yield row

    def judge(self, name: str, models: Mapping[Setting, Any], settings: Mapping[Setting, Setting] | None = None) -> Row:
        """What rounding does to the model of each setting; ``settings`` tells where another one is used for it."""
        row = Row(name, changed=max(self.changed(run_all(wrap(one), self.judged)) for one in {*models.values()}))
        ranges: Any = None
        for setting, model in models.items():
            used = (settings or {}).get(setting, setting)
            wrapped = wrap(model)
            if used.inputs and not hasattr(wrapped, "ranges"):
                continue
            if used.inputs:
                ranges = wrapped.ranges(self.given)
            self.note(row, setting, draw_all(wrapped, used, self.draws, self.judged, ranges))
        self.found.rows[name] = row
        return row

    def note(self, row: Row, setting: Setting, outputs: Floats) -> None:
        """Compare outputs (draws, samples, values) with those of the given model."""
        noise = ((outputs - self.exact) ** 2).sum(axis=(1, 2))
        row.sqnr[setting] = 10 * np.log10((self.exact**2).sum() / noise)
        if self.labels is not None:
            row.right[setting] = (outputs.argmax(axis=2) == self.labels).astype(np.float64)

    def changed(self, outputs: Floats) -> float:
        """See :attr:`Row.changed`."""
        return float(np.abs(outputs - self.exact).max() / np.abs(self.exact).max())

    def run_aimet(self, example: Any) -> Iterator[Row]:
        """The rows of AIMET; where it fails or does not know the framework, they have a note only."""
        reason = "" if hasattr(self.subject.model, "named_modules") else "AIMET knows PyTorch only"
        report: dict[str, Any] = {}
        if not reason:
            examples = list(example.values()) if isinstance(example, dict) else [example]
            task = {"example": examples, "given": self.given, "judged": self.judged, "draws": self.draws}
            try:
                report, outputs = ask_aimet(
                    self.subject.model, {**task, "settings": [tuple(one) for one in self.settings]}
                )
            except AimetError as error:
                reason = str(error)
        for name, key in PEERS.items():
            row = self.found.rows[name] = Row(name, reason)
            if report:
                row.note = "; ".join(report["notes"])
                row.seconds = report["rows"][key]["seconds"]
                row.changed = self.changed(outputs[f"{key} exact"])
                for setting in self.settings:
                    self.note(row, setting, outputs[f"{key} {setting}"])
            yield row
        pairs = {(one, other): scales for one, other, scales in report.get("sets", ())}
        if pairs:
            self.found.pairs, self.found.gaps = len(pairs), scale_gaps(self.subject.model, example, pairs)


class AimetError(Exception):
    """AIMET gave no result."""


def ask_aimet(model: Any, task: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Floats]]:
    """Have AIMET equalize a module, in its own environment.

    Raises
    ------
    AimetError
        It failed.
    """
    import torch

    AIMET.make()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        torch.save(model, folder / "model.pt")
        (folder / "task.pkl").write_bytes(pickle.dumps(task))
        run_in(str(AIMET.python), "aimet_equalization.py", scratch)
        with np.load(folder / "outputs.npz") as outputs:
            return json.loads((folder / "report.json").read_text()), dict(outputs)


def run_in(python: str, script: str, *arguments: str) -> str:
    """What a script of this folder prints, run by another interpreter."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [python, str(HERE / script), *arguments], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode != 0:
        raise AimetError(f"{script} failed: {', '.join(done.stderr.strip().splitlines()[-1:])}")
    return done.stdout


def fold(model: Any, example: Any) -> Any:
    """A copy with its normalizations folded."""
    ready = prepare(model, example=example_batch(example))
    if ready.folded is None:
        return model
    return adapters.rewrite(model, ready.network, Rewriting(ready.folded.weights, norms=ready.folded.norms))[0]


def has_clips(model: Any, example: Any) -> bool:
    """Whether it has anything like ReLU6."""
    graph = prepare(model, example=example_batch(example)).network.graph
    return graph is not None and any(node.op == "clip" for node in graph.nodes)


def describe_results(results: Mapping[int, Any]) -> str:
    """What qvis made of a model."""
    texts = [f"{next(iter(results.values())).found} sites"]
    left = [bits for bits, one in results.items() if not one.accepted]
    if left:
        texts.append(f"scales left out at {', '.join(map(str, left))} bits")
    for kind in dict.fromkeys(step.kind for one in results.values() for step in one.steps):
        kept = [str(bits) for bits, one in results.items() if any(step.kept for step in one.steps if step.kind == kind)]
        texts.append(f"{kind} at {', '.join(kept)} bits" if kept else f"{kind} left out")
    return "; ".join(texts)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def describe(found: Finding) -> str:
    """The rows in numbers."""
    right = "" if found.accuracy != found.accuracy else f", {found.accuracy:.1%} of them right"
    settings = list(found.rows[FOLDED].sqnr)
    heads = [label(one) for one in settings]
    width = 12 * len(settings)
    lines = [
        f"{found.name}: {found.samples} samples{right}; {found.draws} draws; {found.note}",
        f"  {'':22}{'SQNR of the outputs, dB':>{width}}{'right, %':>{width}}{'changed':>10}{'s':>8}",
        f"  {'':22}{''.join(f'{one:>12}' for one in (*heads, *heads))}",
    ]
    for row in found.rows.values():
        cells = [spread(row.sqnr.get(one)) for one in settings]
        cells += [spread(row.right[one].mean(axis=1) * 100) if one in row.right else "-" for one in settings]
        changed = "-" if row.changed != row.changed else f"{row.changed:.0e}"
        seconds = "-" if row.seconds != row.seconds else f"{row.seconds:.1f}"
        lines.append(f"  {row.name:22}{''.join(f'{one:>12}' for one in cells)}{changed:>10}{seconds:>8}")
    lines += [f"  {row.name}: {row.note}" for row in found.rows.values() if row.note]
    return "\n".join(lines)


def spread(values: Floats | None) -> str:
    """Mean and standard deviation."""
    return "-" if values is None else f"{values.mean():.1f} ±{values.std(ddof=min(1, len(values) - 1)):.1f}"


def bars(found: Finding) -> Iterator[Bar]:
    """What is asked of the equalization of a model."""
    settings = [one for one in found.rows[FOLDED].sqnr if not one.inputs]
    for setting in settings:
        for other in (FOLDED, SCALING, EQUALIZE_MODEL):
            yield compared(found, DATA, other, setting, f"{DATA} not below {other}, {setting.bits} bits")
    if Setting(8) in settings:
        yield compared(found, DATA, BY_CHANNEL, Setting(8), f"{DATA}, per tensor, not below {BY_CHANNEL}, 8 bits")
    for name in (DATA, MADE_UP, ROOT):
        changed = found.rows[name].changed
        yield Bar(found.name, f"{name}: function kept", f"{changed:.1e} of at most {KEPT:.0e}", changed <= KEPT)


def compared(found: Finding, name: str, other: str, setting: Setting, promise: str) -> Bar:
    """Whether a row is below another one by more than the standard error of their difference."""
    one, two = found.rows[name], found.rows.get(other)
    if two is None or setting not in two.sqnr:
        return Bar(found.name, promise, "not measured", None)
    gain, error = difference(one.sqnr[setting] - two.sqnr[setting])
    text, reached = f"{gain:+.2f} dB ±{error:.2f}", gain >= -max(error, SEEN)
    if setting in one.right:
        # samples are drawn as well, and few of them decide: a difference is one from two standard errors on
        more, unsure = difference(100 * (one.right[setting] - two.right[setting]).mean(axis=0))
        text, reached = f"{text}, {more:+.2f} % right ±{unsure:.2f}", reached and more >= -2 * unsure
    return Bar(found.name, promise, text, reached)


def difference(values: Floats) -> tuple[float, float]:
    """The mean and its standard error."""
    return float(values.mean()), float(values.std(ddof=min(1, len(values) - 1)) / sqrt(len(values)))


def judgement(found: Sequence[Bar]) -> str:
    """One line for each bar."""
    words = {True: "reached", False: "MISSED", None: "open"}
    width = max((len(bar.promise) for bar in found), default=0)
    return "\n".join(f"{bar.model:12}{bar.promise:{width}}  {words[bar.reached]:8}{bar.figures}" for bar in found)


def describe_gaps(found: Finding) -> str:
    """By how much the scales of the square-root rule differ from AIMET's."""
    text = f"{found.name:12}AIMET scales {found.pairs} pairs of layers, {len(found.gaps)} of which qvis can scale too"
    if not found.gaps:
        return text
    worst = max(found.gaps, key=lambda pair: found.gaps[pair])
    return f"{text}; the scales differ by {found.gaps[worst]:.1e} at most ({' -> '.join(worst)})"


def measure_times(runs: int) -> dict[str, list[dict[str, float]]]:
    """Seconds that each tool takes for MobileNetV2 with ReLU, by the clock and of processors; fresh processes."""
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(runs):
        for tool, name in TIMED.items():
            python = str(AIMET.python) if tool == "aimet" else sys.executable
            printed = run_in(python, "time_equalizing.py", tool)
            found.setdefault(name, []).append(json.loads(printed.splitlines()[-1]))
    return found


def describe_times(times: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Medians."""
    runs = min(map(len, times.values()))
    lines = [
        f"MobileNetV2 with ReLU, pictures of 224 x 224, median of {runs}",
        f"  {'':32}{'wall s':>10}{'CPU s':>10}",
    ]
    for name, found in times.items():
        wall, used = (median(one[what] for one in found) for what in ("wall_s", "cpu_s"))
        lines.append(f"  {name:32}{wall:10.1f}{used:10.1f}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Print the tables."""
    parser = make_parser(__doc__, models=MODELS, samples=32, figures=True)
    parser.add_argument("--bits", nargs="+", type=int, default=BITS, help="of the weights (default 8 6 4)")
    parser.add_argument("--held-out", type=int, default=256, help="other samples, to judge by (default 256)")
    parser.add_argument("--draws", type=int, default=16, help="roundings of all layers at once (default 16)")
    parser.add_argument("--runs", type=int, default=3, help="measurements of the time, each (default 3, 0 for none)")
    parser.add_argument("--no-aimet", action="store_true", help="leave AIMET out, and the times")
    script = Script(parser)
    chosen = script.chosen
    warnings.simplefilter("ignore")
    findings: list[Finding] = []
    for subject in script.subjects():
        trial = Trial(subject, chosen.bits, chosen.samples, chosen.held_out, chosen.draws)
        for _ in trial.examine(not chosen.no_aimet):
            pass
        findings.append(trial.found)
        script.show(describe(trial.found) + "\n")
    script.show(judgement([bar for found in findings for bar in bars(found)]))
    script.show("".join(f"\n{describe_gaps(found)}" for found in findings if found.pairs))
    times = {} if chosen.no_aimet else measure_times(chosen.runs)
    if times:
        script.show("\n" + describe_times(times))
    script.write({"models": [plain(asdict(found)) for found in findings], "seconds": times})


def plain(value: Any) -> Any:
    """The value with keys and arrays that JSON takes."""
    if isinstance(value, dict):
        return {label(key): plain(one) for key, one in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def label(key: Any) -> str:
    """A key in words."""
    if isinstance(key, Setting):
        return f"w{key.bits}" + ("a8" if key.inputs else "")
    return key if isinstance(key, str) else " -> ".join(key)


if __name__ == "__main__":
    main()
