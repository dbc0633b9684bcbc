"""Compares qvis with AIMET: the same models, the same three reports, in turn, each in a fresh process.

    python benchmarks/compare_aimet.py [--runs 3] [--json FILE] [--only WORD ...] [--keep FOLDER]

Makes the environments it needs beside this file. Prints medians, the ratio AIMET / qvis, and whether each bar is met.
Exits with 1 when a bar is missed or a measurement failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from environments import ENVIRONMENTS, HERE

PEER, OURS = "aimet", "qvis"
MODELS = ("mobilenet_v2", "bert_base_stack")
REPORTS = ("relative", "ranges", "changes")

FASTER = {
    ("mobilenet_v2", "relative"): 25.0,
    ("bert_base_stack", "relative"): 40.0,
    ("mobilenet_v2", "changes"): 30.0,
    ("bert_base_stack", "changes"): 45.0,
}
"""How many times faster than AIMET, by the clock on the wall, qvis must be."""
PAGE_BYTES = 3_000_000
"""How large a page of qvis may be."""
QUANTITIES = {
    "wall_s": ("wall s", 1, 2),
    "cpu_s": ("CPU s", 1, 2),
    "peak_bytes": ("memory MB", 1e6, 1),
    "html_bytes": ("HTML MB", 1e6, 2),
}
"""What is printed of a measurement: its heading, its unit, and the digits behind the point."""
TIMEOUT_S = 900


@dataclass
class Case:
    """One report on one model, and what was measured of it, by tool."""

    model: str
    report: str
    tools: tuple[str, ...]
    """Those to be measured."""
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {PEER: [], OURS: []})
    failures: dict[str, list[str]] = field(default_factory=lambda: {PEER: [], OURS: []})

    def name(self, tool: str) -> str:
        """What ``--only`` is compared with."""
        return _name(self.model, self.report, tool)

    def median(self, tool: str, quantity: str) -> float | None:
        """The median over the runs, None without any."""
        values = [run[quantity] for run in self.runs[tool]]
        return median(values) if values else None

    def ratio(self, quantity: str) -> float | None:
        """AIMET's median over that of qvis."""
        theirs, ours = self.median(PEER, quantity), self.median(OURS, quantity)
        return theirs / ours if theirs is not None and ours else None

    def outside(self, tool: str) -> int | None:
        """How many files the page loads from the network; the most of any run, None without a run."""
        return max((len(run["outside"]) for run in self.runs[tool]), default=None)


class MeasurementError(Exception):
    """A process gave no result."""


@dataclass(frozen=True)
class Bar:
    """Something that is promised of a case."""

    case: str
    promise: str
    value: str
    met: bool | None
    """None when it was not measured."""


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(case: Case, tool: str, folder: Path) -> dict[str, Any]:
    """Run a tool once in a process of its own.

    Raises
    ------
    MeasurementError
        There is no result; the message says why.
    """
    folder.mkdir(parents=True)
    script = str(HERE / "measure_call.py")
    command = [str(ENVIRONMENTS[tool].python), script, tool, case.model, case.report, str(folder)]
    # Settings of the caller's own Python must not decide what is imported.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S, env=environment, cwd=folder
        )
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired as error:
        raise MeasurementError(f"still running after {TIMEOUT_S} s") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines()[-1:]
        raise MeasurementError(", ".join([f"exit status {error.returncode}", *said])) from error
    except (IndexError, ValueError) as error:
        raise MeasurementError(f"printed no result ({error})") from error
    return result


