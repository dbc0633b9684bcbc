"""``qvis check``: whether a model may pass."""

from __future__ import annotations

import json
import sys
from enum import Enum
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvis.cli.models import open_model
from qvis.cli.options import (
    AsJson,
    Bits,
    ChannelAxis,
    Data,
    ExampleInputs,
    Format,
    Formats,
    Layers,
    Measure,
    MeasureOption,
    Model,
    Name,
    ProblemDb,
    Samples,
    StarvedLevels,
    Stored,
    WatchDb,
    Weights,
    channel_axes,
    make_thresholds,
)
from qvis.cli.progress import Work
from qvis.errors import BadArgumentError

if TYPE_CHECKING:
    from qvis.layers import Analysis, LayerAnalysis, Thresholds

EXAMPLES = (
    "qvis check model.pt2",
    "qvis check net.py:make --weights trained.pt --fail-on watch",
    "qvis check net.py:make --weights trained.pt --data val.npz --max-damage 0.1%",
    "qvis check model.pt2 --min-kept-db 25 -o review     # writes the page as well",
)


class FailOn(str, Enum):
    """The mildest severity that fails."""

    watch = "watch"
    problem = "problem"
    unusable = "unusable"


def check(
    model: Model,
    weights: Weights = None,
    fail_on: Annotated[FailOn, typer.Option(help="The mildest severity that fails.")] = FailOn.problem,
    min_kept_db: Annotated[
        float | None, typer.Option(help="Fail where a quarter of a layer's channels keep fewer dB than this.")
    ] = None,
    min_sqnr: Annotated[
        float | None, typer.Option(help="Fail where a layer's SQNR, one grid per tensor, is below this many dB.")
    ] = None,
    max_damage: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Fail where rounding a layer's weights or inputs changes the output by more, such as 0.1% or 0.001.",
        ),
    ] = None,
    max_total_damage: Annotated[
        str | None, typer.Option(metavar="SHARE", help="The same for all weights and inputs rounded at once.")
    ] = None,
    layers: Layers = None,
    bits: Bits = 8,
    name: Name = None,
    channel_axis: ChannelAxis = None,
    data: Data = None,
    example_inputs: ExampleInputs = None,
    samples: Samples = 64,
    measure: MeasureOption = Measure.none,
    stored: Stored = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="Write the report as well. [default: nothing]")
    ] = None,
    formats: Formats = [Format.html],  # noqa: B006 (Typer copies it)
    as_json: AsJson = False,
    watch_db: WatchDb = None,
    problem_db: ProblemDb = None,
    starved_levels: StarvedLevels = None,
) -> None:
    """Exit with 1 if a layer is worse than allowed.

    Prints a line for each such layer that says why, and writes nothing unless asked to.
    """
    damages = {"--max-damage": share(max_damage, "--max-damage")}
    damages["--max-total-damage"] = share(max_total_damage, "--max-total-damage")
    limits = {"--min-kept-db": min_kept_db, "--min-sqnr": min_sqnr, **damages}
    for option, value in limits.items():
        if value is not None and not isfinite(value):
            raise BadArgumentError(f"{option}: got {value}, expected a finite number")
    if data is None and example_inputs is None and any(value is not None for value in damages.values()):
        option = next(option for option, value in damages.items() if value is not None)
        raise BadArgumentError(f"{option}: needs the model to be run, expected --data or --example-inputs as well")
    with Work() as work:
        work.say("Loading")
        from qvis.analysis import analyze
        from qvis.report import Report
        from qvis.report.document import summarize

        thresholds = make_thresholds(watch_db, problem_db, starved_levels)
        analysis = analyze(
            open_model(model, weights),
            selected_layers=layers,
            bits=bits,
            thresholds=thresholds,
            name=name,
            channel_axis=channel_axes(channel_axis),
            inputs=data,
            example_inputs=example_inputs,
            samples=samples,
            measure=measure.value,
            fold=not stored,
            progress=work.layers,
            track=work.steps,
        )
        paths: list[Path] = []
        if out is not None:
            work.say("Writing")
            report = Report(summarize(analysis, "relative_weight_ranges"), analysis.layers)
            paths = list(report.write(out, [one.value for one in formats]).paths.values())
    failures = find_failures(analysis, fail_on, min_kept_db, min_sqnr, damages["--max-damage"])
    whole = find_total_failure(analysis, damages["--max-total-damage"])
    if as_json:
        print(json.dumps(_summary(analysis, failures, whole, fail_on, limits), ensure_ascii=False))
    else:
        from qvis.words import visible

        for layer, why in failures:
            print(f"FAIL {visible(layer.name)}: {visible('; '.join(why))} ({analysis.evidence})")
        if whole:
            print(f"FAIL all layers together: {whole}")
        print(_last_line(analysis, len(failures), bool(whole)))
    for path in paths:
        print(f"wrote {path}", file=sys.stderr)
    if failures or whole:
        raise typer.Exit(1)


