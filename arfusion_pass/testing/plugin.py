"""Fixtures for pytest: ``pytest_plugins = ["arfusion_pass.testing.plugin"]`` in the outermost ``conftest.py``."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from arfusion_pass.fusion_pass import AllReduceFusionPass
from arfusion_pass.install import enable


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--update-golden``."""
    parser.addoption("--update-golden", action="store_true", help="write golden files anew instead of comparing")


@pytest.fixture
def fusion() -> Iterator[AllReduceFusionPass]:
    """Everything that the test compiles is fused, from a fresh Dynamo and without Inductor's caches; the pass, with
    ``.reports``."""
    torch.compiler.reset()
    with torch._inductor.config.patch(fx_graph_cache=False), enable() as installed:
        yield installed
    torch.compiler.reset()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[Path, str], None]:
    """``golden(path, text)``: asserts that the file holds the text; writes it under ``--update-golden``."""

    def compare(path: Path, text: str) -> None:
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.is_file():
            pytest.fail(f"there is no {path}: pytest --update-golden writes it")
        wanted = path.read_text(encoding="utf-8")
        if text != wanted:
            lines = difflib.unified_diff(wanted.splitlines(), text.splitlines(), str(path), "now", lineterm="")
            pytest.fail("\n".join([f"{path} differs (pytest --update-golden writes it anew)", *lines]))

    return compare