def measure_all(cases: list[Case], runs: int, keep: Path | None) -> None:
    """All measurements, the two tools in turn, so that what else the machine does hits both alike."""
    with tempfile.TemporaryDirectory() as scratch:
        for run in range(1, runs + 1):
            for case in cases:
                for tool in case.tools if run % 2 else reversed(case.tools):  # neither always goes first
                    try:
                        result = measure(case, tool, (keep or Path(scratch)) / f"run{run}" / case.name(tool))
                    except MeasurementError as error:  # the other measurements are still worth having
                        case.failures[tool].append(str(error))
                        outcome = f"FAILED, {error}"
                    else:
                        case.runs[tool].append(result)
                        outcome = f"{result['wall_s']:.2f} s"
                    print(f"run {run} of {runs}: {case.name(tool)}: {outcome}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Judging and showing


def bars(case: Case) -> Iterator[Bar]:
    """What is promised of a case, and whether it holds."""
    name = f"{case.model}/{case.report}"
    wanted = FASTER.get((case.model, case.report))
    if wanted is not None:
        ratio = case.ratio("wall_s")
        value = "not measured" if ratio is None else f"{ratio:.1f}x"
        yield Bar(name, f"at least {wanted:g}x faster than AIMET", value, None if ratio is None else ratio >= wanted)
    size = case.median(OURS, "html_bytes")
    value = "not measured" if size is None else f"{size / 1e6:.2f} MB"
    yield Bar(name, f"page of at most {PAGE_BYTES / 1e6:g} MB", value, None if size is None else size <= PAGE_BYTES)
    outside = case.outside(OURS)
    value = "not measured" if outside is None else f"{outside} files from outside"
    yield Bar(name, "self-contained page", value, None if outside is None else outside == 0)


def table(cases: list[Case]) -> str:
    """Medians of both tools and their ratios, three lines for each case."""
    heads = [head for head, _, _ in QUANTITIES.values()]
    rows = [["model / report", "tool", "runs", *heads, "from outside"]]
    for case in cases:
        rows.append([])
        for tool in (PEER, OURS):
            cells = [_number(case.median(tool, what), unit, digits) for what, (_, unit, digits) in QUANTITIES.items()]
            title = f"{case.model} / {case.report}" if tool == PEER else ""
            outside = case.outside(tool)
            loads = "-" if outside is None else f"{outside} files" if outside else "nothing"
            rows.append([title, tool, str(len(case.runs[tool])), *cells, loads])
        ratios = [case.ratio(what) for what in QUANTITIES]
        rows.append(["", f"{PEER} / {OURS}", "", *("-" if one is None else f"{one:.1f}x" for one in ratios), ""])
    return _align(rows, left=2)


def judgement(found: list[Bar]) -> str:
    """One line for each bar."""
    words = {True: "met", False: "MISSED", None: "open"}
    rows = [["model / report", "bar", "measured", ""], []]
    rows += [[bar.case.replace("/", " / "), bar.promise, bar.value, words[bar.met]] for bar in found]
    return _align(rows, left=4)


def _name(*parts: str) -> str:
    return "/".join(parts)


def _number(value: float | None, unit: float, digits: int) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"


def _align(rows: list[list[str]], left: int) -> str:
    """Columns under one another, the first ones to the left; a row without cells is an empty line."""
    widths = [max(len(row[column]) for row in rows if row) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def describe_machine() -> dict[str, Any]:
    """What the numbers depend on."""
    return {"system": platform.platform(), "processors": os.cpu_count(), "python": platform.python_version()}


def versions(cases: list[Case]) -> dict[str, dict[str, str]]:
    """What each tool ran with."""
    return {tool: run["versions"] for case in cases for tool, runs in case.runs.items() for run in runs}


# ---------------------------------------------------------------------------------------------------------------------


def select(words: list[str]) -> Iterator[Case]:
    """The cases, and in each the tools, that have one of the words in their names."""
    for model in MODELS:
        for report in REPORTS:
            tools = [tool for tool in (PEER, OURS) if any(word in _name(model, report, tool) for word in words)]
            if tools:
                yield Case(model, report, tuple(tools))


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="measurements of each, default 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements and the bars there too")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="only what has one of these in model/report/tool"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the reports in this new folder")
    chosen = parser.parse_args()
    if chosen.runs < 1:
        parser.error("--runs must be at least 1")
    if chosen.keep is not None:
        chosen.keep = chosen.keep.resolve()
        if chosen.keep.exists():
            parser.error(f"--keep: {chosen.keep} exists; name a new folder")
    return chosen


def main() -> int:
    """Measure, print, and say by the exit status whether all is well."""
    chosen = parse()
    cases = list(select(chosen.only))
    if not cases:
        print(f"--only: nothing has {' or '.join(chosen.only)} in its name; there are", file=sys.stderr)
        print("\n".join(case.name(tool) for case in select([""]) for tool in case.tools), file=sys.stderr)
        return 2
    for tool in sorted({tool for case in cases for tool in case.tools}):
        ENVIRONMENTS[tool].make()
    measure_all(cases, chosen.runs, chosen.keep)

    found = [bar for case in cases for bar in bars(case)]
    failures = [
        f"{case.name(tool)}: {text}" for case in cases for tool, texts in case.failures.items() for text in texts
    ]
    used = versions(cases)
    print(f"{describe_machine()['system']}, {describe_machine()['processors']} processors, medians")
    for tool, packages in used.items():
        print(f"{tool}: {', '.join(f'{name} {number}' for name, number in packages.items())}")
    print(f"\n{table(cases)}\n\n{judgement(found)}")
    how = {run["peak_how"] for case in cases for runs in case.runs.values() for run in runs}
    print(f"\nmemory: {'; '.join(sorted(how)) or 'not measured'}")
    for text in failures:
        print(f"FAILED {text}")
    if chosen.json is not None:
        result = {
            "machine": describe_machine(),
            "versions": used,
            "cases": [vars(case) for case in cases],
            "bars": [vars(bar) for bar in found],
        }
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failures or any(bar.met is False for bar in found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
