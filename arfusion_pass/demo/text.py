"""The demo's tables: each fused site against its subgraph, and a model's error against a more exact one."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from arfusion_pass.inspection.replay import SiteCheck


def section(title: str) -> str:
    """A heading with an empty line before it."""
    return f"\n== {title} ==\n"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Error of one model's logits.

    Attributes:
        error: root mean square of the difference over that of the exact logits.
        largest: the largest absolute difference.
    """

    name: str
    error: float
    largest: float

    @staticmethod
    def of(name: str, logits: torch.Tensor, exact: torch.Tensor) -> Comparison:
        """Compare ``logits`` with ``exact``, both ``[batch, tokens, vocab]``, in fp64."""
        difference = logits.double() - exact.double()
        error = difference.square().mean().sqrt() / exact.double().square().mean().sqrt()
        return Comparison(name, error.item(), difference.abs().max().item())


def comparison_table(checks: Sequence[SiteCheck]) -> str:
    """One row a site: for each output, how many elements differ from the subgraph run eagerly, and by how many ulp."""
    if not checks:
        return "no site was fused, so none was compared\n"
    out = io.StringIO()
    console = Console(file=out, width=120, color_system=None, force_terminal=False, emoji=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("site", "pattern", "elements that differ", "exact"):
        table.add_column(header, overflow="fold")
    for check in checks:
        outputs = []
        for name, output in check.outputs.items():
            ulp = f" (<= {output.max_ulp} ulp)" if output.mismatched else ""
            outputs.append(f"{name.removesuffix('_out')} {output.mismatched}/{output.total}{ulp}")
        verdict = "yes" if check.ok else f"NO: {check.detail}"
        table.add_row(*map(Text, (check.site.name, check.site.pattern or "", ", ".join(outputs), verdict)))
    console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n") + "\n"
