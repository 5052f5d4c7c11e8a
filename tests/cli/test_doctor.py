"""The doctor's facts on a machine without GPUs, and the rule that names the backend."""

import dataclasses

import pytest
import torch

from arfusion_pass.cli import doctor
from arfusion_pass.cli.doctor import Device, LibraryState
from arfusion_pass.runtime import native

HOPPER = (Device(0, "NVIDIA H200", "9.0", "90a", 140.0, 132),)
LIBRARY = LibraryState("90a", "/cache/x.so", False, None, "/src", "/cache", False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
def test_without_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("ARFUSION_CACHE_DIR", str(tmp_path))
    facts = doctor.collect()
    assert facts.backend == "reference"
    assert facts.reason == "no CUDA device is visible"
    assert facts.devices == ()
    assert facts.problems == ()
    assert dict(facts.rows())["torch"].startswith(torch.__version__)


@pytest.mark.parametrize(
    ("change", "nvcc", "backend", "reason"),
    [
        ({"built": True}, None, "native", "built"),
        ({}, "/usr/bin/nvcc", "native, built on first use", "arfusion build"),
        ({}, None, "reference", "there is no nvcc"),
        ({"sources": None}, "/usr/bin/nvcc", "reference", "no kernel sources"),
        ({"prebuilt": True}, "/usr/bin/nvcc", "reference", "ARFUSION_LIBRARY"),
    ],
)
def test_backend_rule(monkeypatch, change, nvcc, backend, reason):
    monkeypatch.setattr(native, "_failure", None)
    monkeypatch.delenv("ARFUSION_BUILD", raising=False)
    got, why = doctor._backend(HOPPER, dataclasses.replace(LIBRARY, **change), nvcc, "/usr/bin/g++")
    assert got == backend
    assert reason in why


def test_backend_rule_follows_the_environment(monkeypatch):
    monkeypatch.setattr(native, "_failure", None)
    monkeypatch.setenv("ARFUSION_BUILD", "0")
    assert doctor._backend(HOPPER, LIBRARY, "/usr/bin/nvcc", "/usr/bin/g++")[0] == "reference"


def test_bad_threshold_file_is_a_problem(monkeypatch, tmp_path):
    (tmp_path / "thresholds.json").write_text("{")
    monkeypatch.setenv("ARFUSION_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("ARFUSION_THRESHOLDS", raising=False)
    assert any("thresholds.json" in problem for problem in doctor.collect().problems)
