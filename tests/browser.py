"""What the tests of the pages share: a browser, a page that is watched, and small models made to be awkward."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from math import floor, isinf, isnan, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import numpy as np

from qvis.words import visible

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page
    from torch import nn

    from qvis.report import Report

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 60_000
"""Milliseconds to wait for what has to come; a busy machine needs them, and no other does."""
WIDE = {"width": 1920, "height": 1000}
"""At this size the table shows all its columns, beside the detail panel."""

EVIL = "</script><img src=x onerror=alert(1)>"
QUOTES = 'it\'s "quoted" & `ticked` | piped'
LONG = "a_very_long_name_" * 17 + "that_ends_here"
TURNED = "\u202egpj_vnoc\u0007"
FORMULA = "=HYPERLINK(1)"
ESCAPED = "100%25 #layer=2"
AWKWARD_NAMES = (EVIL, QUOTES, LONG, TURNED, FORMULA, ESCAPED)


# ---------------------------------------------------------------------------------------------- browser and page


def launch(playwright: Any) -> Browser:
    """Chromium from $CHROMIUM, from the path, or Playwright's own."""
    wanted = os.environ.get("CHROMIUM")
    names = (wanted,) if wanted else ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), wanted)
    browser: Browser = playwright.chromium.launch(executable_path=path, args=FLAGS, timeout=PATIENCE)
    return browser


class Chromium:
    """A browser that takes the place of one that has stalled; it opens windows as Playwright's own does."""

    def __init__(self, playwright: Any, slowness: float = 1) -> None:
        self._playwright = playwright
        self.slowness = slowness
        self._all = [launch(playwright)]

    def new_context(self, **options: Any) -> Any:
        """A window of its own."""
        return self._all[-1].new_context(**options)

    def renew(self) -> None:
        """Open all that comes in a new process; what is open stays, to be closed in its turn."""
        self._all.append(launch(self._playwright))

    def close(self) -> None:
        """End all processes."""
        for browser in self._all:
            browser.close()


class StalledError(Exception):
    """Chromium no longer draws a page whose scripts still run: nothing that waits for a frame will ever go on.

    Seen once in some thousand tests, on a busy machine, and then of every later test on that page. It says nothing of
    the page, so that the test is run again, in a new browser.
    """


FRAME = f"""() => Promise.race([
    new Promise((done) => requestAnimationFrame(() => done(true))),
    new Promise((done) => setTimeout(() => done(false), {PATIENCE // 4})),
])"""


def is_stalled(page: Page) -> bool:
    """Whether no frame of a page comes, though its clock goes on."""
    return not page.is_closed() and not page.evaluate(FRAME)


class Watch:
    """Everything a page did that it should not do; filled while the page is open."""

    def __init__(self, page: Page) -> None:
        self.messages: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.messages.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.messages.append(f"error: {error}"))
        page.on("dialog", self._dismiss)
        page.on("request", lambda request: self.requests.append(request.url))

    def _dismiss(self, dialog: Any) -> None:
        self.messages.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    @property
    def foreign_requests(self) -> list[str]:
        """Requests for anything but pages from a file, and what a page made itself to be downloaded."""
        return [url for url in self.requests if not url.startswith(("file:", "blob:"))]


@contextmanager
def opened(
    browser: Browser, path: Path, *, layer: str | None = None, viewport: Mapping[str, int] = WIDE, **options: Any
) -> Iterator[Page]:
    """The page of a report in a window of its own, offline, ready; on leaving it must have been silent.

    ``layer`` opens the deep link to a layer, ``options`` are those of ``Browser.new_context``. The page's processor is
    as many times slower as ``--slow-browser`` says.
    """
    context = browser.new_context(viewport=dict(viewport), offline=True, **options)
    try:
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        slowness = getattr(browser, "slowness", 1)
        if slowness != 1:
            context.new_cdp_session(page).send("Emulation.setCPUThrottlingRate", {"rate": slowness})
        page.add_init_script(
            "addEventListener('securitypolicyviolation', e => console.error('policy: ' + e.violatedDirective));"
        )
        page.watch = Watch(page)
        page.goto(link(path, layer))
        if options.get("java_script_enabled", True):
            wait_until_ready(page)
        # without scripts there is no frame to ask for
        with telling_stalls(browser, [page] if options.get("java_script_enabled", True) else []):
            yield page
        assert page.watch.messages == []
        assert page.watch.foreign_requests == []
    finally:
        context.close()


