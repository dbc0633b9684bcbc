"""qvis shows what quantization will do to a model before it ships.

Public names are loaded when first used, so that ``import qvis`` costs next to nothing and loads no framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qvis.version import __version__

if TYPE_CHECKING:
    from qvis.analysis import analyze
    from qvis.analysis.bit_widths import bit_widths
    from qvis.analysis.compressibility import compressibility
    from qvis.analysis.damage import Sensitivity
    from qvis.analysis.sensitivity import sensitivity
    from qvis.analysis.sizes import Compressibility
    from qvis.analysis.widths import BitWidths
    from qvis.benchmarking.benchmark import benchmark
    from qvis.benchmarking.records import Benchmark
    from qvis.equalization.equalize import equalize
    from qvis.equalization.result import Equalization
    from qvis.errors import (
        BadArgumentError,
        NotRunnableError,
        OutputError,
        QvisError,
        UnknownLayerError,
        UnsupportedModelError,
    )
    from qvis.excluding import exclusions
    from qvis.images.report import visualize_image_quantization
    from qvis.layers import Thresholds
    from qvis.quantization.quantize import quantize
    from qvis.quantization.result import QuantizedModel
    from qvis.report import (
        Report,
        visualize_changes_after_optimization,
        visualize_relative_weight_ranges,
        visualize_weight_ranges,
    )
    from qvis.report.grids import compare_grids

_HOMES = {
    "Benchmark": "qvis.benchmarking.records",
    "BitWidths": "qvis.analysis.widths",
    "benchmark": "qvis.benchmarking.benchmark",
    "bit_widths": "qvis.analysis.bit_widths",
    "Compressibility": "qvis.analysis.sizes",
    "Equalization": "qvis.equalization.result",
    "NotRunnableError": "qvis.errors",
    "analyze": "qvis.analysis",
    "compare_grids": "qvis.report.grids",
    "compressibility": "qvis.analysis.compressibility",
    "equalize": "qvis.equalization.equalize",
    "exclusions": "qvis.excluding",
    "quantize": "qvis.quantization.quantize",
    "sensitivity": "qvis.analysis.sensitivity",
    "BadArgumentError": "qvis.errors",
    "OutputError": "qvis.errors",
    "QuantizedModel": "qvis.quantization.result",
    "QvisError": "qvis.errors",
    "Report": "qvis.report",
    "Sensitivity": "qvis.analysis.damage",
    "Thresholds": "qvis.layers",
    "UnknownLayerError": "qvis.errors",
    "UnsupportedModelError": "qvis.errors",
    "visualize_changes_after_optimization": "qvis.report",
    "visualize_image_quantization": "qvis.images.report",
    "visualize_relative_weight_ranges": "qvis.report",
    "visualize_weight_ranges": "qvis.report",
}

__all__ = [
    "BadArgumentError",
    "Benchmark",
    "BitWidths",
    "Compressibility",
    "Equalization",
    "NotRunnableError",
    "OutputError",
    "QuantizedModel",
    "QvisError",
    "Report",
    "Sensitivity",
    "Thresholds",
    "UnknownLayerError",
    "UnsupportedModelError",
    "__version__",
    "analyze",
    "benchmark",
    "bit_widths",
    "compare_grids",
    "compressibility",
    "equalize",
    "exclusions",
    "quantize",
    "sensitivity",
    "visualize_changes_after_optimization",
    "visualize_image_quantization",
    "visualize_relative_weight_ranges",
    "visualize_weight_ranges",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qvis' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
