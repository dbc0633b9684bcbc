"""``qvis bits``: a width for each layer."""

from __future__ import annotations

import re
import sys
from math import isfinite, log10
from pathlib import Path
from typing import Annotated, Any

import typer

from qvis.cli.models import open_model
from qvis.cli.options import (
    All,
    AsJson,
    Data,
    ExampleInputs,
    Format,
    Formats,
    Layers,
    Model,
    Name,
    Open,
    Samples,
    Weights,
    check_open,
)
from qvis.cli.progress import Work
from qvis.errors import BadArgumentError

EXAMPLES = (
    "qvis bits net.py:make_net --weights trained.safetensors --data val.npz --average-bits 5 --report review",
    "qvis bits model.onnx --data images/ --target-size 2.5MB --widths 8,4 --export onnxruntime=quantize.py",
    "qvis bits model.keras --example-inputs 1x224x224x3 --max-damage 20dB",
)
WIDTHS = "8,7,6,5,4,3,2"
UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def bits(
    model: Model,
    data: Data = None,
    average_bits: Annotated[
        float | None, typer.Option(help="Give each weight so many bits on average, such as 5.")
    ] = None,
    target_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Or have the model take so much at most: 500kB, 2.5MB, 1MiB.")
    ] = None,
    max_damage: Annotated[
        str | None,
        typer.Option(metavar="DAMAGE", help="Or find the smallest of which the output keeps that: 20dB, or 1%."),
    ] = None,
    example_inputs: ExampleInputs = None,
    weights: Weights = None,
    widths: Annotated[str, typer.Option(metavar="BITS", help="The widths to choose from.")] = WIDTHS,
    granularity: Annotated[
        list[str] | None,
        typer.Option(
            "--granularity",
            metavar="GRID",
            help="What shares a step: tensor, channel, or a number such as 32. Repeat it to choose. [default: channel]",
        ),
    ] = None,
    samples: Samples = 64,
    layers: Layers = None,
    export: Annotated[
        list[str] | None,
        typer.Option(
            "--export",
            metavar="FORMAT=FILE",
            help="Write the widths for a tool: json, csv, aimet, torchao, onnxruntime. Repeat it for more.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--report", "-o", metavar="DIR", help="Write the page as well. [default: nothing]")
    ] = None,
    formats: Formats = [Format.html],  # noqa: B006 (Typer copies it)
    name: Name = None,
    as_json: AsJson = False,
    open_page: Open = False,
    all_rows: All = False,
) -> None:
    """Choose a width for each layer.

    Finds the mix that does the least damage to the output at a size, or the smallest for a damage, tries it, and sets
    it beside one width for all layers. Where the data has labels, right answers are counted too.
    """
    check_open(open_page, formats)
    goal = read_goal(average_bits, target_size, max_damage)
    chosen_from = read_widths(widths)
    shared = [read_granularity(one) for one in granularity or ["channel"]]
    if data is None and example_inputs is None:
        raise BadArgumentError(
            "--data: needed to run the model; without data, --example-inputs 1x3x224x224 has inputs made up"
        )
    if open_page and out is None:
        raise BadArgumentError("--open: needs the page, expected '--report DIR' as well")
    with Work() as work:
        work.say("Loading")
        from qvis.report.files import check_targets

        exports = read_exports(export or [])
        if out is not None:
            check_targets(out, "bit_widths", [one.value for one in formats])
        for _, target in exports:
            for option, given in (("MODEL", model), ("--data", data), ("--weights", weights)):
                if given and target.exists() and Path(given).exists() and target.samefile(given):
                    raise BadArgumentError(f"--export: {str(target)!r} is {option} itself; name another file")
        from qvis.analysis.bit_widths import bit_widths
        from qvis.exporting.files import write_export
        from qvis.report.bit_widths import WidthsReport
        from qvis.report.bit_widths_text import terminal_lines
        from qvis.words import visible

        found = bit_widths(
            open_model(model, weights),
            data,
            **goal,
            example_inputs=example_inputs,
            bits=chosen_from,
            granularity=shared,
            samples=samples,
            selected_layers=layers,
            name=name,
            track=work.steps,
        )
        work.say("Writing")
        made = [(form, target, found.write_down(form)) for form, target in exports]
        report = WidthsReport(found)
        if out is not None:
            report.write(out, [one.value for one in formats])
        for form, target, text in made:
            write_export(target, text.text, form)
        notes = [(form, note) for form, _, text in made for note in text.notes]
    paths = [str(path) for path in (*(target for _, target in exports), *report.paths.values())]
    if as_json:
        print(report.to_json())
        print(*(f"wrote {path}" for path in paths), sep="\n", end="\n" if paths else "", file=sys.stderr)
    else:
        print(*terminal_lines(report.document, all_rows=all_rows), sep="\n")
        print(*(f"{form}: {visible(note)}" for form, note in notes), sep="\n", end="\n" if notes else "")
        print(*["", *paths] if paths else [], sep="\n", end="\n" if paths else "")
    if open_page:
        report.open()


