"""The in-situ benchmark's chain, table and figures, without a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from benchmarks import bench_site, plots
from benchmarks.layers import SHAPES, Chain, Shape


def test_a_chain_runs_two_sites_a_layer_behind_what_they_read() -> None:
    chain = Chain(Shape(hidden=32, attention=32, kv=16, ffn=64, layers=3), 2, 0, torch.device("cpu"), fp8=False)
    chain.activations(5)
    x = torch.zeros(5, 32, dtype=torch.bfloat16)
    seen: list[torch.Tensor] = []

    def site() -> torch.Tensor:
        seen.append(x.clone())
        return x

    chain.run(x, site)
    assert len(seen) == chain.sites == 6
    torch.testing.assert_close(seen[0], chain.heads @ chain.weights[0][0])
    torch.testing.assert_close(seen[1], chain.gated @ chain.weights[0][2])
    torch.testing.assert_close(chain.qkv, seen[-1] @ chain.weights[-1][3])


def test_every_shape_splits_over_the_worlds_of_its_engines() -> None:
    for shape in SHAPES.values():
        for world in (2, 4, 8):
            # What cuBLAS takes of FP8: inner and outer sizes in multiples of 16.
            for size in (shape.attention, shape.ffn, shape.attention + 2 * shape.kv):
                assert size % world == 0
                assert size // world % 16 == 0
        assert shape.hidden * 2 % 16 == 0


def test_a_kind_of_gemms_that_is_not_there_is_refused() -> None:
    assert bench_site.gemms("bf16,fp8") == ["bf16", "fp8"]
    with pytest.raises(argparse.ArgumentTypeError, match="no GEMMs of kind both"):
        bench_site.gemms("both")


def test_a_library_that_cannot_be_one_more_contender_is_refused(tmp_path: Path) -> None:
    full, alone = tmp_path / "full.so", tmp_path / "alone.so"
    full.write_bytes(b"\0aoti_torch_library_init_impl\0")
    alone.write_bytes(b"\0arf_launch\0")
    assert bench_site.built_library(f"before={alone}@256") == ("before", str(alone), 256)
    with pytest.raises(argparse.ArgumentTypeError, match="build it without binding"):
        bench_site.built_library(f"before={full}")
    for text in (str(alone), "before=nowhere.so", f"before={alone}@x"):
        with pytest.raises(argparse.ArgumentTypeError, match="NAME=FILE"):
            bench_site.built_library(text)


def results() -> dict:
    adds = {"meeting": [4.0, 3.9, 4.1], "NCCL + norm": [12.0, 11.0, 13.0], "FlashInfer 1": [6.0, 5.0, 7.0]}
    cell = {"gemms": 92.0, "adds": adds | {"ours": [4.0, 3.0, 5.0]}, "isolated": {}, "phases": {}}
    return {
        "world": 2,
        "cells": {"llama-8b bf16 1": cell, "llama-8b bf16 8": cell},
        "notes": ["a peer left out: for\na reason"],
        "info": {"gpu": "a GPU", "torch": "2", "nccl": "2", "kernels": "k", "date": "d"},
    }


def test_the_table_compares_ours_with_the_best_peer_alone() -> None:
    text = bench_site.markdown(results())
    assert (
        "| llama-8b bf16 8 | 92 | 4.0 (3.9-4.1) | 12.0 (11.0-13.0) | 6.0 (5.0-7.0) | 4.0 (3.0-5.0) | 1.50 | 8% |"
        in text
    )
    assert "geometric mean 1.50, smallest 1.50" in text
    assert "Note: a peer left out: for a reason" in text


def test_the_figures_lines() -> None:
    lines = plots.site_lines(results(), "llama-8b bf16")
    assert lines["ours"] == [(1, 4.0), (8, 4.0)]
    assert set(lines) == {"meeting", "NCCL + norm", "FlashInfer 1", "ours"}
    table = {
        "world": 2,
        "us": {"4096x1": {"NCCL + norm": 9.0, "vLLM AR + norm": 6.0, "NCCL + MXFP8": 1.0, "ours": 3.0}},
    }
    found = plots.latency_lines(table, 4096)
    assert found["best peer"] == [(1, 6.0)]
    assert found["ours"] == [(1, 3.0)]
    assert plots.latency_lines(table, 8192) == {"best peer": [], "ours": [], "floor": []}
