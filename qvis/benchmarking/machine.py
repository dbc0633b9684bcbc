"""What is measured on, in words."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path

from qvis.words import count


def describe() -> str:
    """Processor, cores and system: ``Intel Xeon 2.10GHz, 2 cores, Linux 6.1.0``."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    release = platform.release()
    return f"{_processor()}, {count(cores, 'core')}, {platform.system()} {release}".strip()


def _processor() -> str:
    with suppress(OSError, UnicodeDecodeError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return " ".join(value.split())
    return platform.processor() or platform.machine() or "unknown processor"