def read_goal(average_bits: float | None, target_size: str | None, max_damage: str | None) -> dict[str, Any]:
    """What was asked for, as the argument of :func:`qvis.bit_widths`."""
    given = {"--average-bits": average_bits, "--target-size": target_size, "--max-damage": max_damage}
    named = [option for option, value in given.items() if value is not None]
    if len(named) != 1:
        got = " and ".join(named) or "none"
        raise BadArgumentError(f"{', '.join(given)}: got {got}, expected exactly one, such as --average-bits 5")
    if average_bits is not None:
        if not isfinite(average_bits) or average_bits <= 0:
            raise BadArgumentError(f"--average-bits: got {average_bits:g}, expected a number above 0 such as 5")
        return {"average_bits": average_bits}
    if target_size is not None:
        return {"target_size": read_size(target_size)}
    assert max_damage is not None
    return {"max_damage_db": read_damage(max_damage)}


def read_size(typed: str) -> int:
    """Bytes, typed as a number with a unit.

    >>> read_size("500kB"), read_size("2.5 MB"), read_size("1MiB"), read_size("2048")
    (500000, 2500000, 1048576, 2048)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", typed.strip(), re.ASCII | re.IGNORECASE)
    unit = "" if found is None else found.group(2).lower()
    size = 0 if found is None or unit not in ("", "bytes", *UNITS) else int(float(found.group(1)) * UNITS.get(unit, 1))
    if not size:
        raise BadArgumentError(f"--target-size: got {typed!r}, expected a size such as 500kB, 2.5MB or 1MiB")
    return size


def read_damage(typed: str) -> float:
    """dB that the output keeps, typed as such or as the share of its power that may change.

    >>> read_damage("20dB"), read_damage("1%")
    (20.0, 20.0)
    """
    found = re.fullmatch(r"(-?\d+(?:\.\d+)?)\s*(dB|%)", typed.strip(), re.ASCII | re.IGNORECASE)
    if found is not None:
        value = float(found.group(1))
        if found.group(2) != "%":
            return value
        if value > 0:
            return 10 * log10(100 / value)
    raise BadArgumentError(f"--max-damage: got {typed!r}, expected what the output keeps, as 20dB, or may lose, as 1%")


def read_widths(typed: str) -> list[int]:
    """Widths, typed with commas between them."""
    parts = [part.strip() for part in typed.split(",")]
    if not all(part.isascii() and part.isdecimal() and 2 <= int(part) <= 16 for part in parts):
        raise BadArgumentError(f"--widths: got {typed!r}, expected widths from 2 to 16 such as {WIDTHS}")
    return [int(part) for part in parts]


def read_granularity(typed: str) -> str | int:
    """``tensor``, ``channel``, or how many weights share a step."""
    if typed in ("tensor", "channel"):
        return typed
    if typed.isascii() and typed.isdecimal() and len(typed) < 9 and int(typed):
        return int(typed)
    raise BadArgumentError(f"--granularity: got {typed!r}, expected tensor, channel, or a number of weights such as 32")


def read_exports(typed: list[str]) -> list[tuple[str, Path]]:
    """The formats and files to export to, after a look at whether these can be written."""
    if not typed:
        return []
    from qvis.exporting import FORMATS
    from qvis.exporting.files import check_target

    exports = []
    for one in typed:
        form, equals, file = one.partition("=")
        if form not in FORMATS or not equals or not file:
            raise BadArgumentError(
                f"--export: got {one!r}, expected a format ({', '.join(FORMATS)}) and a file, as in csv=widths.csv"
            )
        exports.append((form, check_target(file, form)))
    return exports
