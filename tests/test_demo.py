"""``qvis demo`` and the page that links its reports."""

from __future__ import annotations

import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qvis import analyze
from qvis.adapters.digits import load_digits_model, load_digits_samples
from qvis.cli import main
from qvis.errors import OutputError
from qvis.report.document import summarize
from qvis.report.index import render_index, write_index

PAGES = (
    "sensitivity",
    "relative_weight_ranges",
    "weight_ranges",
    "changes_after_optimization",
    "bit_widths",
    "grids",
    "compressibility",
    "image_quantization",
)


class Page(HTMLParser):
    """The tags of a page, and the text under each ``data-test``."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.verdicts: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if ("data-test", "verdict") in attrs:
            self.verdicts.append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "p"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.verdicts[-1] += data

    def values(self, tag: str, attribute: str) -> list[str]:
        return [found[attribute] or "" for name, found in self.tags if name == tag and attribute in found]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "a folder"
    assert main(["demo", "-o", str(folder)]) == 0
    return folder


def document_of(model: nn.Module, name: str) -> dict[str, Any]:
    return summarize(analyze(model, name=name), "weight_ranges")


def test_the_demo_writes_its_pages_and_the_index_and_nothing_else(demo: Path) -> None:
    assert sorted(path.name for path in demo.iterdir()) == sorted([*(f"{name}.html" for name in PAGES), "index.html"])


def test_the_index_links_each_page_with_its_true_verdict(demo: Path) -> None:
    judged = analyze(load_digits_model(), inputs=load_digits_samples()[0], measure="top")
    expected = [summarize(judged, kind)["verdict"]["text"] for kind in PAGES[:3]]
    index = Page((demo / "index.html").read_text(encoding="utf-8"))
    assert index.values("a", "href") == [f"{name}.html" for name in PAGES]
    assert index.verdicts[:3] == expected
    kept = re.fullmatch(
        r"At int8 with .*, the output keeps (.*) dB instead of (.*) \(± .*\): worth it.", index.verdicts[3]
    )
    assert kept
    assert float(kept[1]) > float(kept[2]) + 15
    assert re.fullmatch(
        r"Measured on 64 samples: at .* bits on average the output keeps .* in float\.", index.verdicts[4]
    )
    for href in index.values("a", "href"):
        assert (demo / href).is_file()


def test_the_pages_say_which_of_the_two_they_show(demo: Path) -> None:
    assert "DigitsNet with BatchNorm folded" in (demo / "weight_ranges.html").read_text(encoding="utf-8")
    changes = (demo / "changes_after_optimization.html").read_text(encoding="utf-8")
    assert re.search(r"DigitsNet with BatchNorm folded.*→.*DigitsNet with BatchNorm folded equalized", changes)


def test_the_index_needs_no_script_and_no_network(demo: Path) -> None:
    text = (demo / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not {"link", "img", "iframe"} & {tag for tag, _ in page.tags}
    policy = page.values("meta", "content")[0]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert not re.search(r"https?://|@import|url\(", text)


def test_the_demo_can_be_repeated_gives_the_same_bytes_and_says_how_to_open_the_index(
    demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    before = {path.name: path.read_bytes() for path in demo.iterdir()}
    assert main(["demo", "-o", str(demo)]) == 0
    assert {path.name: path.read_bytes() for path in demo.iterdir()} == before
    output = capsys.readouterr()
    last = output.out.splitlines()[-1]
    assert shlex.split(last.removeprefix("Open it with: ")) == ["xdg-open", str(demo / "index.html")]
    assert output.err == ""


def test_an_index_that_qvis_did_not_write_is_left_alone_and_nothing_else_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "index.html").write_text("<p>Mine</p>")
    assert main(["demo", "-o", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qvis: error: out_dir: ")
    assert "was not written by qvis and is left alone" in error
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
    assert (tmp_path / "index.html").read_text() == "<p>Mine</p>"


def test_names_cannot_act_in_the_index() -> None:
    name = "</style><script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(4, 4, bias=False)})
    with torch.no_grad():
        model[name].weight[::2] *= 4e-3
    text = render_index([document_of(model, name)], title=name, lead=name)
    tags = {tag for tag, _ in Page(text).tags}
    assert not {"script", "img"} & tags
    assert text.count("</style>") == 1


def test_the_index_makes_its_folder_or_says_why_not(tmp_path: Path) -> None:
    document = document_of(nn.Linear(2, 2), "net")
    path = write_index(tmp_path / "a" / "b", [document], title="net", lead="One report.")
    assert path == tmp_path / "a" / "b" / "index.html"
    assert "One report." in path.read_text(encoding="utf-8")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="out_dir"):
        write_index(tmp_path / "file", [document], title="net", lead="")