@contextmanager
def telling_stalls(browser: Any, pages: Collection[Page]) -> Iterator[None]:
    """Turn what fails because Chromium no longer draws one of the pages into a :class:`StalledError`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, StalledError) or any(is_stalled(page) for page in pages):
            browser.renew()
            raise StalledError("a page is no longer drawn") from error
        raise


def link(path: Path, layer: str | None = None) -> str:
    """The address of a page, or of a layer in it."""
    return path.as_uri() + ("" if layer is None else "#layer=" + quote(layer, safe=""))


def wait_until_ready(page: Page) -> None:
    """Until everything is in place, the figures below the fold included where a layer is shown."""
    page.wait_for_selector("html[data-drawn].all")
    if page.locator("[data-test=detail]").is_visible():
        page.wait_for_selector("[data-test=figure-min-max] > *", state="attached")
    settle(page)


def settle(page: Page) -> None:
    """Until the page has answered, and drawn, what it learns of with a frame: a size, a colour scheme, new numbers.

    Two frames, since sizes are told at the end of one; then longer than Bokeh puts off drawing, and the frame it draws.
    """
    frames_came = page.evaluate(
        """(patience) => {
            const frame = () => new Promise(requestAnimationFrame);
            const sleep = (time) => new Promise((done) => setTimeout(done, time));
            const settled = async () => {
                await frame();
                await frame();
                await sleep(20);
                await frame();
                await frame();
                return true;
            };
            return Promise.race([settled(), sleep(patience).then(() => false)]);
        }""",
        PATIENCE,
    )
    if not frames_came:
        raise StalledError(f"no frame came within {PATIENCE / 1000:.0f} s")


def resize(page: Page, width: int, height: int) -> None:
    """Give the window another size, and wait until everything has taken its place."""
    page.set_viewport_size({"width": width, "height": height})
    page.wait_for_function("([width, height]) => innerWidth === width && innerHeight === height", arg=[width, height])
    settle(page)


def part(page: Page, name: str) -> Locator:
    """The element that carries this ``data-test``."""
    return page.locator(f"[data-test={name}]")


def unfold(page: Page, name: str) -> Locator:
    """Open the ``details`` that carry this ``data-test``, and wait for what their opening fills and draws."""
    return _turn(page, name, True)


def fold(page: Page, name: str) -> Locator:
    """Close what :func:`unfold` opened."""
    return _turn(page, name, False)


def _turn(page: Page, name: str, wanted: bool) -> Locator:
    """A click opens ``details`` at once, but they tell it later: what listens has been told first."""
    details = part(page, name)
    if details.evaluate("e => e.open") != wanted:
        details.evaluate("e => { e.told = new Promise((done) => e.addEventListener('toggle', done, {once: true})); }")
        details.locator("summary").first.click()
        details.evaluate("e => e.told.then(() => {})")
        settle(page)
    assert details.evaluate("e => e.open") == wanted
    return details


GO_TO = """async (hash) => {
    if (location.hash.slice(1) === hash) return;
    await new Promise((done) => {
        const wanted = (event) => {
            if (!event.newURL.endsWith("#" + hash)) return;
            removeEventListener("hashchange", wanted);
            done();
        };
        addEventListener("hashchange", wanted);
        location.hash = hash;
    });
}"""


def go_to(page: Page, hash: str) -> None:
    """Change the part of the address that follows its ``#``, and wait until the page has been told."""
    page.evaluate(GO_TO, hash)


def show(page: Page, layer: str | None = None) -> None:
    """Bring a page that was used before back to its beginning, and select ``layer``, or the worst."""
    worst = page.evaluate(
        """() => {
            const find = (query) => document.querySelector(query);
            find("dialog").close();
            find("[data-action=clear]").click();
            document.activeElement.blur();
            const rank = find(".layers th.rank");
            while (rank.ariaSort !== "ascending") rank.querySelector("button").click();
            return find("[data-test=layer-row] a").hash.slice(1);
        }"""
    )
    hash = worst if layer is None else "layer=" + quote(layer, safe="")
    go_to(page, hash)
    page.evaluate("scrollTo(0, 0)")
    name = unquote(hash.removeprefix("layer="))
    assert selected(page) == visible(name)


def shown_rows(page: Page) -> list[str]:
    """The names of the layers whose rows are shown, from top to bottom, with control characters written out."""
    names: list[str] = page.evaluate(
        "[...document.querySelectorAll('[data-test=layer-row]')].filter(r => r.checkVisibility()).map(r => "
        "r.querySelector('td.name a').title)"
    )
    return names


def selected(page: Page) -> str:
    """The name in the detail panel, with control characters written out."""
    return part(page, "detail-name").text_content() or ""


def wait_for_layer(page: Page, name: str) -> None:
    """Until the detail panel shows this layer, its name given as it is shown."""
    from playwright.sync_api import expect

    expect(part(page, "detail-name")).to_have_text(name)


PLOTS = ("ranges", "relative", "levels", "histogram", "mean_std", "min_max")


