"""Real post-grad graphs, kept as printed (``tests/graphs``), fused: counts, patterns, values, golden differences.

They come from torch 2.13 on two ranks: functional collectives and ``dist.all_reduce`` (a_*), Hugging Face norms (b_*),
FP8 quantisers in plain torch (c_*), ops of the kind vLLM registers under both versions of auto_functionalized (d_*,
under vLLM's names), DTensor and ``tp_plan`` models (f_*), DTensor's sequence parallelism (g_*). Being text, they hold
on every torch release.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest
import torch.distributed as dist

import arfusion_pass as arf
from arfusion_pass.inspection import graph_diff, print_graph
from tests.dialects.engine_ops import register_vllm
from tests.printed_graphs import PrintedGraph
from tests.simulate import check_same, fused_copy

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE / "golden" / "graphs"

ADD, PLAIN = "AllReduceFusedAddRMSNorm", "AllReduceRMSNorm"
SCATTER_ADD, SCATTER = "ReduceScatterFusedAddRMSNormAllGather", "ReduceScatterRMSNormAllGather"
PATTERNS: dict[str, list[str]] = {
    "a01_funcol_frmsnorm_static": [PLAIN],
    "a03_funcol_add_frmsnorm_static": [ADD],
    "a05_funcol_add_rev": [ADD],
    "a06_funcol_add_w32": [ADD],
    "a07_funcol_noeps": [ADD],
    "a08_funcol_mm3d": [ADD],
    "a09_dist_all_reduce_on_input": [ADD],
    "a10_dist_all_reduce_on_linear": [ADD],
    "a13_fp32_residual": [ADD],
    "a14_grad_train": [],
    "b_gemma2_sandwich": ["AllReduceGemmaRMSNorm"],
    "b_gemma_static": ["AllReduceFusedAddGemmaRMSNorm"],
    "b_llama_dynamic": [ADD],
    "b_llama_embed_first_layer": [PLAIN],
    "b_llama_multiuser": [ADD],
    "b_llama_static": [ADD],
    "b_moe_shared_before_ar": [ADD],
    "b_qwen3next_dynamic": ["AllReduceFusedAddGemmaRMSNorm"],
    "c_frms_token": [ADD + "TokenQuantFP8"],
    "c_gemma_group": ["AllReduceFusedAddGemmaRMSNormGroupQuantFP8"],
    "c_llama_group": [ADD + "GroupQuantFP8"],
    "c_llama_group_dsv3_dyn": [ADD + "GroupQuantFP8"],
    "c_llama_static_0dim_scale": [ADD + "StaticQuantFP8"],
    "c_llama_static_div": [ADD + "StaticQuantFP8"],
    "c_llama_static_div_f32": [ADD + "StaticQuantFP8"],
    "c_llama_static_mul": [ADD + "StaticQuantFP8"],
    "d_view_v1": [ADD],
    "d_view_v2": [ADD],
    "d_vllm_like_dyn_v1": [PLAIN, ADD + "StaticQuantFP8", ADD],
    "d_vllm_like_v1": [PLAIN, ADD + "StaticQuantFP8", ADD],
    "d_vllm_like_v2": [PLAIN, ADD + "StaticQuantFP8", ADD],
    "f_dtensor_llama_dynamic": [ADD] * 4,
    "f_dtensor_nnrms_static": [ADD] * 4,
    "f_hf_tpplan_llama": [PLAIN, ADD, ADD, ADD, ADD],
    "g_dtensor_sequence_parallel_static": [SCATTER, SCATTER_ADD, SCATTER_ADD],
    "g_dtensor_sequence_parallel_dynamic": [SCATTER, SCATTER_ADD, SCATTER_ADD],
    "g_dtensor_sequence_parallel_batch_dynamic": [
        name.replace("RMSNorm", "GemmaRMSNorm") for name in (SCATTER, SCATTER_ADD, SCATTER_ADD)
    ],
}
"""Graph to the patterns of its sites, in graph order; one with none is a training graph."""


@pytest.fixture
def groups(world: None) -> None:
    """The fake world under vLLM's name for it as well, and vLLM's ops."""
    register_vllm()
    assert dist.group.WORLD is not None
    arf.register_group("tp", dist.group.WORLD)


def test_every_graph_is_listed() -> None:
    """Contract: no graph of ``tests/graphs`` goes untested."""
    assert {path.stem for path in (HERE / "graphs").glob("*.txt")} == set(PATTERNS)


@pytest.mark.parametrize("name", PATTERNS)
def test_graph(name: str, groups: None, golden: Callable[[pathlib.Path, str], None]) -> None:
    """Contract: each real graph fuses with these patterns and none missed, computes the same, and changes as kept."""
    module = PrintedGraph((HERE / "graphs" / f"{name}.txt").read_text()).module()
    before = print_graph(module.graph)
    fused, report = fused_copy(module)
    after = print_graph(fused.graph)
    assert [site.pattern for site in report.fused] == PATTERNS[name], str(report)
    if not PATTERNS[name]:
        assert after == before
        assert "training graph" in str(report.missed[0].reason)
        return
    assert not report.missed, str(report)
    if name[0] in "abcd" and name != "b_llama_embed_first_layer":  # random integers are no rows of an embedding
        check_same(module, fused)
    golden(GOLDEN / f"{name}.txt", graph_diff(before, after))
