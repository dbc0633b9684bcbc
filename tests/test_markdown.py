"""The report for a pull request."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qvis
from qvis import analyze
from qvis.analysis.comparison import compare
from qvis.report.document import summarize, summarize_changes
from qvis.report.markdown import code, prose, render_markdown
from qvis.words import percent

HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "**bold** _it_ ~~no~~ [link](https://example) ![i](x)",
    "@octocat and @org/team, #12, GH-12",
    "`code` \\` ``",
    "$x$",
    "a|b &lt; &#60; \\|",
    "</details></code>",
)


def linears(*names: str, spoil: int | None = None) -> nn.Module:
    """A model of Linear layers with these names; every other channel of layer ``spoil`` is far smaller."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in names})
    if spoil is not None:
        with torch.no_grad():
            model[names[spoil]].weight[::2] *= 4e-3
    return model


def document_of(model: nn.Module, **options: Any) -> dict[str, Any]:
    return summarize(analyze(model, **options), "relative_weight_ranges")


def rows(text: str) -> list[list[str]]:
    """The cells of the rows with layers."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and re.match(r"\| [○▲◆✕]", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_mark_comes_first_then_the_verdict_in_bold_then_its_evidence() -> None:
    document = document_of(linears("a", "b", spoil=1))
    mark, empty, verdict, _, details, *_ = render_markdown(document).splitlines()
    assert (mark, empty) == (f"<!-- qvis {qvis.__version__} -->", "")
    assert verdict == f"**{document['verdict']['text']}**"
    assert details == " ".join(document["verdict"]["details"])


def test_the_table_holds_the_numbers_of_the_summary_worst_first() -> None:
    document = document_of(linears("a", "b", spoil=1))
    first, second = rows(render_markdown(document))
    layer = document["layers"][1]
    assert first[:5] == ["◆ problem", "`b`", "Linear", "4×4", percent(layer["noise_share"])]
    assert first[5:7] == [f"{layer['sqnr_tensor_db']:.1f}", f"{layer['sqnr_channel_db']:.1f}"]
    assert second[:2] == ["○ ok", "`a`"]


def test_rows_after_the_tenth_are_folded_away_and_after_the_two_hundredth_only_counted() -> None:
    document = document_of(linears(*(f"layer{i}" for i in range(215))))
    text = render_markdown(document)
    shown, folded = text.split("<details>")
    assert len(rows(shown)) == 10
    assert len(rows(folded)) == 200
    assert "<summary>200 more layers</summary>\n\n|" in folded
    assert "5 more layers, ranked after these, can be read in the JSON report." in folded
    ranked = [layer["name"] for layer in sorted(document["layers"], key=lambda layer: layer["rank"])]
    assert [row[1].strip("`") for row in rows(text)] == ranked[:210]


def test_ten_layers_leave_nothing_to_fold() -> None:
    assert "<details>" not in render_markdown(document_of(linears(*"abcdefghij")))


def test_every_row_has_as_many_cells_as_the_head_whatever_the_names() -> None:
    names = ("a|b", "`", "``x``", "\\|", "new\nline", "<!-- ", "</details>", "*", " padded ", "x" * 300)
    text = render_markdown(document_of(linears(*names)))
    head = next(line for line in text.splitlines() if line.startswith("| Severity"))
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {head.count("|")}
    assert len(rows(text)) == len(names)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_cannot_act_as_markdown_or_html(name: str) -> None:
    text = render_markdown(document_of(linears(name, spoil=0), name=name))
    own = text.replace("<!-- qvis", "").replace(" -->", "")
    own = re.sub(r"</?(code|sub|details|summary)>", "", own)
    outside = re.sub(r"`[^`\n|]*`", "", own).replace("**", "")
    assert not re.search(r"[<>`*~$\[\]]", outside)
    # what stands outside of code is cut up so that nobody is notified and nothing linked
    prose_lines = "\n".join(line for line in outside.splitlines() if not line.startswith("|"))
    assert not re.search(r"@\w|(?<!&)#\d|https?://", re.sub(r"<code>.*?</code>", "", prose_lines))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_real_parser_shows_a_hostile_name_as_it_is(name: str) -> None:
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    page = parser.render(render_markdown(document_of(linears(name, spoil=0), name=name)))
    tags = set(re.findall(r"</?(\w+)", re.sub(r"<!--.*?-->", "", page)))
    assert tags <= {"p", "strong", "table", "thead", "tbody", "tr", "th", "td", "code", "sub"}
    cells = [html.unescape(cell) for cell in re.findall(r"<td><code>(.*?)</code></td>", page)]
    assert cells == [name]


def test_a_name_of_300_characters_is_cut_in_the_middle_everywhere() -> None:
    name = "stem/" * 58 + "last_conv"
    text = render_markdown(document_of(linears(name, spoil=0)))
    assert name not in text
    assert text.count("last_conv") >= 2
    assert max(len(word) for word in text.split()) < 110


def test_code_is_plain_where_it_can_be() -> None:
    assert code("blocks.0.conv_1") == "`blocks.0.conv_1`"
    assert code("a|b") == "<code>a&#124;b</code>"
    assert code("@user") == "<code>&#64;user</code>"
    assert code(" a") == "<code> a</code>"


def test_prose_stays_readable() -> None:
    text = "In layer_1, 3.1 % (15.1 dB); a grid per channel would make that 0.1 %."
    assert prose(text) == text
    assert prose("@user #12 https://a www.b") == "@&#8203;user #&#8203;12 https:&#8203;//a www&#8203;.b"
    assert prose("GH-12 :smile: #60;") == "GH&#8203;-12 :&#8203;smile: #&#8203;60;"


def test_what_was_left_out_is_named() -> None:
    comparison = compare(analyze(linears("a", "gone|")), analyze(linears("a", "new")))
    text = render_markdown(summarize_changes(comparison))
    assert "Not compared: 2 layers:\n\n- `new`: only in the new model\n- <code>gone&#124;</code>: only in the" in text
    assert len(rows(text)) == 1


def test_of_very_many_left_out_layers_the_rest_is_counted() -> None:
    many = linears(*(f"layer{i}" for i in range(30)))
    text = render_markdown(summarize_changes(compare(analyze(many), analyze(linears("x")))))
    assert "- and 11 more in the JSON report" in text


def test_a_comparison_shows_both_severities_and_the_change() -> None:
    document = summarize_changes(compare(analyze(linears("a"), name="old"), analyze(linears("a", spoil=0), name="new")))
    text = render_markdown(document)
    (row,) = rows(text)
    assert row[:2] == ["○ ok → ◆ problem", "`a`"]
    assert row[4] == f"−{-document['layers'][0]['gain_db']:.1f} dB"
    footer = text.splitlines()[-1]
    assert "`old`" in footer
    assert "`new`" in footer
    assert document["model"]["before"]["fingerprint"][:12] in footer


def test_a_layer_of_nan_has_no_number_and_says_so() -> None:
    model = linears("a")
    with torch.no_grad():
        model["a"].weight.fill_(float("nan"))
    (row,) = rows(render_markdown(document_of(model)))
    assert row[0] == "✕ unusable"
    assert row[4] == "n/a"


def test_the_footer_names_the_model_the_framework_and_the_fingerprint() -> None:
    document = document_of(linears("a"), name="My net")
    footer = render_markdown(document).splitlines()[-1]
    model = document["model"]
    for fact in ("`My net`", model["framework"], "16 parameters", model["fingerprint"][:12], qvis.__version__):
        assert fact in footer


def test_a_report_writes_the_same_text_and_may_replace_its_own_file(tmp_path: Path) -> None:
    for _ in range(2):
        report = qvis.visualize_weight_ranges(linears("a"), tmp_path, formats=("md",))
        assert report.path is not None
        assert report.path.read_text(encoding="utf-8") == report.to_markdown()
    assert np.isfinite(report.layers[0].statistics.max).all()
