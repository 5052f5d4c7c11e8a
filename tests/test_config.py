"""FusionConfig: refuses what it cannot mean, with the field's name; equal settings are equal and hash alike."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch

import arfusion_pass as arf
from arfusion_pass import config
from arfusion_pass.config import canonical_epsilon, switch


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epsilons", 1e-6),
        ("epsilons", "1e-6"),
        ("epsilons", ("1e-6",)),
        ("epsilons", (float("nan"),)),
        ("epsilons", (float("inf"),)),
        ("epsilons", (-1e-6,)),
        ("epsilons", (1e39,)),
        ("epsilons", (True,)),
        ("dtypes", torch.bfloat16),
        ("dtypes", ("bfloat16",)),
        ("dtypes", (torch.float64,)),
        ("quantisers", 1),
        ("quantisers", None),
        ("backend", "nccl"),
        ("backend", None),
        ("strategy", "both"),
        ("strategy", 1),
        ("pdl", "yes"),
        ("sequence_parallel", 1),
        ("raise_errors", 0),
    ],
)
def test_refused(field: str, value: Any) -> None:
    """A ``ValueError`` that names the field and shows the value."""
    with pytest.raises(ValueError, match=f"FusionConfig.{field}"):
        arf.FusionConfig(**{field: value})


def test_values() -> None:
    """Lists become tuples, epsilons float32's values; a config is a value."""
    config = arf.FusionConfig(epsilons=[1e-6, 0], dtypes=[torch.float32])  # type: ignore[arg-type]
    assert config.epsilons == (9.999999974752427e-07, 0.0)
    assert config == arf.FusionConfig(epsilons=(9.999999974752427e-07, 0.0), dtypes=(torch.float32,))
    assert len({config, dataclasses.replace(config), arf.FusionConfig()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.pdl = False  # type: ignore[misc]


def test_canonical_epsilon() -> None:
    """Two spellings of one float32 are one epsilon; beyond float32 lies infinity."""
    assert canonical_epsilon(1e-6) == canonical_epsilon(9.999999974752427e-07) == 9.999999974752427e-07
    assert canonical_epsilon(1e-6) != canonical_epsilon(1.0000001e-6)
    assert canonical_epsilon(1e39) == float("inf")


def test_an_integer_that_no_float_holds() -> None:
    with pytest.raises(ValueError, match="expected finite numbers"):
        arf.FusionConfig(epsilons=(10**400,))


def test_switches(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An environment variable says yes or no in any of the usual words; others are named once, and mean the default."""
    for text, value in {"0": False, "Off": False, " no ": False, "1": True, "TRUE": True, "": True}.items():
        monkeypatch.setenv("ARFUSION_BUILD", text)
        assert switch("ARFUSION_BUILD", True) is value, text
    monkeypatch.setattr(logging.getLogger("arfusion_pass"), "propagate", True)
    monkeypatch.setenv("ARFUSION_BUILD", "maybe")
    assert switch("ARFUSION_BUILD", True)
    assert not switch("ARFUSION_BUILD", False)
    assert caplog.text.count("ARFUSION_BUILD=maybe is none of") == 1


def test_a_misspelt_variable_is_named_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever reads the environment's settings hears of a variable that is none of ours, with one it is close to."""
    monkeypatch.setattr(config, "_told", set())
    monkeypatch.setattr(logging.getLogger("arfusion_pass"), "propagate", True)
    for name in ("ARFUSION_VLM", "ARFUSION_REASSOCIATE", "ARFUSION_LOG", "ARFUSION_SOAK_SECONDS"):
        monkeypatch.setenv(name, "0" if name != "ARFUSION_LOG" else "info")
    for _ in range(2):
        arf.FusionConfig.from_env()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "no variable ARFUSION_REASSOCIATE" in said[0] and "ARFUSION_CONFIG" in said[0]
    assert "no variable ARFUSION_VLM" in said[1] and "did you mean ARFUSION_VLLM?" in said[1]
