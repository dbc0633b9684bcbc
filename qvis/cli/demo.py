"""``qvis demo``: the reports of the model that comes with qvis."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from qvis.cli.options import OutDir
from qvis.cli.progress import Work

EXAMPLES = ("qvis demo", "qvis demo -o review")

TITLE = "DigitsNet"
TRAINED, FOLDED = f"{TITLE} as trained", f"{TITLE} with BatchNorm folded"
LEAD = (
    "A small network that reads handwritten digits comes with qvis. Before it is quantized, each BatchNorm is folded"
    " into the convolution before it. What it computes stays the same; the weights that are rounded do not."
)


def demo(out: OutDir = Path("qvis-report")) -> None:
    """Write the reports of the model that comes with qvis.

    It is a small network that reads handwritten digits. An index.html links its three reports.
    """
    with Work() as work:
        work.say("Loading")
        from qvis.adapters.digits import load_digits_model
        from qvis.analysis import analyze
        from qvis.analysis.comparison import compare
        from qvis.report import Report
        from qvis.report.document import summarize, summarize_changes
        from qvis.report.index import check_index, write_index

        check_index(out)
        trained = analyze(load_digits_model(), name=TRAINED, progress=work.layers)
        folded = analyze(load_digits_model(folded=True), name=FOLDED, progress=work.layers)
        work.say("Writing")
        comparison = compare(trained, folded)
        # the folded weights are what would be rounded
        relative, weights = (summarize(folded, kind) for kind in ("relative_weight_ranges", "weight_ranges"))
        changes = summarize_changes(comparison)
        written = [Report(document, folded.layers).write(out) for document in (relative, weights)]
        written.append(Report(changes, comparison.layers).write(out))
        index = write_index(out, [relative, weights, changes], title=TITLE, lead=LEAD)
    for report in written:
        print(f"{report.path}: {report.verdict}")
    print(f"{index}: links them all\n\nOpen it with: {opener()} {shlex.quote(str(index))}")


def opener() -> str:
    """The command that shows a file in the browser on this system."""
    return {"darwin": "open", "win32": "start"}.get(sys.platform, "xdg-open")