def share(typed: str | None, option: str) -> float | None:
    """A share of the output's power, typed as a number or with a percent sign.

    >>> share("0.1%", "--max-damage"), share("0.001", "--max-damage")
    (0.001, 0.001)
    """
    if typed is None:
        return None
    number, percent, rest = typed.partition("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf") or rest.strip():
        raise BadArgumentError(f"{option}: got {typed!r}, expected a share such as 0.1% or 0.001")
    return value


def find_total_failure(analysis: Analysis, limit: float | None) -> str:
    """What all layers together fail, in words; empty where they pass."""
    if limit is None or analysis.sensitivity is None:
        return ""
    from qvis.words import percent

    known = analysis.sensitivity
    found = known.total_both[analysis.bits, known.granularities[0]].mean
    if found <= limit:
        return ""
    changed = f"rounding all weights and inputs changes the {known.what} by {percent(found)}"
    return f"{changed}, above --max-total-damage {percent(limit)} ({known.measured})"


def find_failures(
    analysis: Analysis,
    fail_on: FailOn,
    min_kept_db: float | None,
    min_sqnr: float | None,
    max_damage: float | None = None,
) -> list[tuple[LayerAnalysis, list[str]]]:
    """The layers that may not pass, worst first, and for each what it fails."""
    from qvis.layers import Severity, decibels
    from qvis.words import percent

    failures = []
    for layer in analysis.ranked:
        why = []
        if layer.severity.rank >= Severity(fail_on.value).rank:
            why.append(f"{layer.severity}: {_deciding_reason(layer, analysis.thresholds)}")
        kept = decibels(1.0, layer.noise_share)
        if min_kept_db is not None and kept < min_kept_db:
            why.append(f"a quarter of the channels keep {kept:.1f} dB, below --min-kept-db {min_kept_db:g}")
        sqnr = layer.rounding.sqnr_tensor
        if min_sqnr is not None and sqnr < min_sqnr:
            why.append(f"its SQNR is {sqnr:.1f} dB, below --min-sqnr {min_sqnr:g}")
        if max_damage is not None and layer.sensitivity is not None:
            for what, words in (("weights", "its weights"), ("inputs", "what enters it")):
                found = layer.sensitivity.damage(analysis.bits, what=what).value
                if found > max_damage:
                    limit = f"above --max-damage {percent(max_damage)}"
                    why.append(f"rounding {words} does a damage of {percent(found)}, {limit}")
        if why:
            failures.append((layer, why))
    return failures


def _deciding_reason(layer: LayerAnalysis, thresholds: Thresholds) -> str:
    """The reason that made the severity what it is: the first one may only describe the layer."""
    from qvis.layers import Severity, decibels

    deciding = next((reason for reason in layer.reasons if reason.severity is layer.severity), None)
    if layer.sensitivity is not None and deciding is not None:
        return deciding.text.removesuffix(".")
    limit = thresholds.problem_db if layer.severity is Severity.PROBLEM else thresholds.watch_db
    kinds = ["nonfinite", "zero"]
    if decibels(1.0, layer.noise_share) < limit:
        kinds += ["noise"]
    kinds += ["starved", "near_dead"]
    by_kind = {reason.kind: reason.text for reason in layer.reasons}
    text = next((by_kind[kind] for kind in kinds if kind in by_kind), "")
    return text.removesuffix(".")


def _last_line(analysis: Analysis, failing: int, whole: bool = False) -> str:
    from qvis.words import count, visible

    total = count(len(analysis.layers), "layer")
    outcome = f"{failing} of {total} {'fails' if failing == 1 else 'fail'}" if failing else f"all {total} pass"
    outcome += " one by one, but not together," if whole and not failing else ""
    known = analysis.sensitivity
    unrun = f"; {count(len(known.skipped), 'layer')} not run" if known is not None and known.skipped else ""
    unread = f"; {count(len(analysis.skipped), 'tensor')} not read" if analysis.skipped else ""
    judged = f"at int{analysis.bits} with one grid per tensor, {analysis.evidence}"
    return f"{'FAILED' if failing or whole else 'ok'}: {visible(analysis.name)}: {outcome} {judged}{unrun}{unread}"


def _summary(
    analysis: Analysis,
    failures: list[tuple[LayerAnalysis, list[str]]],
    whole: str,
    fail_on: FailOn,
    limits: dict[str, float | None],
) -> dict[str, Any]:
    return {
        "passed": not failures and not whole,
        "whole": whole,
        "model": analysis.name,
        "fingerprint": analysis.fingerprint,
        "bits": analysis.bits,
        "evidence": analysis.evidence,
        "fail_on": fail_on.value,
        "limits": {option.strip("-").replace("-", "_"): value for option, value in limits.items()},
        "layers": len(analysis.layers),
        "failures": [{"name": layer.name, "severity": str(layer.severity), "why": why} for layer, why in failures],
        "skipped": [{"name": skipped.name, "reason": skipped.reason} for skipped in analysis.skipped],
    }
