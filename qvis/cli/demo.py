"""``qvis demo``: the reports of the model that comes with qvis."""

from __future__ import annotations

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qvis.cli.options import OutDir
from qvis.cli.progress import Work

EXAMPLES = ("qvis demo", "qvis demo -o review")

SAMPLES = 32
AVERAGE_BITS = 5
TITLE = "DigitsNet"
FOLDED = f"{TITLE} with BatchNorm folded"
LEAD = (
    "A small network that reads handwritten digits comes with qvis, with 128 pictures that it has never seen. Before it"
    " is quantized, each BatchNorm is folded into the convolution before it. What it computes stays the same; the"
    " weights that are rounded do not, and one layer suffers. Equalizing mends it without retraining, and fewer bits"
    " suffice where each layer gets a width of its own."
)


def demo(out: OutDir = Path("qvis-report")) -> None:
    """Write the reports of the model that comes with qvis.

    It is a small network that reads handwritten digits, judged by running it. An index.html links its reports.
    """
    with Work() as work:
        work.say("Loading")
        from qvis.adapters.digits import load_digits_model, load_digits_samples
        from qvis.analysis import analyze
        from qvis.analysis.bit_widths import bit_widths
        from qvis.analysis.comparison import compare
        from qvis.analysis.compressibility import compressibility
        from qvis.equalization.equalize import equalize
        from qvis.images.report import visualize_image_quantization
        from qvis.report import Report
        from qvis.report.document import summarize, summarize_changes
        from qvis.report.grids import compare_grids
        from qvis.report.index import check_index, write_index

        check_index(out)
        model, (pictures, digits) = load_digits_model(), load_digits_samples()
        judged = analyze(model, inputs=pictures, measure="top", name=FOLDED, progress=work.layers, track=work.steps)
        method = "noise" if find_spec("scipy") and find_spec("threadpoolctl") else "square root"
        equalized = equalize(model, pictures[:SAMPLES], method=method, name=FOLDED, track=work.steps)
        mixed = bit_widths(model, pictures, labels=digits, average_bits=AVERAGE_BITS, name=FOLDED, track=work.steps)
        smaller = compressibility(model, pictures, labels=digits, name=FOLDED, track=work.steps)
        for _ in smaller.measure(track=work.steps):
            pass
        grids = compare_grids(model, out, inputs=pictures, name=FOLDED, progress=work.layers, track=work.steps)
        work.say("Writing")
        comparison = compare(equalized.before, equalized.after)
        written: list[Any] = [
            Report(summarize(judged, kind), judged.layers).write(out)
            for kind in ("sensitivity", "relative_weight_ranges", "weight_ranges")
        ]
        written.append(Report(summarize_changes(comparison, equalized), comparison.layers).write(out))
        written += [mixed.write(out), grids, smaller.write(out), visualize_image_quantization(None, out)]
        index = write_index(out, [report.document for report in written], title=TITLE, lead=LEAD)
    for report in written:
        print(f"{report.path}: {report.verdict}")
    print(f"{index}: links them all\n\nOpen it with: {opener()} {shlex.quote(str(index))}")


def opener() -> str:
    """The command that shows a file in the browser on this system."""
    return {"darwin": "open", "win32": "start"}.get(sys.platform, "xdg-open")
