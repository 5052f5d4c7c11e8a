"""The report as text."""

from __future__ import annotations

import io

import pytest

from arfusion_pass.reporting.reports import FusionReport, Reports
from arfusion_pass.reporting.sites import Site
from arfusion_pass.reporting.tables import report_table


def fused(name: str, **changes: object) -> Site:
    fields: dict[str, object] = {
        "group": "0",
        "fused": True,
        "pattern": "AllReduceFusedAddRMSNorm",
        "epsilon": 1e-6,
        "dtype": "bfloat16",
        "outputs": ("residual_out", "norm_out"),
    }
    return Site(name=name, **{**fields, **changes})  # type: ignore[arg-type]


def missed(name: str, reason: str | None) -> Site:
    return Site(name=name, group="tp:0", fused=False, reason=reason, dtype="bfloat16")


def test_counts_and_every_reason_are_there() -> None:
    report = FusionReport((fused("all_reduce"), missed("all_reduce_1", "the mean is over dimension 0")), seconds=0.25)
    text = report_table([report])
    assert text.splitlines()[0] == "AllReduce fusion: 1 of 2 sites fused, 1 missed, in 1 graph (0.25 s)"
    assert "AllReduceFusedAddRMSNorm" in text
    assert "residual, norm" in text
    assert "the mean is over dimension 0" in text
    assert "all_reduce_1" in text
    assert str(report) == text


def test_sites_that_differ_only_in_name_share_a_row() -> None:
    sites = [fused("all_reduce"), *(fused(f"all_reduce_{number}") for number in range(1, 160))]
    text = report_table([FusionReport(tuple(sites))])
    assert "160 of 160 sites fused, none missed" in text
    assert "all_reduce ... all_reduce_159" in text
    assert len(text.splitlines()) < 10


def test_another_epsilon_or_quantiser_is_another_row() -> None:
    sites = (fused("a"), fused("b", epsilon=1e-5), fused("c", quantiser="quant_fp8_static"))
    text = report_table([FusionReport(sites)])
    assert "1e-06" in text
    assert "1e-05" in text
    assert "quant_fp8_static" in text


REALISTIC = {
    "pattern": "AllReduceFusedAddRMSNormTokenQuantFP8",
    "quantiser": "quant_fp8_token",
    "shape": (1, 2048, 4096),
    "outputs": ("quant_out", "scale_out", "residual_out"),
    "bytes_fused": 66048,
    "bytes_unfused": 98000,
    "chain_length": 64,
    "strategy": "oneshot to 128 tokens, twoshot beyond",
}


@pytest.mark.parametrize("width", [60, 80, 100, 120, 140, 200])
def test_lines_fit_the_width_and_no_word_is_cut(width: int) -> None:
    """In columns where they fit, below one another where they do not."""
    reason = "scales are of shape [2, 3], expected [T, H / 128]; " * 4 + "end of reason"
    sites = [fused(f"r{i}", module=f"model.layers.{i}.self_attn.o_proj", **REALISTIC) for i in range(2)]
    other = fused("r2", module="model.embed_tokens", outputs=("norm_out",), shape=(1, 2048, 4096))
    text = report_table([FusionReport((*sites, other, missed("all_reduce_1", reason)))], width=width)
    assert max(map(len, text.splitlines())) <= width
    assert ("bytes" in text.splitlines()[3]) == (width >= 120), text
    assert "…" not in text
    words = text.split()
    for word in (*f"{reason} model.layers.*.self_attn.o_proj {REALISTIC['pattern']} [1,2048,4096]".split(), "(-33%)"):
        assert any(word in (found, found.rstrip(",;")) for found in words), (word, text)


def test_what_all_rows_share_is_said_once() -> None:
    """The tensor and epsilon, above the rows; a single row keeps them."""
    sites = (
        fused("a", module="first", shape=(4, 64)),
        fused("b", module="second", shape=(4, 64), outputs=("norm_out",)),
    )
    text = report_table([FusionReport(sites)])
    assert "fused, all with tensor bfloat16 [4,64], epsilon 1e-06\n" in text
    assert text.count("bfloat16") == 1
    alone = report_table([FusionReport(sites[:1])])
    assert "fused\n" in alone and " epsilon " in alone


def test_brackets_are_no_markup() -> None:
    assert "[bold]" in report_table([FusionReport((missed("all_reduce", "shape [bold]"),))])


def test_no_control_codes_in_a_pipe() -> None:
    out = io.StringIO()
    print(FusionReport((fused("all_reduce"),)), file=out)
    assert "\x1b" not in out.getvalue()


def test_several_graphs_are_numbered() -> None:
    text = str(Reports([FusionReport((fused("x"),)), FusionReport((missed("y", "why not"),))]))
    assert "in 2 graphs" in text
    assert "graph" in text


def test_a_note_and_an_empty_list_say_what_happened() -> None:
    assert "graph 0: one rank" in report_table([FusionReport(note="one rank: nothing to exchange")])
    assert "has seen no graph" in str(Reports())
    assert "cache" in str(Reports())


def test_a_missing_reason_is_visible() -> None:
    assert "no reason given" in report_table([FusionReport((missed("all_reduce", None),))])


def test_a_site_whose_group_is_not_known() -> None:
    """An all-reduce that no dialect takes (another reduce op) may have no group: its row stands all the same."""
    text = report_table([FusionReport((Site("all_reduce", "", fused=False, reason="it averages"),))])
    assert "it averages" in text


def test_a_modules_path_is_not_cut_where_there_is_room() -> None:
    """In the width of a terminal; the columns that have spaces give way."""
    site = fused(
        "all_reduce",
        module="layers.0.attention.o_proj",
        shape=(32, 4096),
        chain_length=64,
        bytes_fused=66048,
        bytes_unfused=98000,
        strategy="oneshot to 128 tokens, twoshot beyond",
    )
    text = report_table([FusionReport((site,))], width=120)
    assert "layers.0.attention.o_proj" in text
    assert "[32,4096]" in text
    assert max(map(len, text.splitlines())) <= 120
    assert "(-33%)" in text, "nothing is cut off"
    assert "oneshot to 128 tokens,  " in text, "the strategy stands below the pattern"
