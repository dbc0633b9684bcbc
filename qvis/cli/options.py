"""Arguments and options that several commands share, and what they are turned into."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvis.errors import BadArgumentError

if TYPE_CHECKING:
    from qvis.layers import Thresholds

MODEL_HELP = "A file or folder with a model, package.module:factory, or file.py:factory."


class Kind(str, Enum):
    """Which of the two reports on one model."""

    relative = "relative"
    weights = "weights"


class Format(str, Enum):
    """What a report can be written as."""

    html = "html"
    json = "json"
    md = "md"


Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", metavar="FILE", help="Weights for the factory's model: .safetensors, .pt, .pth, ..."),
]
OutDir = Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The folder to write to; made when missing.")]
Layers = Annotated[
    list[str] | None,
    typer.Option("--layers", metavar="PATTERN", help="Only these layers, such as 'features.*'. Repeat it for more."),
]
Bits = Annotated[int, typer.Option("--bits", min=2, max=16, help="Width of the integer grid to judge for.")]
KindOption = Annotated[Kind, typer.Option("--kind", help="Which figures come first.")]
Name = Annotated[str | None, typer.Option("--name", help="What the report calls the model.")]
Formats = Annotated[list[Format], typer.Option("--format", help="What to write. Repeat it for more.")]
ChannelAxis = Annotated[
    list[str] | None,
    typer.Option(
        "--channel-axis",
        metavar="[PATTERN=]AXIS",
        help="For a bare checkpoint: the axis of output channels, as 'up.*=1', or of all as 1. Repeat it for more.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the JSON report instead of the table.")]
Open = Annotated[bool, typer.Option("--open", help="Show the page in the browser.")]
All = Annotated[bool, typer.Option("--all", help="Print all rows of the table.")]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DATA",
        help="Run the model on this: an .npz or .npy file, a folder of images, module:function or file.py:function.",
    ),
]
ExampleInputs = Annotated[
    str | None,
    typer.Option(
        "--example-inputs",
        metavar="SHAPES",
        help="Without data: run it on made-up inputs, such as '1x3x224x224' or 'input_ids=1x128:int64'.",
    ),
]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Take so many samples of the data at most.")]


class Measure(str, Enum):
    """Which layers are rounded one at a time, to measure what is predicted."""

    none = "none"
    top = "top"
    all = "all"


MeasureOption = Annotated[
    Measure, typer.Option("--measure", help="Round layers one at a time as well: the worst, or all.")
]
Loss = Annotated[
    str | None, typer.Option("--loss", help="Judge a loss on the labels instead of the outputs: cross_entropy or mse.")
]
Stored = Annotated[
    bool, typer.Option("--stored", help="Judge the weights as they are stored, with no normalization folded in.")
]


class Tool(str, Enum):
    """What quantizes the model; a test holds these and :data:`qvis.excluding.TOOLS` together."""

    onnxruntime = "onnxruntime"
    openvino = "openvino"
    nncf = "nncf"
    tensorrt = "tensorrt"
    trtexec = "trtexec"
    torchao = "torchao"
    pt2e = "pt2e"
    tflite = "tflite"


ExcludeFor = Annotated[
    Tool | None, typer.Option("--exclude-for", help="Print how this tool is told to leave the problem layers in float.")
]
# The defaults stand in Thresholds, which would load NumPy; a test holds the two together.
WatchDb = Annotated[
    float | None, typer.Option(help="Watch a layer when a quarter of its channels keep fewer dB. [default: 30]")
]
ProblemDb = Annotated[float | None, typer.Option(help="It is a problem below this. [default: 20]")]
StarvedLevels = Annotated[
    int | None, typer.Option(min=1, help="A channel with fewer levels of the shared grid is starved. [default: 8]")
]


def make_thresholds(watch_db: float | None, problem_db: float | None, starved_levels: int | None) -> Thresholds:
    """The default thresholds with those replaced that were given."""
    from qvis.layers import Thresholds

    given = {"watch_db": watch_db, "problem_db": problem_db, "starved_levels": starved_levels}
    for name, value in given.items():
        if value is not None and not isfinite(value):
            raise BadArgumentError(f"--{name.replace('_', '-')}: got {value}, expected a finite number")
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    thresholds = replace(Thresholds(), **changed)
    if thresholds.problem_db > thresholds.watch_db:
        raise BadArgumentError(
            f"--problem-db: got {thresholds.problem_db:g}, expected at most --watch-db ({thresholds.watch_db:g}),"
            " since a problem is worse than what is to be watched"
        )
    return thresholds


def channel_axes(given: list[str] | None) -> int | dict[str, int] | None:
    """What was given as ``--channel-axis``: an axis for all layers, or axes by name or pattern.

    >>> channel_axes(["up.*=1", "head=-1"])
    {'up.*': 1, 'head': -1}
    """
    if not given:
        return None
    axes: dict[str, int] = {}
    for one in given:
        pattern, _, axis = one.rpartition("=")
        if not (axis.removeprefix("-").isdecimal() and axis.isascii() and len(axis) < 4):
            raise BadArgumentError(f"--channel-axis: got {one!r}, expected an axis such as 1, or 'PATTERN=1'")
        axes[pattern] = int(axis)
    if "" in axes and len(axes) > 1:
        raise BadArgumentError("--channel-axis: got a number for all, and patterns; write '*=AXIS' first instead")
    return axes.get("", axes)


def check_open(open_page: bool, formats: list[Format]) -> None:
    """Refuse early to open a page that will not be written."""
    if open_page and Format.html not in formats:
        raise BadArgumentError("--open: needs the page, expected '--format html' as well")
