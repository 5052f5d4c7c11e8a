"""The graph's difference for the pattern classes that ``test_golden`` (no quantiser) and ``test_golden_quant`` (plain
torch) do not have, kept in ``tests/golden``: MoE in front (``m_*``), and engines' ops (``e_*``), of both versions of
``auto_functionalized``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._inductor import config as inductor_config

import arfusion_pass as arf
from arfusion_pass import groups, ir
from arfusion_pass.patterns.chains import PROLOGUES
from tests import moe_cases, test_golden_quant
from tests import quant_cases as q
from tests.dialects import engine_calls, engine_ops
from tests.models import Tensor, llama, reduce
from tests.simulate import captured, check_same, fused_copy, tensors
from tests.test_golden import Golden, check_golden

T, H, K = 8, q.HIDDEN, 4
EPS = 1e-6
ADD, PLAIN = "AllReduceFusedAddRMSNorm", "AllReduceRMSNorm"


@pytest.fixture
def engine_world(world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake world under the engines' names for it, and their ops."""
    engine_ops.register_vllm()
    engine_ops.register_sglang()
    engine_ops.register_tensorrt_llm()
    monkeypatch.setattr(groups, "_registered", {})
    for name in ("tp:0", "trtllm:0,1"):
        arf.register_group(name, dist.group.WORLD)  # type: ignore[arg-type]


def m_finalize(x: Tensor, r: Tensor, w: Tensor, s: Tensor, index: Tensor, router: Tensor) -> Any:
    total = r + reduce(moe_cases.shared_last(x, index, router, r))
    return llama(total, w, EPS), total


def m_finalize_masked(x: Tensor, r: Tensor, w: Tensor, s: Tensor, index: Tensor, router: Tensor) -> Any:
    total = r + reduce(moe_cases.masked(x, index, router, r))
    return llama(total, w, EPS), total


def m_finalize_none_group(x: Tensor, r: Tensor, w: Tensor, s: Tensor, index: Tensor, router: Tensor) -> Any:
    return q.group(llama(reduce(moe_cases.one_by_one(x, index, router, r)), w, EPS))


def m_reduce(x: Tensor, r: Tensor, w: Tensor, s: Tensor, index: Tensor, router: Tensor) -> Any:
    total = r + reduce(moe_cases.reduced_token(x * router.t().unsqueeze(-1), router.t(), r))
    return llama(total, w, EPS), total


def m_reduce_static(x: Tensor, r: Tensor, w: Tensor, s: Tensor, index: Tensor, router: Tensor) -> Any:
    total = r + reduce(moe_cases.reduced_fp32(x * router.t().unsqueeze(-1), router.t(), r))
    return q.static_div(llama(total, w, EPS), s), total


def _engine(engine: str, x: Tensor) -> Tensor:
    return engine_calls.all_reduce(engine, x, "tp:0", 2)


def e_vllm_static(x: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    norm, total = engine_calls.ADD_NORMS["ir_add"](_engine("vllm", x), r, w, EPS)
    return engine_calls.c_static(norm, s), total


def e_vllm_indexer(x: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    norm, total = engine_calls.ADD_NORMS["c_add"](_engine("vllm", x), r, w, EPS)
    return engine_calls.c_group(norm, s), torch.ops.vllm.rocm_unquantized_gemm(norm, w.expand(16, H)), total


def e_vllm_packed(x: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    norm, total = engine_calls.ADD_NORMS["ir_add"](_engine("vllm", x), r, w, EPS)
    return engine_calls.c_packed(norm, s), total


def e_vllm_nvfp4(x: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    norm, total = engine_calls.ADD_NORMS["ir_add"](_engine("vllm", x), r, w, EPS)
    return engine_calls.c_nvfp4_out(norm, s), total


def e_vllm_mxfp8(x: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    return engine_calls.c_mxfp8(engine_calls.NORMS["ir"](_engine("vllm", x), w, EPS), s)


def e_vllm_norm_token(x: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    return engine_calls.c_norm_token(_engine("vllm", x), r, w, s, EPS)


def e_vllm_norm_int8(x: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    return engine_calls.c_norm_int8(_engine("vllm", x), r, w, s, EPS)[0]


def e_sglang_group(x: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    norm, total = engine_calls.ADD_NORMS["sgl_gemma_add"](_engine("sglang", x), r, w, EPS)
    return engine_calls.sgl_group(norm, s), total


def e_tensorrt_llm_static(x: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    return engine_calls.trt_static(engine_calls.NORMS["trt"](_engine("tensorrt_llm", x), w, EPS), s)


MODELS: dict[Callable[..., Any], str] = {
    m_finalize: "MoEFinalize" + ADD,
    m_finalize_masked: "MoEFinalize" + ADD,
    m_finalize_none_group: "MoEFinalize" + PLAIN + "GroupQuantFP8",
    m_reduce: "MoEReduce" + ADD,
    m_reduce_static: "MoEReduce" + ADD + "StaticQuantFP8",
    e_vllm_static: ADD + "StaticQuantFP8",
    e_vllm_indexer: ADD + "GroupQuantFP8WithIndexer",
    e_vllm_packed: ADD + "GroupQuantFP8",
    e_vllm_nvfp4: ADD + "QuantNVFP4",
    e_vllm_mxfp8: PLAIN + "QuantMXFP8",
    e_vllm_norm_token: ADD + "TokenQuantFP8",
    e_vllm_norm_int8: PLAIN + "TokenQuantINT8",
    e_sglang_group: "AllReduceFusedAddGemmaRMSNormGroupQuantFP8",
    e_tensorrt_llm_static: PLAIN + "StaticQuantFP8",
}
V2 = (e_vllm_indexer, e_vllm_packed, e_sglang_group)
"""Compiled with ``auto_functionalized_v2``, as plain torch.compile does; the others with v1, as engines do."""


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_golden_chain(model: Callable[..., Any], engine_world: None, golden: Golden) -> None:
    """Torch 2.13's graph turns into exactly this one; on any torch it fuses under this name to the same bits."""
    arguments = [*tensors((T, H), (T, H), (H,)), torch.full((1,), 0.02)]
    if model.__name__.startswith("m_"):
        arguments += [torch.zeros(T, K, dtype=torch.int64), *tensors((T, K))]
    with inductor_config.patch(enable_auto_functionalized_v2=model in V2):
        module = captured(model, arguments)
    fused, report = fused_copy(module)
    assert [site.pattern for site in report.sites] == [MODELS[model]], str(report)
    check_same(module, fused)
    if torch.__version__.startswith("2.13."):
        check_golden(model.__name__, module, fused, golden)


def test_every_class_has_a_golden_difference() -> None:
    """Contract: whatever the pass manager can register is in some golden file: every quantiser, both MoE combinations,
    the indexer's class."""
    names = {*MODELS.values(), *test_golden_quant.MODELS.values()}
    prologues = {"moe_reduce": "MoEReduce", "moe_finalize": "MoEFinalize"}
    assert set(prologues) == set(PROLOGUES)
    for part in (*prologues.values(), *(each.label for each in ir.QUANTISERS.values()), "WithIndexer"):
        assert any(part in name for name in names), part
