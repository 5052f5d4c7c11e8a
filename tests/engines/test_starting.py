"""A plug-in that cannot start says so in one line, and its engine goes on. No engine is needed here."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

import pytest

from arfusion_pass.config import FusionConfig
from arfusion_pass.engines import sglang, vllm


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    """The lines at ERROR so far."""
    log = logging.getLogger("arfusion_pass")
    monkeypatch.setattr(log, "parent", logging.getLogger())
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(vllm, "speak_through", lambda name: None)
    vllm.settings.cache_clear()
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    vllm.settings.cache_clear()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"reassociate": tru}', "no JSON object"),
        ('{"reasociate": true}', "reasociate"),
        ('{"pdl": 1}', "expected a bool"),
    ],
)
def test_settings_that_cannot_be_read(text: str, part: str, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both plug-ins name the variable, its value and the fault, once, and raise nothing: vLLM would end."""
    monkeypatch.setenv("ARFUSION_CONFIG", text)
    for plugin in (vllm, sglang):
        plugin.register()
    assert len(said()) == 2
    assert all(line.startswith("arfusion: nothing will fuse in ") and part in line and text in line for line in said())


def test_an_engine_of_another_make(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vLLM that lacks a class that is wrapped: the line names what is missing."""
    monkeypatch.setitem(sys.modules, "vllm.compilation.backends", None)
    monkeypatch.delenv("ARFUSION_CONFIG", raising=False)
    vllm.register()
    (line,) = said()
    assert "vllm" in line.split(": ", 2)[2]


def test_importing_a_plugin_reads_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine imports the module before it calls it: what the environment holds must not fail there."""
    monkeypatch.setenv("ARFUSION_CONFIG", "{")
    for plugin in (vllm, sglang):
        importlib.reload(plugin)
    monkeypatch.delenv("ARFUSION_CONFIG")
    assert vllm.settings() == FusionConfig()