def plot(page: Page, name: str) -> dict[str, Any]:
    """Axes and renderers of a figure, each renderer with its glyph's properties and its source's columns.

    Numbers that JSON has no sign for become NaN.
    """
    found: dict[str, Any] = page.evaluate(
        """(name) => {
            const plot = Bokeh.documents.flatMap((d) => d.roots()).find((root) => root.name === name);
            const plain = (v) => {
                if (v === null || typeof v !== "object") return v;
                if (ArrayBuffer.isView(v) || Array.isArray(v)) return Array.from(v);
                return "field" in v ? v.field : "value" in v ? plain(v.value) : null;
            };
            const names = ["x", "y", "y1", "y2", "top", "bottom", "left", "right", "line_dash", "line_color",
                           "fill_alpha", "fill_color", "size", "marker"];
            const glyph = (g) => Object.fromEntries(names.filter((n) => n in g).map((n) => [n, plain(g[n])]));
            const columns = (d) => d instanceof Map ? [...d] : Object.entries(d);
            const data = (source) => Object.fromEntries(columns(source.data).map(([k, v]) => [k, Array.from(v)]));
            const sources = [...new Set(plot.renderers.map((r) => r.data_source))];
            return {
                x: [plot.x_range.start, plot.x_range.end],
                y: [plot.y_range.start, plot.y_range.end],
                inner: [plot.inner_width, plot.inner_height],
                outer: [plot.outer_width, plot.outer_height],
                label_colour: plain(plot.left[0].major_label_text_color),
                sources: sources.map(data),
                renderers: plot.renderers.map((r) => (
                    {type: r.glyph.type, visible: r.visible, data: sources.indexOf(r.data_source), ...glyph(r.glyph)})),
            };
        }""",
        name,
    )
    for renderer in found["renderers"]:
        renderer["data"] = found["sources"][renderer["data"]]
    return found


def points(page: Page, figure: str = "ranges", **properties: str) -> dict[str, list[Any]]:
    """The columns behind the one renderer of ``figure`` with these properties, such as ``y="mean", type="Scatter"``."""
    renderers = plot(page, figure)["renderers"]
    found = [r for r in renderers if all(r.get(key) == value for key, value in properties.items())]
    assert len(found) == 1, f"{len(found)} renderers of {figure} have {properties}"
    data: dict[str, list[Any]] = found[0]["data"]
    return data


def point_at(page: Page, figure: str, x: float, y: float | None = None) -> dict[str, str]:
    """Move the mouse to a place of a figure, by the numbers at its axes, and read the tooltip there."""
    from playwright.sync_api import expect

    target = part(page, f"figure-{figure.replace('_', '-')}")
    target.scroll_into_view_if_needed()
    settle(page)
    drawn, box = plot(page, figure), target.bounding_box()
    assert box is not None
    (left, right), (bottom, top) = drawn["x"], drawn["y"]
    y = (bottom + top) / 2 if y is None else y
    # the frame ends 4 px from the right and begins 4 px from the top
    across = box["x"] + drawn["outer"][0] - 4 - drawn["inner"][0] * (right - x) / (right - left)
    down = box["y"] + 4 + drawn["inner"][1] * (top - y) / (top - bottom)
    page.mouse.move(across - 1, down)
    page.mouse.move(across, down)
    expect(page.locator(".bk-Tooltip")).to_be_visible()
    settle(page)
    labels = page.locator(".bk-tooltip-row-label").all_inner_texts()
    texts = page.locator(".bk-tooltip-row-value").all_inner_texts()
    page.mouse.move(0, 0)
    expect(page.locator(".bk-Tooltip")).to_have_count(0)
    return {label.rstrip(":"): text for label, text in zip(labels, texts, strict=True)}


# ---------------------------------------------------------------------------------------------- numbers in words


def number(text: str) -> float:
    """The number that a cell shows: ``56.1k``, ``1.2 %``, ``−1.05e−5``, ``30.1 dB``, ``n/a``."""
    text = text.replace("−", "-").replace("∞", "inf").replace("\u00a0", " ").strip()
    if text == "n/a":
        return float("nan")
    factor = 1.0
    for suffix, value in ((" dB", 1.0), (" %", 0.01), ("k", 1e3), ("M", 1e6), ("G", 1e9)):
        if text.endswith(suffix):
            text, factor = text.removesuffix(suffix), value
    return float(text.replace(",", "")) * factor


def assert_shows(text: str, value: float, *, digits: int = 3, decimals: int | None = None) -> None:
    """``text`` is ``value`` rounded to so many significant digits, or decimals."""
    shown = number(text)
    if isnan(value) or isinf(value):
        assert str(shown) == str(value), f"{text!r} stands for {value}"
        return
    if decimals is not None:
        unit = 10.0**-decimals
    else:
        unit = 10.0 ** (floor(log10(abs(value))) - digits + 1) if value else 0.0
    assert abs(shown - value) <= 0.501 * unit + 1e-6 * abs(value), f"{text!r} stands for {value}"


