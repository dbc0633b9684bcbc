"""How big a report is and how soon it is ready in a browser, at 10 and at 1,000 layers.

    .venv/bin/python benchmarks/report_page.py

Pages of random layers are written, then each is opened several times from its file in a fresh headless Chromium, in
turn. *ready* is when the table answers and the findings and tables of the worst layer stand, *drawn* when its figures
stand too. Both count from the start of the navigation. *requests* are those that leave the file.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright

from qvis.analysis import analyze_network
from qvis.layers import Layer, Network
from qvis.report import Report
from qvis.report.document import summarize

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
PAGES = ((10, 64), (100, 256), (1_000, 64), (1_000, 512))
"""Layers, and channels in each."""


def network(layers: int, channels: int) -> Network:
    """Layers of normally distributed weights whose channels differ in scale, as those of trained models do."""
    random = np.random.default_rng(0)

    def layer(index: int) -> Layer:
        weight = random.standard_normal((channels, 72)) * random.lognormal(0, 0.5, (channels, 1))
        matrix = weight.astype(np.float32)
        return Layer(f"blocks.{index // 2}.conv{index % 2}", "Conv2d", (channels, 8, 3, 3), "float32", lambda: matrix)

    return Network(f"{layers} layers", "NumPy", tuple(layer(i) for i in range(layers)), (), layers * channels * 72)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each page is opened (default 5)")
    rounds = parser.parse_args().rounds
    browser = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        pages, seconds, sizes = {}, {}, {}
        for layers, channels in PAGES:
            model = network(layers, channels)
            start = time.perf_counter()
            report = Report(summarize(analyze_network(model), "relative_weight_ranges"), ()).write(
                Path(folder) / f"{layers}-{channels}"
            )
            seconds[layers, channels] = time.perf_counter() - start
            assert report.path is not None
            pages[layers, channels] = report.path
            sizes[layers, channels] = report.path.stat().st_size
        drawn: dict[tuple[int, int], list[float]] = {key: [] for key in pages}
        ready: dict[tuple[int, int], list[float]] = {key: [] for key in pages}
        requests = dict.fromkeys(pages, 0)
        for _ in range(rounds):
            for key, path in pages.items():
                chromium = playwright.chromium.launch(executable_path=browser, args=FLAGS)
                page = chromium.new_page(viewport={"width": 1600, "height": 1000})
                sent: list[str] = []
                page.on("request", lambda request, sent=sent: sent.append(request.url))
                page.goto(path.as_uri())
                page.wait_for_selector("html[data-drawn]")
                times = page.evaluate("({...document.documentElement.dataset})")
                ready[key].append(float(times["ready"]))
                drawn[key].append(float(times["drawn"]))
                requests[key] += sum(not url.startswith("file:") for url in sent)
                chromium.close()
    print(f"medians of {rounds} openings")
    print(f"{'layers':>8}{'channels':>10}{'MB':>8}{'made in s':>11}{'ready ms':>10}{'drawn ms':>10}{'requests':>10}")
    for key in pages:
        layers, channels = key
        print(
            f"{layers:8,}{channels:10}{sizes[key] / 1e6:8.2f}{seconds[key]:11.2f}{statistics.median(ready[key]):10.0f}"
            f"{statistics.median(drawn[key]):10.0f}{requests[key]:10}"
        )
    print("bars: at most 1.6 MB at 10 layers and 3 MB at 1,000, ready within 500 ms, no request")


if __name__ == "__main__":
    main()
