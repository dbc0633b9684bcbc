"""AIMET's names for the three reports, so that its users switch by changing an import.

Instead of ``from aimet_torch.visualize_model import ...`` write ``from qvis.aimet import ...``; the arguments are the
same. Unlike with AIMET, ``results_dir`` is made when it is missing, a name in ``selected_layers`` that matches no layer
is an error, and a :class:`~qvis.Report` is returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from qvis import report
from qvis.report import Report

__all__ = [
    "visualize_changes_after_optimization",
    "visualize_relative_weight_ranges_to_identify_problematic_layers",
    "visualize_weight_ranges",
]


def visualize_weight_ranges(
    model: Any, results_dir: str | PathLike[str], selected_layers: Sequence[str] | None = None
) -> Report:
    """Write ``weight_ranges.html``; see :func:`qvis.visualize_weight_ranges`, which takes more arguments."""
    return report.visualize_weight_ranges(model, results_dir, selected_layers=_given(selected_layers))


def visualize_relative_weight_ranges_to_identify_problematic_layers(
    model: Any, results_dir: str | PathLike[str], selected_layers: Sequence[str] | None = None
) -> Report:
    """Write ``relative_weight_ranges.html``; see :func:`qvis.visualize_relative_weight_ranges`."""
    return report.visualize_relative_weight_ranges(model, results_dir, selected_layers=_given(selected_layers))


def visualize_changes_after_optimization(
    old_model: Any, new_model: Any, results_dir: str | PathLike[str], selected_layers: Sequence[str] | None = None
) -> Report:
    """Write ``changes_after_optimization.html``; see :func:`qvis.visualize_changes_after_optimization`."""
    return report.visualize_changes_after_optimization(
        old_model, new_model, results_dir, selected_layers=_given(selected_layers)
    )


def _given(selected_layers: Sequence[str] | None) -> Sequence[str] | None:
    return selected_layers or None  # to AIMET, an empty list means all layers
