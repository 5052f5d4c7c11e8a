"""A report's JSON is an interface: ``tests/golden/report.json`` holds one, a fused site and a missed one, whole."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import arfusion_pass as arf
from arfusion_pass.reporting.reports import SCHEMA
from tests.scripts.model import Block, Model, Tensor, plain, tokens
from tests.simulate import STRICT, captured

GOLDEN = Path(__file__).parents[1] / "golden" / "report.json"


def reduce(block: Block, y: Tensor) -> Tensor:
    y = plain(block, y)
    return y if block.first else (y + 0.1 * block.bias.float()).to(y.dtype)


@pytest.fixture
def report(world: None) -> arf.FusionReport:
    model = Model(reduce).requires_grad_(False)
    for number, block in enumerate(model.layers):
        block.first = number == 0
    return arf.fuse(captured(model, [tokens()]), STRICT)


def test_the_json_is_what_it_was(report: arf.FusionReport, golden: Callable[[Path, str], None]) -> None:
    """Keys, their order and what they say; folders, times and counters of the machine are left out."""
    text = dataclasses.replace(report, seconds=0.25, graph=0).to_json()
    golden(GOLDEN, re.sub(r'("file": ")[^"]*/', r"\1", text) + "\n")


def test_the_committed_json_is_read_back() -> None:
    """And one of a later version of the schema is refused."""
    data = json.loads(GOLDEN.read_text())
    assert data["version"] == SCHEMA
    assert json.loads(arf.FusionReport.from_dict(data).to_json()) == data
    with pytest.raises(ValueError, match="of version 2"):
        arf.FusionReport.from_dict({**data, "version": SCHEMA + 1})


def test_every_key_is_described() -> None:
    """In the classes' docstrings, which ``docs/report.md`` shows."""
    data = json.loads(GOLDEN.read_text())
    for kind, keys in ((arf.FusionReport, data.keys() - {"version", "matched_count"}), (arf.Site, data["sites"][0])):
        for key in keys:
            assert re.search(rf"^ +(\w+, )?{key}(, \w+)?: ", kind.__doc__ or "", re.MULTILINE), key
