"""``qvis demo``: the reports of the model that comes with qvis."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from qvis.cli.options import OutDir
from qvis.cli.progress import Work

EXAMPLES = ("qvis demo", "qvis demo -o /tmp/demo")


def demo(out: OutDir = Path("qvis-report")) -> None:
    """Write the reports of the model that comes with qvis.

    It is a small network that reads handwritten digits. An index.html links its three reports.
    """
    with Work() as work:
        work.say("Loading")
        from qvis.report.index import write_demo

        reports, index = write_demo(out, progress=work.layers)
    for report in reports:
        print(f"{report.path}: {report.verdict}")
    print(f"{index}: links them\n\nOpen it with: {opener()} {shlex.quote(str(index))}")


def opener() -> str:
    """The command that shows a file in the browser on this system."""
    return {"darwin": "open", "win32": "start"}.get(sys.platform, "xdg-open")
