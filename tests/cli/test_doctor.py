"""The doctor's facts on a machine without GPUs, and the rule that names the backend."""

import dataclasses

import pytest
import torch

from arfusion_pass.cli import doctor
from arfusion_pass.cli.doctor import Device, LibraryState
from arfusion_pass.runtime import build, native, thresholds

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


@pytest.mark.parametrize("folder", ["x" * 300, "~nobody-has-this-name/x"])
def test_a_cache_folder_that_cannot_be_looked_at(monkeypatch, tmp_path, folder):
    """As a home of another user's, for which Python's Path raises: there is no library and no table in it, said once
    by whoever wants to build there. (Root may look anywhere, so it is a name that no file can have.)"""
    monkeypatch.setenv("ARFUSION_CACHE_DIR", folder if folder[0] == "~" else str(tmp_path / folder / "arfusion"))
    monkeypatch.delenv("ARFUSION_THRESHOLDS", raising=False)
    monkeypatch.delenv("ARFUSION_LIBRARY", raising=False)
    monkeypatch.setenv("ARFUSION_ARCH", "90a")
    assert thresholds.load() is thresholds.BUILT_IN
    assert not doctor.collect().library.built
    with pytest.raises(build.BuildError, match=r"cannot create the cache folder|home directory"):
        build.build("90a")
