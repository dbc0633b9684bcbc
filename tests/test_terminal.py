"""The table in a terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from torch import nn

from qvis import analyze
from qvis.analysis.comparison import compare
from qvis.report.cells import shorten, visible
from qvis.report.document import summarize, summarize_changes
from qvis.report.terminal import print_document, render_terminal
from qvis.words import percent

HOSTILE = "[red]|`<b>@user\x1b[2J\u202e\nend"


def linears(*names: str, spoil: int | None = None) -> nn.Module:
    """A model of Linear layers with these names; every other channel of layer ``spoil`` is 1000 times smaller."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(16, 8, bias=False) for name in names})
    if spoil is not None:
        with torch.no_grad():
            model[names[spoil]].weight[::2] *= 4e-3
    return model


def document_of(model: nn.Module, **options: Any) -> dict[str, Any]:
    return summarize(analyze(model, **options), "relative_weight_ranges")


def test_the_verdict_comes_first_and_the_worst_layer_leads_the_table() -> None:
    document = document_of(linears("first", "second", "third", spoil=1))
    lines = render_terminal(document).splitlines()
    assert lines[0] == "ModuleDict: relative weight ranges"
    assert " ".join(lines[1:]).startswith(document["verdict"]["text"])
    rows = [line.split() for line in lines if "Linear" in line]
    worst = document["layers"][1]
    assert rows[0][:3] == ["◆", "problem", "second"]
    assert f"{percent(worst['noise_share'])}" in " ".join(rows[0])
    assert f"{worst['sqnr_tensor_db']:.1f}" in rows[0]
    assert [row[2] for row in rows] == [layer["name"] for layer in sorted(document["layers"], key=lambda x: x["rank"])]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
def test_no_line_is_wider_than_the_console(width: int) -> None:
    document = document_of(linears("a", "b" * 300, "漢字" * 60, spoil=0))
    assert max(map(cell_len, render_terminal(document, width=width).splitlines())) <= width


def test_more_room_shows_more_columns_and_never_loses_one() -> None:
    document = document_of(linears("conv", spoil=0))
    titles = ("noise", "SQNR", "Shape", "levels", "Findings")
    counts = [sum(title in render_terminal(document, width=width) for title in titles) for width in (40, 80, 120)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 5


def test_only_twenty_rows_are_shown_unless_all_are_asked_for() -> None:
    document = document_of(linears(*(f"layer{i}" for i in range(23))))
    short, long = render_terminal(document), render_terminal(document, all_rows=True)
    assert sum("Linear" in line for line in short.splitlines()) == 20
    assert "and 3 more (--all)" in short
    assert sum("Linear" in line for line in long.splitlines()) == 23
    assert "--all" not in long


def test_names_can_neither_style_the_table_nor_steer_the_terminal() -> None:
    document = document_of(linears(HOSTILE), name="[blink]model\x1b]0;title\x07")
    text = render_terminal(document, width=200)
    assert r"[red]|`<b>@user\x1b[2J\u202e\nend" in text
    assert text.startswith(r"[blink]model\x1b]0;title\x07: ")
    assert not any(char in text for char in "\x1b\x07\u202e")


def test_a_terminal_gets_colours_beside_signs_and_words() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, color_system="standard", highlight=False)
    print_document(document_of(linears("a", spoil=0)), console)
    assert "\x1b[1;31m◆ problem" in file.getvalue()


def test_a_terminal_without_unicode_still_gets_signs() -> None:
    binary = io.BytesIO()
    file = io.TextIOWrapper(binary, encoding="ascii")
    print_document(document_of(linears("größe", spoil=0)), Console(file=file, width=80, color_system=None))
    file.flush()
    assert "# problem" in binary.getvalue().decode("ascii")
    assert r"gr\xf6\xdfe" in binary.getvalue().decode("ascii")


def test_a_comparison_shows_the_change_and_names_what_was_not_compared() -> None:
    comparison = compare(analyze(linears("a", "b", "gone")), analyze(linears("a", "b", "new", spoil=1)))
    document = summarize_changes(comparison)
    text = render_terminal(document)
    assert "○ ok → ◆ problem" in text
    gain = next(layer["gain_db"] for layer in document["layers"] if layer["name"] == "b")
    assert f"−{-gain:.1f} dB" in text
    assert "unchanged" in text
    assert "Not compared: 2 layers" in text
    assert "gone: only in the old model" in text
    assert "new: only in the new model" in text


def test_what_could_not_be_read_is_named() -> None:
    model = linears("a")
    model.add_module("waves", nn.Linear(2, 2, bias=False, dtype=torch.complex64))
    text = render_terminal(document_of(model))
    assert "Not read: 1 tensor\n  waves: is complex" in text


def test_two_models_without_a_common_layer_make_no_table() -> None:
    text = render_terminal(summarize_changes(compare(analyze(linears("a")), analyze(linears("b")))))
    assert "Severity" not in text
    assert "Not compared: 2 layers" in text


def test_shortening_keeps_the_end_and_the_width() -> None:
    name = "backbone." * 30 + "last.conv"
    assert [len(shorten(name, width)) for width in (1, 2, 10, 80)] == [1, 2, 10, 80]
    assert shorten(name, 40).endswith("last.conv")
    assert shorten("conv", 4) == "conv"


def test_lone_surrogates_are_spelled_out() -> None:
    assert visible("a\ud800é ") == r"a\ud800é "