# ---------------------------------------------------------------------------------------------- models


def network(layers: Mapping[str, nn.Module]) -> nn.Module:
    """A model of these layers, side by side."""
    from torch import nn

    model = nn.Module()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def mixed_model() -> nn.Module:
    """Layers of several kinds and severities."""
    import torch
    from torch import nn

    torch.manual_seed(1)
    layers = {
        "stem": nn.Conv2d(3, 12, 3),
        "starving": nn.Conv2d(12, 24, 3, bias=False),
        "partly_dead": nn.Linear(12, 20),
        "broken": nn.Linear(8, 6),
        "depthwise": nn.Conv2d(10, 10, 1, groups=10),
        "single": nn.Linear(9, 1),
        "tokens": nn.Embedding(7, 4),
        "wide": nn.Linear(5, 1300),
        "up": nn.ConvTranspose2d(8, 4, 2, groups=2),
        "nothing": nn.Linear(4, 3),
    }
    with torch.no_grad():
        layers["starving"].weight[5] *= 300
        layers["partly_dead"].weight[3] = 0
        layers["partly_dead"].weight[7] *= 1e-4
        layers["broken"].weight[2, 3] = float("nan")
        layers["broken"].weight[3, 0] = float("-inf")
        layers["broken"].weight[4] = float("nan")
        for channel in (1, 650, 1298):
            layers["wide"].weight[channel] *= 6
        layers["nothing"].weight.zero_()
    return network(layers)


def awkward_model() -> nn.Module:
    """Layers whose names would do harm in a page, an address, a spreadsheet or Markdown."""
    import torch
    from torch import nn

    torch.manual_seed(2)
    return network({name: nn.Linear(6, 5 + i) for i, name in enumerate(AWKWARD_NAMES)})


def plain_model(layers: int) -> nn.Module:
    """So many small layers, named ``layer0`` and so on."""
    import torch
    from torch import nn

    torch.manual_seed(3)
    return network({f"layer{i}": nn.Linear(8, 6 + i) for i in range(layers)})


def changed_models() -> tuple[nn.Module, nn.Module]:
    """Two versions of a model: a layer better, one worse, one about the same, one unchanged, four without a partner."""
    import torch
    from torch import nn

    torch.manual_seed(4)
    shared = {
        "improved": nn.Conv2d(6, 16, 3),
        "spoiled": nn.Linear(10, 14),
        "stirred": nn.Linear(10, 9),
        "untouched": nn.Linear(7, 8),
        "wide": nn.Linear(5, 700),
    }
    with torch.no_grad():
        shared["improved"].weight[4] *= 200
    old = network({**copy.deepcopy(shared), "removed": nn.Linear(3, 3), "reshaped": nn.Linear(4, 5)})
    with torch.no_grad():
        shared["improved"].weight[4] /= 200
        shared["spoiled"].weight[2] *= 100
        shared["stirred"].weight.add_(1e-6 * torch.randn(9, 10))
        shared["wide"].weight[333] *= 4
    new = network({**shared, "added": nn.Linear(3, 3), "reshaped": nn.Linear(4, 6)})
    return old, new


def channel_rows(model: nn.Module, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The weights of a layer, a row for each output channel, (channels, elements)."""
    from torch import nn

    layer: Any = model.get_submodule(name)
    weight = layer.weight.detach().double().numpy()
    if isinstance(layer, nn.ConvTranspose2d):
        inputs, outputs = weight.shape[:2]
        weight = weight.reshape(layer.groups, inputs // layer.groups, outputs, -1).swapaxes(1, 2)
        return weight.reshape(layer.groups * outputs, -1)
    return weight.reshape(weight.shape[0], -1)


# ---------------------------------------------------------------------------------------------- reports


def make_report(name: str, folder: Path) -> Report:
    """One of the reports that the tests open."""
    import qvis
    from qvis.adapters.digits import load_digits_model

    relative, ranges = qvis.visualize_relative_weight_ranges, qvis.visualize_weight_ranges
    changes = qvis.visualize_changes_after_optimization
    if name == "relative":
        return relative(mixed_model(), folder, name="Mixed")
    if name == "ranges":
        return ranges(mixed_model(), folder, name="Mixed")
    if name == "awkward":
        return ranges(awkward_model(), folder, name=EVIL)
    if name == "one":
        return relative(plain_model(1), folder)
    if name == "three":
        return ranges(plain_model(3), folder)
    if name == "many":
        return relative(plain_model(70), folder)
    if name == "digits":
        return relative(load_digits_model(), folder)
    if name == "changes":
        return changes(*changed_models(), folder, names=("Old", "New"))
    if name == "awkward changes":
        return changes(awkward_model(), awkward_model(), folder)
    if name == "nothing in common":
        return changes(plain_model(2), network({"other": mixed_model().stem}), folder)
    raise LookupError(name)
