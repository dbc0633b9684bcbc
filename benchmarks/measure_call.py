"""Measures one call of one tool on one model, in the process it is started in, and prints the result as JSON.

``compare_aimet.py`` starts it, a fresh process for each measurement. The model is built and the tool's package imported
before the clock starts; whatever the tool imports only when called counts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from models import BUILDERS, build, optimized
from torch import nn

Call = Callable[[str], object]


# ---------------------------------------------------------------------------------------------------------------------
# The tools


def aimet_call(report: str, model: nn.Module, other: nn.Module | None) -> Call:
    """AIMET's function for a report, waiting for its folder."""
    _let_torchvision_load()
    from aimet_torch import visualize_model as aimet

    if report == "changes":
        return lambda folder: aimet.visualize_changes_after_optimization(model, other, folder)
    if report == "relative":
        return lambda folder: aimet.visualize_relative_weight_ranges_to_identify_problematic_layers(model, folder)
    return lambda folder: aimet.visualize_weight_ranges(model, folder)


def qvis_call(report: str, model: nn.Module, other: nn.Module | None) -> Call:
    """The function of qvis for a report, waiting for its folder."""
    import qvis

    if report == "changes":
        return lambda folder: qvis.visualize_changes_after_optimization(model, other, folder)
    if report == "relative":
        return lambda folder: qvis.visualize_relative_weight_ranges(model, folder)
    return lambda folder: qvis.visualize_weight_ranges(model, folder)


def _let_torchvision_load() -> None:
    """Declare the two operators without which torchvision fails to load beside a PyTorch it was not built for.

    AIMET imports torchvision, but neither it nor these benchmarks use what the operators do.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)


_KEPT: list[object] = []  # a library takes its operators with it when it is collected
CALLS = {"aimet": aimet_call, "qvis": qvis_call}
PACKAGES = {"aimet": "aimet-torch", "qvis": "qvis"}


# ---------------------------------------------------------------------------------------------------------------------
# Memory and time


class PeakMemory:
    """How much the process grows above what it holds when this is made, at the highest moment, in bytes."""

    def __init__(self) -> None:
        try:
            # Linux forgets the high-water mark when 5 is written here, so that building the model does not count.
            Path("/proc/self/clear_refs").write_text("5")
            self._peak, self._before = lambda: _status("VmHWM"), _status("VmRSS")
            self.how = "high-water mark of resident memory, reset before the call"
        except OSError:
            self._peak, self._before = _maxrss, _maxrss()
            self.how = "growth of ru_maxrss, which leaves out what fits below the peak of building the model"

    def growth(self) -> int:
        """The growth until now."""
        return max(0, self._peak() - self._before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _maxrss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cpu_seconds() -> float:
    """Processor time of all threads of this process, and of the children it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


# ---------------------------------------------------------------------------------------------------------------------
# The page


_IN_STYLE = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^\s"')]+)""", re.IGNORECASE)


class _Loads(HTMLParser):
    """Collects what a page loads from elsewhere. A link that is only followed when clicked is no such thing."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._within = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Look at what may hold the address of a script, style sheet, picture or frame."""
        self._within = tag
        if tag == "a":
            return
        for name, value in attrs:
            if name in {"src", "href", "data", "poster", "srcset"} and value is not None:
                address = value.strip().lower()
                if address.startswith(("http:", "https:", "//")):
                    self.found.append(value.strip())
            if name == "style":
                self.found += _IN_STYLE.findall(value or "")

    def handle_endtag(self, tag: str) -> None:
        """Leave a style sheet."""
        if tag == self._within:
            self._within = ""

    def handle_data(self, data: str) -> None:
        """Look at the addresses in a style sheet."""
        if self._within == "style":
            self.found += _IN_STYLE.findall(data)


def loads_from_outside(page: Path) -> list[str]:
    """Addresses on the network in the tags and style sheets of a page. What its scripts load is not seen."""
    parser = _Loads()
    parser.feed(page.read_text(encoding="utf-8"))
    parser.close()
    return parser.found


# ---------------------------------------------------------------------------------------------------------------------


def measure(call: Call, folder: Path) -> dict[str, Any]:
    """Run the call once and say what it took and what it wrote."""
    memory = PeakMemory()
    cpu, wall = cpu_seconds(), time.perf_counter()
    call(str(folder))
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    peak = memory.growth()
    pages = sorted(folder.rglob("*.html"))
    if not pages:
        raise RuntimeError("the call wrote no HTML file")
    return {
        "wall_s": wall,
        "cpu_s": cpu,
        "peak_bytes": peak,
        "peak_how": memory.how,
        "html_bytes": sum(page.stat().st_size for page in pages),
        "outside": [address for page in pages for address in loads_from_outside(page)],
    }


def main() -> None:
    """Measure what the arguments name; the last line on stdout is the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("tool", choices=CALLS)
    parser.add_argument("model", choices=BUILDERS)
    parser.add_argument("report", choices=("relative", "ranges", "changes"))
    parser.add_argument("folder", type=Path, help="an empty folder that the tool writes into")
    chosen = parser.parse_args()
    model = build(chosen.model)
    other = optimized(model) if chosen.report == "changes" else None
    call = CALLS[chosen.tool](chosen.report, model, other)
    result = measure(call, chosen.folder)
    result["versions"] = {name: version(name) for name in (PACKAGES[chosen.tool], "torch", "bokeh", "numpy")}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
